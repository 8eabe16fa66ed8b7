"""What the experiments on learning share: data, cached visual tokens, arms that go on where they stopped, scores.

The embedded task and its frozen parts are those of `visplice demo`. Frozen weights are in bfloat16 while training, and
in float32 where accuracy is measured. Stage 2 reads visual tokens that were encoded once.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visplice.app.demo import ENCODER, Plan
from visplice.lm.extension import EMBEDDED, load_extension
from visplice.lm.vision_llama import VisionLlama
from visplice.train import vqa_metric
from visplice.train.data.module import ShardData
from visplice.train.data.shards import write_json
from visplice.train.embedded_answers import VqaSet, answer_with_images, encode_images
from visplice.train.features.encode import EncodeConfig, encode
from visplice.train.instruct import Instruct
from visplice.train.optim import OptimConfig
from visplice.train.trainer import fit

HIDDEN, BATCH = Plan.hidden, Plan.instruct_batch
DTYPE = "bfloat16"  # of frozen weights while training


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracy by the official VQAv2 rule on one set of questions, whose pictures are encoded once."""

    vqa: VqaSet
    features: Tensor  # [M, N, d_vision]

    @classmethod
    def read(cls, folder: Path) -> Scores:
        vqa = VqaSet.read(folder)
        features = encode_images(load_extension(EMBEDDED), [vqa.image_path(i) for i in vqa.image_ids])
        return cls(vqa=vqa, features=features)

    def accuracy(self, answers: dict[int, str]) -> float:
        return vqa_metric.evaluate(self.vqa.annotations, answers).accuracy

    def of(self, model: VisionLlama) -> float:
        return self.accuracy(answer_with_images(model, self.vqa, self.features))


def encode_tokens(data: Path, out: Path) -> Path:
    """The visual tokens of a data set, unless they are there."""
    if not (out / "features.json").exists():
        encode(EncodeConfig(data=str(data), out=str(out), encoder=ENCODER, lm=EMBEDDED, tokens=True, workers=1))
    return out


def once(folder: Path, made: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an arm found, from its `results.json` where that was made of the same numbers."""
    file = folder / "results.json"
    try:
        noted = json.loads(file.read_text())
        if noted["made"] == made:
            return noted
    except (OSError, ValueError, KeyError):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    result = {"made": made} | work()
    write_json(file, result)
    return result


def train(
    build: Callable[[], Any],
    data: Path,
    folder: Path,
    *,
    steps: int,
    seed: int,
    batch: int = BATCH,
    early: int | None = None,
) -> float:
    """Trains a stage, writes its extension folder, and returns the seconds of CPU of a step.

    Behind `early` steps, what there is then is written to the folder `early` in it.
    """
    torch.manual_seed(seed)
    module, ends = build(), []

    def on_train_batch_end(*arguments: Any) -> None:
        type(module).on_train_batch_end(module, *arguments)
        ends.append(time.process_time())
        if len(ends) == early:
            module.save(folder / "early")

    module.on_train_batch_end = on_train_batch_end
    loader = ShardData(str(data), batch_size=batch, seed=seed)
    fit(module, loader, folder, max_steps=steps, seed=seed, accelerator="cpu", name=folder.name)
    return (ends[-1] - ends[1]) / max(1, len(ends) - 2)  # the first two steps warm up


def stage_2(*, lr: float, tokens: Path | None, aligned: str | None, **options: Any) -> Instruct:
    """Stage 2 of the demo; `aligned` None starts a fresh projector."""
    return Instruct(
        ENCODER,
        EMBEDDED,
        aligned=aligned,
        hidden=HIDDEN,
        backbone_dtype=DTYPE,
        features=str(tokens) if tokens is not None else None,
        optim=OptimConfig(lr=lr),
        **options,
    )


def percent(values: Sequence[float]) -> str:
    """Mean of several runs, and each of them."""
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * statistics.mean(values):.1f} % ({each})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
