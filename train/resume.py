"""Checkpoints from which training goes on as if it had never stopped.

A checkpoint holds the trained weights, optimizer, schedule, place in the data and random states of every rank; never
frozen weights. It is written at an optimizer step, beside its place, and renamed when it is whole, so what has the name
of a checkpoint is one. The newest are kept.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_NAME = re.compile(r"step-(\d{9})\.ckpt")


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    found = [file for file in Path(folder).glob("step-*.ckpt") if _NAME.fullmatch(file.name)]
    return sorted(found)


def newest(out: str | Path) -> Path | None:
    """Where a run in this output folder goes on; None if it has not come to its first checkpoint."""
    found = checkpoints(Path(out) / "checkpoints")
    return found[-1] if found else None


class Checkpoints(L.Callback):
    """Writes a checkpoint every so many optimizer steps and at the end, and restores the random states."""

    def __init__(self, out: str | Path, every: int, keep: int = 2, config: str = "") -> None:
        """Takes the output folder, below which `checkpoints/` lies, and the resolved config, kept in each of them.

        Raises:
            ValueError: `every` or `keep` is below 1.
        """
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"checkpoint.{name} is {value}; it is at least 1")
        self.folder, self.every, self.keep, self._config = Path(out) / "checkpoints", every, keep, config
        self._written = -1
        self._restored: Sequence[dict[str, Any]] | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._written = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self._restored is not None:  # behind everything that draws numbers while a run is set up
            if len(self._restored) != trainer.world_size:
                raise ValueError(
                    f"the checkpoint was written by {len(self._restored)} ranks, but this run has {trainer.world_size}"
                )
            _set_random_states(self._restored[trainer.global_rank])
            self._restored = None

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._written or (step % self.every and step != trainer.max_steps):
            return  # between two optimizer steps, a gradient that is half accumulated would be lost
        self._written = step
        self._save(trainer, step)

    def _save(self, trainer: L.Trainer, step: int) -> None:
        file = self.folder / f"step-{step:09d}.ckpt"
        partial = file.with_name(file.name + ".partial")
        try:
            if trainer.is_global_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                with open(partial, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(partial, file)
                for old in checkpoints(self.folder)[: -self.keep]:
                    old.unlink()
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            kept = checkpoints(self.folder)
            before = f"{kept[-1]} is unchanged" if kept else "there is none before it"
            raise OSError(f"{file}: the checkpoint cannot be written ({_reason(error)}); {before}") from error

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self._config

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [_random_states()]
        if dist.is_available() and dist.is_initialized():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, _random_states())
        return {"random": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["random"]


def _reason(error: BaseException) -> str:
    """The operating system's word, which torch's own error covers."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def _random_states() -> dict[str, Any]:
    """Of Python, NumPy, torch and the current CUDA device, as what `torch.load` reads without running code."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, cached],  # type: ignore[index]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_on_cpu(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_on_cpu(states["cuda"]))


def _on_cpu(state: Tensor) -> Tensor:
    return state.cpu()
