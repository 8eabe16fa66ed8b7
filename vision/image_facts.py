"""What a picture file is and whether it can be trained on, found by decoding it whole."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

from PIL import Image, ImageFile

from visplice.vision.image import FORMATS, ImageError, open_image, orientation

# What `open_image` refuses, by ImageError.kind.
IMAGE_FAULTS = {
    "empty-file": "a picture file of no bytes",
    "not-an-image": "a picture file in no known format",
    "too-many-pixels": "a header that declares more pixels than are read",
    "damaged-image": "a picture that is cut off or does not decode",
}

# What `open_image` sets right, and other readers often get wrong.
ODDITIES = {
    "wrong-extension": "the file is of another format than its name says",
    "cmyk": "inks in place of light",
    "16-bit": "more than 8 bits a channel",
    "alpha": "transparency, in a palette or as a channel",
    "animated": "more than one frame; the first is taken",
    "exif-rotation": "stored turned, with a note to turn it back",
}

SUFFIXES = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "BMP": "bmp",
    "PPM": "ppm",
    "WEBP": "webp",
    "TIFF": "tif",
    "AVIF": "avif",
    "JPEG2000": "jp2",
}
_SAME = {
    "jpeg": "jpg",
    "jpe": "jpg",
    "jfif": "jpg",
    "tiff": "tif",
    "dib": "bmp",
    "apng": "png",
    "j2k": "jp2",
    "j2c": "jp2",
    "jpc": "jp2",
    "jpf": "jp2",
    "jpx": "jp2",
} | {name: "ppm" for name in ("pgm", "pbm", "pnm")}
IMAGE_SUFFIXES = frozenset((*SUFFIXES.values(), *_SAME))


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Format and size as stored, and what is unusual about the file."""

    suffix: str  # of its format, whatever the file is called
    width: int
    height: int
    oddities: tuple[str, ...]


def examine(data: bytes, extension: str | None = None) -> tuple[ImageFacts, Image.Image]:
    """Facts of a picture file, and the picture itself, decoded to upright RGB.

    Args:
        data: the bytes of the file.
        extension: what its name ends in, to notice another format; None where it has none.
    Raises:
        ImageError: it cannot be read; `kind` is a name of IMAGE_FAULTS.
    """
    decoded = open_image(data)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _facts(image, data, extension), decoded
    except Exception as error:  # it decodes, but metadata that nobody needed until now may hold anything
        raise ImageError(f"the image ({len(data)} bytes) is damaged ({error or type(error).__name__})") from error


def _facts(image: Image.Image, data: bytes, extension: str | None) -> ImageFacts:
    """Of a picture that is opened and not yet loaded: loading turns a TIFF, and forgets how it was stored."""
    # JPEGs of several pictures (MPO) open under a format of their own.
    suffix = SUFFIXES["JPEG" if image.format == "MPO" else str(image.format)]
    odd = {
        "wrong-extension": extension is not None and _plain(extension) != suffix,
        "cmyk": image.mode == "CMYK",
        "16-bit": image.mode.startswith(("I", "F")) or _is_deep(image),
        "alpha": image.has_transparency_data,
        "exif-rotation": _may_be_turned(image, data) and 2 <= orientation(image) <= 8,
        "animated": image.format != "MPO" and _is_animated(image),
    }
    oddities = tuple(name for name in ODDITIES if odd[name])
    return ImageFacts(suffix=suffix, width=image.width, height=image.height, oddities=oddities)


def _plain(extension: str) -> str:
    lower = extension.lower().removeprefix(".")
    return _SAME.get(lower, lower)


def _may_be_turned(image: Image.Image, data: bytes) -> bool:
    """Pillow decodes a whole PNG to learn that it has no EXIF; the name of a chunk or of a text tells it sooner."""
    return image.format != "PNG" or any(name in data for name in (b"eXIf", b"exif", b"xmp"))


def _is_deep(image: Image.Image) -> bool:
    """Pillow opens colours of 16 bits as 8-bit RGB; how it is going to unpack them says what they are."""
    for tile in image.tile if isinstance(image, ImageFile.ImageFile) else ():
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if re.search(r";(12|16|32)", str(arguments[0])) or (image.format == "PPM" and _is_over_255(arguments[-1])):
            return True
    return False


def _is_over_255(value: object) -> bool:  # the largest level that a PPM names
    return isinstance(value, int) and value > 255


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # something is there behind the first frame, and it is damaged
        return True
