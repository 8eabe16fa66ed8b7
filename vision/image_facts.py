"""What a picture file is and whether it can be trained on, found by decoding it whole."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from visplice.vision.image import FORMATS, open_image, orientation

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
_SAME = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif", "dib": "bmp", "apng": "png", "j2k": "jp2"} | {
    name: "ppm" for name in ("pgm", "pbm", "pnm")
}
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
        ImageError: `open_image` cannot read it; `kind` is a name of IMAGE_FAULTS.
    """
    decoded = open_image(data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # JPEGs of several pictures (MPO) open under a format of their own.
            suffix = SUFFIXES.get("JPEG" if image.format == "MPO" else str(image.format), "img")
            odd = {
                "wrong-extension": extension is not None and _plain(extension) != suffix,
                "cmyk": image.mode == "CMYK",
                "16-bit": image.mode.startswith(("I", "F")) or _deep_png(data),
                "alpha": image.has_transparency_data,
                "animated": image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
                "exif-rotation": orientation(image) not in (0, 1),
            }
            facts = ImageFacts(
                suffix=suffix,
                width=image.width,
                height=image.height,
                oddities=tuple(name for name, found in odd.items() if found),
            )
    return facts, decoded


def _plain(extension: str) -> str:
    lower = extension.lower().removeprefix(".")
    return _SAME.get(lower, lower)


def _deep_png(data: bytes) -> bool:
    """Pillow opens colour PNGs of 16 bits as 8-bit RGB; the header says what they are."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"
