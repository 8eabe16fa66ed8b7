"""From a sample of a shard to tensors, for each stage; small objects that data workers can be sent."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visplice.lm.prompt import IGNORE, PromptBuilder
from visplice.lm.splice import check_slots
from visplice.lm.tokenizer import Tokenizer
from visplice.train.data.shards import Sample
from visplice.vision.image import open_image
from visplice.vision.transform import Transform

Row = dict[str, Any]


class SkippedSample(ValueError):
    """A sample that cannot be trained on; counted and named, not fatal."""


@dataclass(frozen=True, kw_only=True)
class AlignPreparer:
    """Stage 1: a picture and one of its captions."""

    transform: Transform
    tokenizer: Tokenizer

    def __call__(self, sample: Sample, rng: random.Random) -> Row:
        captions = sample.record.get("captions")
        if sample.image is None or not captions:
            raise SkippedSample(f"sample {sample.key} has no {'picture' if sample.image is None else 'captions'}")
        ids = self.tokenizer.encode(rng.choice(captions))
        if not ids:
            raise SkippedSample(f"sample {sample.key} has an empty caption")
        return {"key": sample.key, "pixels": self.transform(open_image(sample.image)), "caption": torch.tensor(ids)}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """Pixels `[B, 3, H, W]`, caption ids flat `[T]` and where each begins `[B]`."""
        lengths = torch.tensor([len(row["caption"]) for row in rows])
        return {
            "keys": [row["key"] for row in rows],
            "pixels": torch.stack([row["pixels"] for row in rows]),
            "captions": torch.cat([row["caption"] for row in rows]),
            "offsets": lengths.cumsum(0) - lengths,
        }


@dataclass(frozen=True, kw_only=True)
class InstructPreparer:
    """Stage 2: a conversation, with its picture spliced in."""

    transform: Transform
    prompts: PromptBuilder
    max_length: int  # positions, visual tokens included
    image_size: int

    def __call__(self, sample: Sample, rng: random.Random) -> Row:
        messages = llava_messages(sample)
        num_images = int(sample.image is not None)
        # Whole turns are dropped from the back until the rest fits; nothing is cut inside a block or an answer.
        try:
            prompt = self.prompts.build(messages)
        except ValueError as error:
            raise SkippedSample(f"sample {sample.key}: {error}") from error
        dropped = 0
        while len(prompt.ids) > self.max_length:
            dropped += 1
            messages = messages[:-2]
            if not messages:
                raise SkippedSample(
                    f"sample {sample.key} needs more than max_length {self.max_length} positions for its first turn"
                )
            prompt = self.prompts.build(messages)
        try:
            check_slots(prompt.ids, self.prompts.visual, num_images, sample=f"sample {sample.key}")
        except ValueError as error:
            raise SkippedSample(str(error)) from error
        pixels = [self.transform(open_image(sample.image))] if sample.image is not None else []
        return {"key": sample.key, "pixels": pixels, "ids": prompt.ids, "labels": prompt.labels, "dropped": dropped}

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """Ids and labels `[B, S]` padded on the right, pixels `[M, 3, H, W]` of the rows that have a picture."""
        width = max(len(row["ids"]) for row in rows)
        pictures = [pixels for row in rows for pixels in row["pixels"]]
        side = self.image_size
        return {
            "keys": [row["key"] for row in rows],
            "ids": _pad(rows, "ids", 0, width),
            "labels": _pad(rows, "labels", IGNORE, width),
            "pixels": torch.stack(pictures) if pictures else torch.zeros(0, 3, side, side),
            "dropped_turns": sum(row["dropped"] for row in rows),
        }

    @staticmethod
    def supervised(batch: dict[str, Any]) -> bool:
        """Whether any token of the batch has a label."""
        return bool((batch["labels"][:, 1:] != IGNORE).any())


def _pad(rows: list[Row], name: str, value: int, width: int) -> Tensor:
    return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])


def llava_messages(sample: Sample) -> list[dict[str, Any]]:
    """Messages of a LLaVA conversation; as LLaVA does, a picture without `<image>` mark goes to the front."""
    turns = sample.record.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise SkippedSample(f"sample {sample.key} has no conversation of a question and an answer")
    messages: list[dict[str, Any]] = []
    for turn in turns:
        speaker = turn.get("from") if isinstance(turn, dict) else None
        role = {"human": "user", "gpt": "assistant"}.get(str(speaker))
        if role is None or not isinstance(turn.get("value"), str):
            raise SkippedSample(
                f"sample {sample.key} has a turn that is not {{'from': 'human' | 'gpt', 'value': text}}"
            )
        messages.append({"role": role, "content": turn["value"]})
    del messages[len(messages) // 2 * 2 :]  # a question that nobody answered teaches nothing
    marked = any("<image>" in message["content"] for message in messages if message["role"] == "user")
    if sample.image is not None and not marked:
        messages[0]["content"] = "<image>" + messages[0]["content"]
    return messages
