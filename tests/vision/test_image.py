import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from visplice.vision.image import MAX_PIXELS, ImageError, open_image

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width, height, bits=8, colour=2):
    """A PNG that declares its size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def pixel(image, at=(0, 0)):
    image = open_image(image)
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    image = Image.fromarray(NOISE)
    path = tmp_path / "noise.png"
    path.write_bytes(encoded(image))
    with open(path, "rb") as file:
        file.read(7)
        sources = [image, path, str(path), path.read_bytes(), file, io.BytesIO(path.read_bytes())]
        opened = [open_image(source) for source in sources]
        assert not file.closed
    for each in opened:
        assert each.mode == "RGB" and type(each) is Image.Image
        np.testing.assert_array_equal(np.asarray(each), NOISE)


def test_a_stream_that_cannot_seek_is_read():
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as out:
        out.write(encoded(Image.new("RGB", (2, 2), (9, 8, 7))))
    with open(read_end, "rb") as file:
        assert pixel(file) == (9, 8, 7)


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF", "JPEG", "JPEG2000"])
def test_every_named_format_is_read(file_format):
    data = encoded(Image.new("RGB", (32, 32), (200, 40, 90)), file_format)
    assert np.abs(np.subtract(pixel(data), (200, 40, 90))).max() <= 4


def test_the_given_image_is_left_alone():
    image = Image.new("RGB", (4, 2), "red")
    image.info["comment"] = "kept"
    open_image(image).putpixel((0, 0), (0, 0, 255))
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.info == {"comment": "kept"}


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("RGBX", (2, 2), (1, 2, 3, 4)), (1, 2, 3)),
        (Image.new("CMYK", (2, 2), (0, 255, 0, 0)), (255, 0, 255)),
        (Image.new("YCbCr", (2, 2), (120, 128, 128)), (120, 120, 120)),
        (Image.new("HSV", (2, 2), (0, 255, 255)), (255, 0, 0)),
        # Alpha 51 is a fifth: a fifth of the colour and four fifths of white.
        (Image.new("RGBA", (2, 2), (0, 100, 200, 51)), (204, 224, 244)),
        (Image.new("RGBa", (2, 2), (0, 20, 40, 51)), (204, 224, 244)),
        (Image.new("LA", (2, 2), (100, 51)), (224, 224, 224)),
        (Image.new("La", (2, 2), (20, 51)), (224, 224, 224)),
        (Image.new("LA", (2, 2), (10, 0)), (255, 255, 255)),
        (Image.new("I", (2, 2), 257 * 100), (100, 100, 100)),
        (Image.new("I", (2, 2), 70000), (255, 255, 255)),
        (Image.new("I", (2, 2), -5), (0, 0, 0)),
        (Image.new("F", (2, 2), 0.5), (128, 128, 128)),
        (Image.new("F", (2, 2), 100.4), (100, 100, 100)),
        (Image.new("F", (2, 2), float("nan")), (0, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_mode_becomes_rgb(image, expected):
    assert pixel(image) == expected


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_grey_is_scaled_not_clipped(mode):
    levels = np.array([[0, 128, 129, 257, 300, 32768, 65406, 65535]], dtype=np.uint16)
    stored = levels.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    grey = open_image(Image.frombytes(mode, (8, 1), stored)).getchannel("R")
    assert list(np.asarray(grey)[0]) == [0, 0, 1, 1, 1, 128, 254, 255]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_file_keeps_every_8_bit_level(file_format):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    opened = open_image(encoded(Image.fromarray(levels), file_format))
    np.testing.assert_array_equal(np.asarray(opened.getchannel("G")), np.arange(256).reshape(16, 16))


def test_transparent_level_of_a_16_bit_png_becomes_white():
    image = Image.fromarray(np.array([[257, 514]], dtype=np.uint16))
    image.info["transparency"] = 257
    assert (pixel(image, (0, 0)), pixel(image, (1, 0))) == ((255, 255, 255), (2, 2, 2))


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(file_format):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    data = encoded(image, file_format, transparency=0)
    assert (pixel(data, (0, 0)), pixel(data, (1, 0))) == ((255, 255, 255), (0, 0, 255))


def test_palette_alpha_is_laid_on_white():
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 0, 100, 200])
    assert pixel(encoded(image, transparency=b"\xff\x33")) == (204, 224, 244)


def test_transparent_colour_of_an_rgb_png_becomes_white():
    assert pixel(encoded(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9))) == (255, 255, 255)


def test_cmyk_jpeg_is_read():
    assert pixel(encoded(Image.new("CMYK", (16, 16), (0, 255, 0, 0)), "JPEG")) == (255, 0, 255)


def test_lab_tiff_is_read():
    red = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), "red"),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert np.abs(np.subtract(pixel(encoded(red, "TIFF")), (255, 0, 0))).max() <= 8  # 8 bits of LAB are coarse


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(file_format, orientation):
    # Two columns and three rows of grey blocks; 16 pixels each, so that they survive JPEG.
    upright = np.array([[0, 50], [100, 150], [200, 250]], dtype=np.uint8)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    image = Image.fromarray(np.kron(stored, np.ones((16, 16), dtype=np.uint8))).convert("RGB")
    opened = open_image(encoded(image, file_format, exif=exif, **lossless))
    for each in (opened, open_image(opened)):
        assert each.size == (32, 48)
        blocks = np.asarray(each.getchannel("R"), dtype=int)[8::16, 8::16]
        assert np.abs(blocks - upright).max() <= 3


def test_broken_exif_does_not_refuse_the_picture():
    data = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x99")
    assert open_image(data).size == (8, 4)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(file_format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **lossless)
    assert pixel(data) == (255, 0, 0)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ImageError, match=r"cat\.png: there is no such file"):
        open_image(tmp_path / "cat.png")


def test_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ImageError, match=f"{tmp_path} is a folder"):
        open_image(str(tmp_path))


def test_empty_file_is_refused_by_name(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    with pytest.raises(ImageError, match=r"empty\.jpg is empty"):
        open_image(path)


def test_empty_bytes_are_refused():
    with pytest.raises(ImageError, match=r"\(0 bytes\) is empty"):
        open_image(b"")


@pytest.mark.parametrize("data", [b"hello", b"<html></html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path, data):
    path = tmp_path / "page.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"page\.png is not an image in a known format; use one of JPEG, PNG"):
        open_image(path)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF"])
def test_truncated_file_is_refused_by_name(tmp_path, file_format):
    path = tmp_path / f"half.{file_format.lower()}"
    data = encoded(Image.fromarray(NOISE), file_format)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"half\.\w+ is (cut off or damaged|not an image)"):
        open_image(path)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF"])
def test_damaged_bytes_give_a_picture_or_an_image_error(file_format):
    data = bytearray(encoded(Image.fromarray(NOISE), file_format))
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(40):
        broken = bytearray(data)
        for at in random.integers(0, min(len(data), 200), 6):
            broken[at] = random.integers(0, 256)
        try:
            assert open_image(bytes(broken)).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused > 0


# Pillow is silent up to 89 million pixels, warns up to 179 million, and raises its own error above.
@pytest.mark.parametrize("side", [10_001, 13_000, 20_000, 2**31 - 1])
@pytest.mark.filterwarnings("error")
def test_too_many_pixels_are_refused_before_decoding(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(ImageError, match=r"bomb\.png .*at most 100,000,000 are read"):
        open_image(path)


@pytest.mark.filterwarnings("error")
def test_the_largest_size_passes_without_a_warning_of_pillow():
    # It holds no pixels, so that it fails later, at decoding: the size itself was accepted.
    with pytest.raises(ImageError, match="cut off or damaged"):
        open_image(png_header(MAX_PIXELS // 10_000, 10_000))


def test_limit_holds_where_the_user_turned_off_that_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=r"20000 x 20000 = 400,000,000 pixels"):
        open_image(png_header(20_000, 20_000))


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_image_without_pixels_is_refused(size):
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels"):
        open_image(Image.new("RGB", size))
    with pytest.raises(ImageError):
        open_image(png_header(*size))


def test_closed_image_is_refused_by_name(tmp_path):
    path = tmp_path / "noise.png"
    path.write_bytes(encoded(Image.fromarray(NOISE)))
    with Image.open(path) as image:
        pass
    with pytest.raises(ImageError, match=r"noise\.png is cut off or damaged"):
        open_image(image)


def test_no_file_stays_open(tmp_path):
    good, bad, frames = tmp_path / "good.tif", tmp_path / "bad.png", tmp_path / "frames.gif"
    good.write_bytes(encoded(Image.fromarray(NOISE), "TIFF"))
    bad.write_bytes(encoded(Image.fromarray(NOISE))[:500])
    frames.write_bytes(encoded(Image.new("L", (4, 4)), "GIF", save_all=True, append_images=[Image.new("L", (4, 4), 9)]))
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        kept = [open_image(good), open_image(frames)]
        with pytest.raises(ImageError, match="cut off"):
            open_image(bad)
    after = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    assert len(after) == len(before) and len(kept) == 2
