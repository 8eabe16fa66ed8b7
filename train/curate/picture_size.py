"""A filter by the size of pictures, as their headers state it; nothing is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from visplice.train.curate.verdict import Filter, Removal, Verdict
from visplice.train.data.record import Sample
from visplice.vision.image import FORMATS, open_image


@dataclass(frozen=True, kw_only=True)
class PictureSize(Filter):
    """Drops samples with a picture that is too small or too narrow."""

    name: ClassVar[str] = "picture-size"
    min_side: int | None = None  # of the shorter side, pixels
    max_aspect: float | None = None  # longer side by shorter side

    def __post_init__(self) -> None:
        if self.min_side is None and self.max_aspect is None:
            raise ValueError("picture-size without a bound removes nothing; give --min-side or --max-aspect")
        if self.min_side is not None and self.min_side < 1:
            raise ValueError(f"--min-side is {self.min_side}; it is a number of pixels")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"--max-aspect is {self.max_aspect}; the longer side by the shorter is 1 or more")

    def reads_pictures(self, record: Mapping[str, Any]) -> bool:
        return True

    def measure(self, sample: Sample) -> Verdict:
        if not sample.images:
            return Verdict(noted=("no picture",))
        removed = []
        for _, data in sample.images:
            width, height = _size(data)
            short, long = sorted((width, height))
            if self.min_side is not None and short < self.min_side:
                removed.append(Removal("small-picture", f"{width} x {height}"))
            elif self.max_aspect is not None and long > self.max_aspect * short:
                removed.append(Removal("narrow-picture", f"{width} x {height}"))
        return Verdict(drop=bool(removed), removed=tuple(removed))


def _size(data: bytes) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.size
        except Exception:  # of a header that cannot be read, open_image says what is wrong
            return open_image(data).size
