"""What is said of a picture file is true, and nothing in a file brings anything but ImageError."""

import io
import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from visplice.vision.image import MAX_PIXELS, ImageError
from visplice.vision.image_facts import IMAGE_FAULTS, IMAGE_SUFFIXES, ODDITIES, SUFFIXES, examine

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
GREY = Image.fromarray(PIXELS[..., 0])
DEEP = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
OTHER = PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def deep_ppm():
    return b"P6 50 40 65535\n" + (PIXELS.astype(">u2") * 257).tobytes()


def deep_tiff():
    """RGB of 16 bits, which Pillow reads and does not write."""
    data = (PIXELS.astype("<u2") * 257).tobytes()
    tags = [
        (256, 4, 1, 50),
        (257, 4, 1, 40),
        (258, 3, 3, 8 + 2 + 10 * 12 + 4),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 8 + 2 + 10 * 12 + 4 + 6),
        (277, 3, 1, 3),
        (278, 4, 1, 40),
        (279, 4, 1, len(data)),
        (284, 3, 1, 1),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, 10) + entries + bytes(4) + struct.pack("<HHH", 16, 16, 16) + data


PLAIN = {
    "jpg": saved(PICTURE, "JPEG"),
    "png": saved(PICTURE, "PNG"),
    "gif": saved(PICTURE.quantize(32), "GIF"),
    "bmp": saved(PICTURE, "BMP"),
    "ppm": saved(PICTURE, "PPM"),
    "webp": saved(PICTURE, "WEBP"),
    "tif": saved(PICTURE, "TIFF"),
    "avif": saved(PICTURE, "AVIF"),
    "jp2": saved(PICTURE, "JPEG2000"),
}
ODD = [
    (saved(PICTURE.convert("CMYK"), "JPEG"), "jpg", "cmyk"),
    (saved(PICTURE.convert("CMYK"), "TIFF"), "tif", "cmyk"),
    (saved(DEEP, "PNG"), "png", "16-bit"),
    (saved(DEEP, "TIFF"), "tif", "16-bit"),
    (saved(GREY.convert("F"), "TIFF"), "tif", "16-bit"),
    (saved(DEEP.convert("I"), "PPM"), "ppm", "16-bit"),
    (deep_ppm(), "ppm", "16-bit"),
    (deep_tiff(), "tif", "16-bit"),
    (saved(PICTURE.convert("RGBA"), "PNG"), "png", "alpha"),
    (saved(GREY.convert("LA"), "PNG"), "png", "alpha"),
    (saved(PICTURE.quantize(20), "PNG", transparency=3), "png", "alpha"),
    (saved(PICTURE.quantize(20), "PNG", transparency=bytes(range(20))), "png", "alpha"),
    (saved(PICTURE.quantize(20), "GIF", transparency=3), "gif", "alpha"),
    (saved(PICTURE.convert("RGBA"), "WEBP"), "webp", None),  # an alpha channel that is full everywhere is not stored
    (saved(PICTURE.quantize(20), "GIF", save_all=True, append_images=[OTHER.quantize(20)]), "gif", "animated"),
    (saved(PICTURE, "PNG", save_all=True, append_images=[OTHER]), "png", "animated"),
    (saved(PICTURE, "WEBP", save_all=True, append_images=[OTHER]), "webp", "animated"),
    (saved(PICTURE, "TIFF", save_all=True, append_images=[OTHER]), "tif", "animated"),
    (
        saved(PICTURE, "MPO", save_all=True, append_images=[OTHER]),
        "jpg",
        None,
    ),  # as cameras write, the second a preview
    *((saved(PICTURE, "JPEG", exif=turned(number)), "jpg", "exif-rotation") for number in range(2, 9)),
    *((saved(PICTURE, "JPEG", exif=turned(number)), "jpg", None) for number in (0, 1, 9, 65535)),
    (saved(PICTURE, "TIFF", exif=turned(6)), "tif", "exif-rotation"),
    (saved(PICTURE, "PNG", exif=turned(3)), "png", "exif-rotation"),
]


@pytest.mark.parametrize("suffix", PLAIN)
def test_plain_pictures_are_known_by_their_bytes(suffix):
    facts, image = examine(PLAIN[suffix], suffix)
    assert (facts.suffix, facts.width, facts.height, facts.oddities) == (suffix, 50, 40, ())
    assert (image.mode, image.size) == ("RGB", (50, 40))
    assert set(PLAIN) == set(SUFFIXES.values()) <= IMAGE_SUFFIXES


@pytest.mark.parametrize(("data", "suffix", "oddity"), ODD, ids=lambda value: value if isinstance(value, str) else "")
def test_oddities_are_named(data, suffix, oddity):
    facts, image = examine(data, suffix)
    assert facts.suffix == suffix and facts.oddities == ((oddity,) if oddity else ())
    assert image.mode == "RGB" and (oddity is None or oddity in ODDITIES)


