"""What both stages share: the optimizer, its schedule, and the watch over what is frozen."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visplice.lm.extension import save_extension
from visplice.lm.vision_llama import VisionLlama
from visplice.train.features.features import FeatureSet
from visplice.train.features.frozen import refuse_other_features

if TYPE_CHECKING:
    import lightning as L


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine down to a floor."""

    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.0
    warmup: float = 0.03  # share of all steps in which the rate rises
    floor: float = 0.0  # rate at the end, as a share of the peak

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"model.optim.lr is {self.lr}; it is positive")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"model.optim.{name} is {getattr(self, name)}; it is a share from 0 to 1")

    def share(self, step: int, steps: int) -> float:
        """Share of the peak rate at a step."""
        rise = self.warmup * steps
        if step < rise:
            return (step + 1) / (rise + 1)
        progress = min(1.0, (step - rise) / max(1.0, steps - rise))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


def configure(module: L.LightningModule, config: OptimConfig) -> dict[str, Any]:
    """Optimizer over the trainable parameters alone; only matrices of the projector are decayed."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trainable.items() if name.endswith(".weight")]  # the sentinels are vectors, stacked
    others = [p for name, p in trainable.items() if not name.endswith(".weight")]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    steps = int(module.trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.share(step, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def log_learning_rate(module: L.LightningModule) -> None:
    """Logs the rate of the step that is being taken."""
    optimizer: Any = module.optimizers()
    module.log("train/lr", optimizer.param_groups[0]["lr"])


def checksum(module: nn.Module) -> str:
    """SHA-256 over every byte of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FrozenBackbones:
    """Mixed into the Lightning modules: frozen parts must end as they began, and are kept out of checkpoints."""

    model: Any  # VisionLlama, or the projector alone
    lm_source: str
    features: FeatureSet | None = None  # what takes the place of the backbones
    trainer: Any
    strict_loading = False  # a checkpoint holds the trainable weights alone

    def _backbones(self) -> dict[str, nn.Module]:
        """The frozen parts that are in memory: none where the data holds their features."""
        if not isinstance(self.model, VisionLlama):
            return {}
        return {"encoder": self.model.encoder, "decoder": self.model.lm}

    def setup(self, stage: str) -> None:
        """Refuses data of the other kind, and features of other backbones."""
        if self.trainer.datamodule is not None:
            for source in self.trainer.datamodule.sources():
                refuse_other_features(source, self.features)

    def save(self, folder: str | Path) -> None:
        """Writes the extension folder."""
        save_extension(self.model, folder, lm=self.lm_source)

    def on_fit_start(self) -> None:
        self._checksums = {name: checksum(part) for name, part in self._backbones().items()}

    def on_fit_end(self) -> None:
        for name, part in self._backbones().items():
            if checksum(part) != self._checksums[name]:
                raise RuntimeError(f"the frozen {name} changed during training")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = ("model.encoder.", "model.lm.")
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith(frozen)}

    def check_finite(self, loss: Tensor, keys: list[str]) -> None:
        """Stops at the first loss that is no number."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} in the batch of samples {', '.join(keys)}")
