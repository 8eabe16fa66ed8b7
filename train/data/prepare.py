"""From a sample of a shard to tensors, for each stage; small objects that data workers can be sent."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visplice.lm.prompt import IGNORE, PromptBuilder
from visplice.lm.tokenizer import Tokenizer
from visplice.train.data.record import MARK, Fault, Sample, check_marks
from visplice.vision.fast_transform import FastTransform
from visplice.vision.image import ImageError, open_image
from visplice.vision.transform import Transform

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AlignPreparer:
    """Stage 1: the first picture of a sample and one of its captions.

    A conversation of one question and one answer is a caption too, the answer: LLaVA's stage 1 data is written so.
    """

    transform: Transform
    tokenizer: Tokenizer
    fast: bool = False  # decode in less time, to uint8 that `normalised` takes; for training

    def __call__(self, sample: Sample, rng: random.Random) -> Row:
        if not sample.images:
            raise Fault("no-image", f"{sample.key} is text alone; stage 1 needs pictures")
        ids = self.tokenizer.encode(rng.choice(captions(sample)))
        if not ids:
            raise Fault("no-tokens", f"{sample.key} has a caption without a token")
        pixels = _decode(self.transform, sample.images[0][1], sample.key, fast=self.fast)
        return {"key": sample.key, "pixels": pixels, "caption": torch.tensor(ids)}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """Pixels `[B, 3, H, W]`, caption ids flat `[T]` and where each begins `[B]`; B may be 0."""
        lengths = torch.tensor([len(row["caption"]) for row in rows], dtype=torch.int64)
        ids = [row["caption"] for row in rows]
        return {
            "keys": [row["key"] for row in rows],
            "pixels": _stack([row["pixels"] for row in rows], self.transform.image_size, fast=self.fast),
            "captions": torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64),
            "offsets": lengths.cumsum(0) - lengths,
        }


@dataclass(frozen=True, kw_only=True)
class InstructPreparer:
    """Stage 2: a conversation, with its pictures spliced in."""

    transform: Transform
    prompts: PromptBuilder
    max_length: int  # positions, visual tokens included
    image_size: int
    fast: bool = False  # as above

    def __call__(self, sample: Sample, rng: random.Random) -> Row:
        messages = llava_messages(sample)
        # Whole turns are dropped from the back until the rest fits; nothing is cut inside a block or an answer.
        dropped = 0
        while True:
            try:
                prompt = self.prompts.build(messages)
            except ValueError as error:  # the template writes no such conversation; `plain` is a picture and a caption
                raise Fault("turn-order", f"{sample.key}: {error}") from error
            if len(prompt.ids) <= self.max_length:
                break
            dropped += 1
            messages = messages[:-2]
            if not messages:
                raise Fault(
                    "too-long",
                    f"{sample.key} needs {len(prompt.ids)} positions for its first turn, max_length is "
                    f"{self.max_length}",
                )
        # Pictures stand in the order of their marks, so a turn that was dropped takes the last ones with it.
        pictures = sample.images[: prompt.num_images]
        return {
            "key": sample.key,
            "pixels": [_decode(self.transform, data, sample.key, fast=self.fast) for _, data in pictures],
            "ids": prompt.ids,
            "labels": prompt.labels,
            "dropped": dropped,
        }

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """Ids and labels `[B, S]` padded on the right, all pictures of the rows in order `[M, 3, H, W]`; B may be 0."""
        width = max((len(row["ids"]) for row in rows), default=0)
        return {
            "keys": [row["key"] for row in rows],
            "ids": _pad(rows, "ids", 0, width),
            "labels": _pad(rows, "labels", IGNORE, width),
            "pixels": _stack([p for row in rows for p in row["pixels"]], self.image_size, fast=self.fast),
            "dropped_turns": sum(row["dropped"] for row in rows),
        }

    @staticmethod
    def num_supervised(batch: dict[str, Any]) -> int:
        """Tokens of the batch that are predicted."""
        return int((batch["labels"][:, 1:] != IGNORE).sum())


def _decode(transform: Transform, data: bytes, key: str, *, fast: bool) -> Tensor:
    try:
        return FastTransform(transform)(data) if fast else transform(open_image(data))
    except ImageError as error:
        raise Fault(error.kind, f"{key}: {error}") from error


def normalised(pixels: Tensor, transform: Transform) -> Tensor:
    """Pixels `[..., 3, H, W]` of a batch as the encoder takes them, on their device; those decoded exactly are it."""
    return transform.normalise(pixels) if pixels.dtype == torch.uint8 else pixels


def _stack(pictures: list[Tensor], side: int, *, fast: bool) -> Tensor:
    if pictures:
        return torch.stack(pictures)
    return torch.zeros(0, 3, side, side, dtype=torch.uint8 if fast else torch.float32)


def _pad(rows: list[Row], name: str, value: int, width: int) -> Tensor:
    padded = [row[name] + [value] * (width - len(row[name])) for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width)


def captions(sample: Sample) -> list[str]:
    """The captions of a sample, or the answer of its only question.

    Raises:
        Fault: `no-text`, there is neither.
    """
    found = sample.record.get("captions")
    if found:
        return found
    turns = sample.record.get("conversations") or []
    if len(turns) == 2:
        return [turns[1]["value"]]
    raise Fault("no-text", f"{sample.key} has no captions, and {len(turns)} turns are not one question and its answer")


def llava_messages(sample: Sample) -> list[dict[str, Any]]:
    """Messages of a LLaVA conversation; as LLaVA does, pictures without an `<image>` mark go to the front.

    Raises:
        Fault: `no-text`, `no-answer`, `placeholder-count`.
    """
    turns = sample.record.get("conversations")
    if not turns:
        raise Fault("no-text", f"{sample.key} has no conversation; stage 2 needs one")
    check_marks(sample.record, len(sample.images))
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    if not any(MARK in message["content"] for message in messages[::2]):
        messages[0]["content"] = MARK * len(sample.images) + messages[0]["content"]
    del messages[len(messages) // 2 * 2 :]  # a question that nobody answered teaches nothing
    if not messages:
        raise Fault("no-answer", f"{sample.key} is a question without an answer")
    return messages