@pytest.mark.parametrize(
    ("extension", "right"),
    [
        ("jpg", "jpg"),
        ("JPEG", "jpg"),
        (".jpe", "jpg"),
        ("jfif", "jpg"),
        ("tiff", "tif"),
        ("apng", "png"),
        ("pgm", "ppm"),
    ],
)
def test_other_names_of_a_format_are_no_mistake(extension, right):
    assert examine(PLAIN[right], extension)[0].oddities == ()


@pytest.mark.parametrize("extension", ["png", "", "txt", "jpg.png", "."])
def test_wrong_extension_is_noticed(extension):
    facts, _ = examine(PLAIN["jpg"], extension)
    assert facts.suffix == "jpg" and facts.oddities == ("wrong-extension",)
    assert examine(PLAIN["jpg"], None)[0].oddities == ()


def test_several_oddities_are_all_named():
    data = saved(PICTURE.quantize(9), "PNG", transparency=1, exif=turned(8))
    assert set(examine(data, "jpg")[0].oddities) == {"wrong-extension", "alpha", "exif-rotation"}


def test_odd_pictures_come_upright_and_in_colour():
    for number in range(1, 9):
        data = saved(PICTURE, "PNG", exif=turned(number))
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(np.asarray(examine(data)[1]), np.asarray(expected)), number
    assert np.array_equal(np.asarray(examine(deep_ppm())[1]), PIXELS)
    assert np.array_equal(np.asarray(examine(deep_tiff())[1]), PIXELS)
    assert np.array_equal(np.asarray(examine(saved(DEEP, "PNG"))[1])[..., 1], PIXELS[..., 0])


# --- what cannot be used ---------------------------------------------------------------------------------------------


def declared(width, height):
    """A PNG of a few bytes that says it is as large as this."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty-file"),
        (b"\0", "not-an-image"),
        (b"not a picture", "not-an-image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not-an-image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
        (b"<html><body>404</body></html>", "not-an-image"),
        (PLAIN["jpg"][: len(PLAIN["jpg"]) // 2], "damaged-image"),
        (PLAIN["png"][: len(PLAIN["png"]) // 2], "damaged-image"),
        (PLAIN["webp"][: len(PLAIN["webp"]) // 2], "damaged-image"),
        (PLAIN["tif"][:-2000], "damaged-image"),
        (declared(50_000, 50_000), "too-many-pixels"),
        (declared(MAX_PIXELS + 1, 1), "too-many-pixels"),
        (declared(2**31 - 1, 2**31 - 1), "too-many-pixels"),
        (declared(3000, 3000), "damaged-image"),
    ],
)
def test_what_cannot_be_used_is_named(data, kind):
    tracemalloc.start()
    with pytest.raises(ImageError) as caught:
        examine(data, "jpg")
    assert caught.value.kind == kind and kind in IMAGE_FAULTS
    assert tracemalloc.get_traced_memory()[1] < 1_000_000  # of Python's own; pixels are Pillow's
    tracemalloc.stop()


def test_first_frame_counts_where_later_ones_are_broken():
    frames = [Image.fromarray(np.roll(PIXELS, shift, axis=0)).quantize(32) for shift in range(4)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    first = data.index(b",")
    second = data.index(b"!\xf9", first + 1)
    for end in range(second + 9, len(data) - 1, 97):
        facts, image = examine(data[:end], "gif")
        assert np.array_equal(np.asarray(image), np.asarray(frames[0].convert("RGB")))
        assert facts.oddities in (("animated",), ())


def test_mutated_files_bring_image_errors_and_pictures_and_nothing_else():
    rng = random.Random(0)
    bases = [*PLAIN.values(), *(data for data, _, _ in ODD)]
    worst, seen = 0.0, set()
    for _ in range(3000):
        data = bytearray(rng.choice(bases))
        kind = rng.randrange(4)
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind < 3:
            reach = len(data) if kind == 1 else min(400, len(data))
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(reach)] = rng.randrange(256)
        else:
            at = rng.randrange(min(len(data), 600))
            data[at : at + rng.randrange(60)] = rng.randbytes(rng.randrange(60))
        started = time.monotonic()
        try:
            facts, image = examine(bytes(data), "jpg")
            assert image.mode == "RGB" and facts.suffix in IMAGE_SUFFIXES and set(facts.oddities) <= ODDITIES.keys()
        except ImageError as error:
            seen.add(error.kind)
        worst = max(worst, time.monotonic() - started)
    assert {"damaged-image", "not-an-image"} <= seen <= IMAGE_FAULTS.keys()
    assert worst < 10


def test_nothing_is_printed_and_no_warning_is_given(recwarn, capfd):
    picture = Image.new("RGB", (9500, 9500), "white")  # between Pillow's warning and our limit
    ImageDraw.Draw(picture).line((0, 0, 9500, 9500), fill="black")
    assert examine(saved(picture, "JPEG"))[0].oddities == ()
    assert len(recwarn) == 0 and capfd.readouterr() == ("", "")
