"""What both stages do alike: weigh samples, watch over frozen weights, and stop at the first number that is none."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from visplice.lm.extension import save_extension
from visplice.lm.vision_llama import VisionLlama
from visplice.train.optim import OptimConfig, configure
from visplice.train.stopped import TrainingStopped

REPLAY = "stopped_batch.pt"  # below --out: the batch at which training stopped


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def backbone_type(name: str) -> torch.dtype:
    """The dtype of frozen weights by its name in a config."""
    if name not in _DTYPES:
        raise ValueError(f"model.backbone_dtype is {name!r}; it is one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def checksum(module: nn.Module) -> str:
    """SHA-256 over every byte of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Stage(L.LightningModule):
    """A Lightning module whose frozen parts end as they began and are kept out of checkpoints.

    A stage has `preparer`, which makes batches of samples, and `work(batch)`, which says how much a batch is.

    `training_step` of a stage returns a sum over items (tokens, pairs) and notes how many there are by `count`. The
    gradient is divided by the items of all ranks and accumulated batches just before the step, so each counts alike,
    however they are spread; a rank with a short batch counts for less, one with an empty batch not at all.
    """

    strict_loading = False  # a checkpoint holds the trainable weights alone

    def __init__(self, lm: str, optim: OptimConfig) -> None:
        super().__init__()
        self.lm_source, self.optim = lm, optim
        self.model: Any = None  # VisionLlama, or the projector alone
        self._items = 0.0
        self._keys: list[str] = []  # samples since the last step
        self._batch: Any = None

    # --- what a stage says of itself ---

    def frozen(self) -> dict[str, nn.Module]:
        """The parts that must not change, as far as they are in memory."""
        if not isinstance(self.model, VisionLlama):
            return {}
        return {"encoder": self.model.encoder, "decoder": self.model.lm}

    def save(self, folder: str | Path) -> None:
        """Writes the extension folder."""
        save_extension(self.model, folder, lm=self.lm_source)

    # --- every item counts alike ---

    def count(self, items: int, batch: dict[str, Any]) -> None:
        """Notes that a batch has so many items, and which samples; called once in every training step."""
        self._items += items
        self._keys += batch["keys"]
        self._batch = batch

    def touch(self, loss: Tensor) -> Tensor:
        """The loss, in which every trained weight takes part: a rank that leaves one out makes the others wait."""
        return loss + 0.0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradient by the items of the step, and stops if it is no number."""
        items, world = torch.tensor(self._items, device=self.device, dtype=torch.float64), 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(items)
            world = dist.get_world_size()  # DistributedDataParallel took the mean over ranks
        factor = self.trainer.accumulate_grad_batches * world / max(1.0, items.item())
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm) and self.trainer.precision != "16-mixed":  # its scaler looks for these
            self.stop(f"the gradient has norm {norm.item()}")
        self.log("train/gradient_norm", norm)
        self._items, self._keys = 0.0, []

    # --- stopping ---

    def check_finite(self, loss: Tensor) -> None:
        """Stops at a loss that is no number."""
        if not torch.isfinite(loss):
            self.stop(f"the loss is {loss.item()}")

    def stop(self, what: str) -> None:
        """Saves the last batch and the trained weights for replay, and ends training.

        Raises:
            TrainingStopped: always; it names the samples since the last step.
        """
        file = Path(self.trainer.default_root_dir) / REPLAY
        trained = {name: p.detach().cpu() for name, p in self.named_parameters() if p.requires_grad}
        batch = {name: value for name, value in (self._batch or {}).items() if isinstance(value, (Tensor, list))}
        saved = f"; the batch and the trained weights lie in {file}"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"batch": batch, "weights": trained, "step": self.trainer.global_step}, file)
        except OSError as error:
            saved = f"; the batch could not be saved ({error})"
        shown = ", ".join(self._keys[-8:]) + (f" and {len(self._keys) - 8} before" if len(self._keys) > 8 else "")
        raise TrainingStopped(f"step {self.trainer.global_step + 1}: {what} in the batch of samples {shown}{saved}")

    # --- what is frozen ---

    def on_fit_start(self) -> None:
        self._checksums = {name: checksum(part) for name, part in self.frozen().items()}

    def on_fit_end(self) -> None:
        for name, part in self.frozen().items():
            if checksum(part) != self._checksums[name]:
                raise TrainingStopped(f"the frozen {name} changed during training; nothing was saved")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trained}

    def configure_optimizers(self) -> Any:
        return configure(self, self.optim)
