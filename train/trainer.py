"""The Lightning trainer as both stages use it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def loggers(out: str | Path) -> list[Any]:
    """`logs/metrics.csv` and TensorBoard events below `out`."""
    return [CSVLogger(str(out), name="logs", version=""), TensorBoardLogger(str(out), name="logs", version="")]


def parameter_counts(model: Any) -> tuple[int, int]:
    """Trainable parameters (projector and sentinels), and frozen ones as far as they are in memory."""
    trainable = sum(p.numel() for p in model.projector.parameters())
    return trainable, sum(p.numel() for p in model.parameters()) - trainable


def fit(
    module: Any,
    data: L.LightningDataModule,
    out: Path,
    *,
    max_steps: int,
    seed: int,
    accelerator: str = "auto",
    precision: Any = "32-true",
    name: str = "training",
) -> None:
    """Trains a stage for `max_steps` and writes the extension folder `out`."""
    L.seed_everything(seed, verbose=False)
    quiet_lightning()
    trainer = L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator=accelerator,
        devices=1,
        precision=precision,
        gradient_clip_val=1.0,
        logger=loggers(out),
        callbacks=[StepProgressBar(name, max_steps)],
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=max(1, min(10, max_steps // 10)),
        default_root_dir=out,
    )
    trainer.fit(module, data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    module.save(out)


class StepProgressBar(TQDMProgressBar):
    """One bar over all steps of the stage, epochs apart."""

    def __init__(self, name: str, steps: int) -> None:
        super().__init__(refresh_rate=10)
        self._name, self._steps = name, steps

    def on_train_start(self, *_: Any) -> None:
        self.train_progress_bar = self.init_train_tqdm()
        self.train_progress_bar.reset(self._steps)
        self.train_progress_bar.set_description(self._name)

    def on_train_epoch_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_end(self, *_: Any) -> None:
        pass

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % self.refresh_rate == 0 or step == self._steps:
            bar = self.train_progress_bar
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, module), refresh=False)
            bar.refresh()

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, module)
        return {name.removeprefix("train/"): value for name, value in metrics.items() if name != "v_num"}


def quiet_lightning() -> None:
    """Leaves out Lightning's greetings and the hints that do not apply to a demo on a laptop."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for hint in (
        ".*does not have many workers.*",
        ".*across ranks.*",
        ".*litlogger.*",
        ".*IterableDataset.*__len__.*",
        ".*LightningCLI's args parameter.*",
        ".*in eval mode at the start.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", hint)
