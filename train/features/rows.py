"""One sample on its way through the encoder: decoded in any thread, and gathered for the file of its shard."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visplice.lm.tokenizer import Tokenizer
from visplice.train.data.prepare import captions
from visplice.train.data.record import Fault, Sample
from visplice.vision.encoder import VisionEncoder
from visplice.vision.fast_transform import FastTransform
from visplice.vision.image import ImageError, open_image


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A sample on its way to the encoder."""

    key: str
    pictures: list[Tensor]  # [3, H, W], normalised or bytes
    captions: list[list[int]]  # ids


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """From a sample to pixels and ids, in any thread."""

    vision: VisionEncoder
    tokenizer: Tokenizer
    tokens: bool  # every picture is wanted, and samples without captions too
    fast: FastTransform | None

    def __call__(self, sample: Sample) -> Decoded:
        if not sample.images and not self.tokens:
            raise Fault("no-image", f"{sample.key} is text alone; there is nothing to encode")
        try:
            texts = captions(sample)
        except Fault:
            if not self.tokens:
                raise
            texts = []  # a conversation, of use to stage 2
        ids = [self.tokenizer.encode(text) for text in texts]
        if not all(ids):
            raise Fault("no-tokens", f"{sample.key} has a caption without a token")
        wanted = sample.images if self.tokens else sample.images[:1]
        return Decoded(key=sample.key, pictures=[self._pixels(data, sample.key) for _, data in wanted], captions=ids)

    def _pixels(self, data: bytes, key: str) -> Tensor:
        try:
            return self.fast(data) if self.fast else self.vision.transform(open_image(data))
        except ImageError as error:
            raise Fault(error.kind, f"{key}: {error}") from error


class Rows:
    """What goes into one file of features."""

    def __init__(self, quota: int) -> None:
        self._quota = quota
        self._keys: list[bytes] = []
        self._offsets = [[0, 0, 0]]
        self._cls: list[Tensor] = []
        self._captions: list[Tensor] = []
        self._scale: list[tuple[bytes, Tensor]] = []  # by the hash of their key, so that chance is the same each time

    def add(self, rows: Sequence[Decoded], cls: Tensor, means: Tensor, visual: Tensor) -> None:
        """Appends samples with `cls` `[p, D]`, `means` `[c, D]` and the visual tokens `[p, N, D]` of all of them."""
        self._cls.append(cls.to("cpu", torch.bfloat16))
        self._captions.append(means.to(torch.bfloat16))
        first = 0
        for row in rows:
            picture, caption, letter = self._offsets[-1]
            key = row.key.encode()
            self._keys.append(key)
            self._offsets.append([picture + len(row.pictures), caption + len(row.captions), letter + len(key)])
            rank = hashlib.sha256(key).digest()
            if row.pictures and (len(self._scale) < self._quota or (self._quota and rank < self._scale[-1][0])):
                self._scale.append((rank, visual[first].to("cpu", torch.bfloat16)))
                self._scale = sorted(self._scale, key=lambda ranked: ranked[0])[: self._quota]
            first += len(row.pictures)

    def tensors(self, vision: VisionEncoder, d_lm: int) -> dict[str, Tensor]:
        letters = b"".join(self._keys)
        none = torch.zeros(0, vision.num_tokens, vision.dim, dtype=torch.bfloat16)
        return {
            "cls": torch.cat([none[:, 0], *self._cls]),
            "captions": torch.cat([torch.zeros(0, d_lm, dtype=torch.bfloat16), *self._captions]),
            "offsets": torch.tensor(self._offsets),
            "keys": torch.tensor(list(letters), dtype=torch.uint8),
            "scale": torch.stack([tokens for _, tokens in self._scale]) if self._scale else none,
        }
