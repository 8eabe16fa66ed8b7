"""From the bytes of a picture file to the square of pixels that an encoder was trained on, in less time than exactly."""

from __future__ import annotations

import io
from dataclasses import dataclass

from torch import Tensor

from visplice.vision.image import open_image
from visplice.vision.transform import Transform


@dataclass(frozen=True)
class FastTransform:
    """The bytes of a picture file to uint8 [3, image_size, image_size]; `transform.normalise` takes batches of them.

    Raises:
        ImageError: as `open_image` does, when called.
    """

    transform: Transform

    def __call__(self, data: bytes) -> Tensor:
        return self.transform.pixels(open_image(data))
