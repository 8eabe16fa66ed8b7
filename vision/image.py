"""Opens a picture that a person hands over, whatever its kind, as upright 8-bit RGB, or says what is wrong with it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # 300 MB as RGB; a header that declares more is refused before anything is decoded

# Only formats that Pillow decodes by itself: it would hand PostScript to a Ghostscript process, for one.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000")

# EXIF orientation: how the stored picture is turned to stand upright. 1 is upright already.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Source = str | Path | bytes | BinaryIO | Image.Image  # whatever a picture can be opened from


class ImageError(ValueError):
    """A picture that cannot be used; the message names it and says why.

    Attributes:
        kind: "unreadable-file" (missing, a folder, not permitted), "empty-file", "not-an-image", "too-many-pixels" or
            "damaged-image".
    """

    def __init__(self, message: str, kind: str = "damaged-image") -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:  # it comes back from worker processes, and has two arguments
        return ImageError, (str(self), self.kind)


def open_image(source: Source) -> Image.Image:
    """Decodes a picture to a new upright RGB image, with no file held open and no metadata left on it.

    Transparency is laid on white. EXIF orientation is applied. An animation gives its first frame (an open
    PIL.Image.Image the frame it stands at). Greys of 16 bits (modes I and I;16) keep the upper 8, rounded; mode F is
    taken as 0 to 1 where nothing in it is larger, else as 0 to 255.

    Args:
        source: A path, the bytes of a file, a file opened for reading bytes (read from its start, left open), or an
            image.

    Raises:
        ImageError: the file is missing, a folder, unreadable, empty, no picture, cut off or damaged, has no pixels,
            or has more than MAX_PIXELS.
    """
    # Pillow warns of sizes below our limit and of odd metadata; both are settled here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if isinstance(source, Image.Image):
            return _decode(source, str(getattr(source, "filename", "")) or "the image")
        if isinstance(source, bytes):
            return _open_stream(io.BytesIO(source), f"the image ({len(source)} bytes)")
        if not isinstance(source, (str, Path)):
            return _open_stream(source, str(getattr(source, "name", "")) or "the image")
        try:
            with open(source, "rb") as file:
                return _open_stream(file, str(source))
        except FileNotFoundError as error:
            raise ImageError(f"{source}: there is no such file; check the path", "unreadable-file") from error
        except IsADirectoryError as error:
            raise ImageError(f"{source} is a folder; give the path of one image file", "unreadable-file") from error
        except OSError as error:
            message = f"{source} cannot be read ({error.strerror}); check path and permissions"
            raise ImageError(message, "unreadable-file") from error


def _open_stream(file: BinaryIO, name: str) -> Image.Image:
    if not file.seekable():
        file = io.BytesIO(file.read())
    # Pillow says the same of an empty file as of one that is no picture.
    if file.seek(0, io.SEEK_END) == 0:
        raise ImageError(f"{name} is empty; the download or copy may have failed", "empty-file")
    try:
        with Image.open(file, formats=FORMATS) as image:
            return _decode(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        message = f"{name} is not an image in a known format; use one of {', '.join(FORMATS)}"
        raise ImageError(message, "not-an-image") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, at 179 million
        message = f"{name} has too many pixels, at most {MAX_PIXELS:,} are read; scale it down first"
        raise ImageError(message, "too-many-pixels") from error
    except Exception as error:  # decoders raise nearly anything at bytes they did not expect
        raise _damaged(name, error) from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name} is {width} x {height} pixels; an image needs at least one")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width} x {height} = {width * height:,} pixels, at most {MAX_PIXELS:,} are read; "
            "scale it down first",
            "too-many-pixels",
        )
    try:
        image.load()
    except Exception as error:
        raise _damaged(name, error) from error
    # Read after loading: a TIFF is turned by Pillow as it loads, and then has no orientation any more.
    turn = _UPRIGHT.get(orientation(image))
    image = _to_rgb(image)
    if turn is not None:
        image = image.transpose(turn)
    image.info.clear()  # an orientation left behind would turn the picture once more at the next opening
    return image


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name} is cut off or damaged ({error or type(error).__name__}); get a complete copy")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata does not make a broken picture; viewers show it as stored
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image; Pillow's own conversion would clip greys of 16 bits and floats, and drop alpha unseen."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow converts premultiplied grey to nothing but LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        levels = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        scale = 255.0 if levels.max() <= 1 else 1.0
        grey = np.rint((levels * scale).clip(0, 255)).astype(np.uint8)
    else:
        # 65535 = 255 * 257, so white stays white and every 8-bit grey comes back as it was.
        levels = np.asarray(image if image.mode.startswith("I;16") else image.convert("I"))
        grey = ((levels.clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey[levels == key] = 255
    return Image.fromarray(grey).convert("RGB")
