"""Stage 2: instruction tuning of the projector through a frozen LLaMA."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from visplice.lm.extension import load_backbones, load_trained_projector, read_extension
from visplice.lm.templates import template_for
from visplice.lm.vision_llama import VisionLlama
from visplice.projector.mlp import Projector, ProjectorConfig, rms
from visplice.train.data.prepare import InstructPreparer, normalised
from visplice.train.losses import answer_loss, rank_share
from visplice.train.optim import FrozenBackbones, OptimConfig, configure, log_learning_rate
from visplice.vision.encoder import EncoderConfig


class Instruct(FrozenBackbones, L.LightningModule):
    """Cross-entropy on answer tokens only; encoder and decoder are frozen, logits exist only where there are labels."""

    def __init__(
        self,
        encoder: EncoderConfig,
        lm: str,
        aligned: str | None = None,
        hidden: int = 1024,
        template: str | None = None,
        max_length: int = 1024,
        optim: OptimConfig = OptimConfig(),
    ) -> None:
        """Builds the model from its frozen parts.

        Args:
            encoder: the vision transformer.
            lm: folder of the LLaMA, or 'embedded'.
            aligned: extension folder that stage 1 wrote; without it the projector starts fresh.
            hidden: width inside a fresh projector; an aligned one keeps its own.
            template: how prompts are written; None takes what the tokenizer's control tokens show.
            max_length: positions of one sample, visual tokens included; turns that do not fit are dropped and counted.
            optim: learning rate and schedule.
        """
        super().__init__()
        self.lm_source, self.optim = lm, optim
        vision, llama, tokenizer = load_backbones(encoder, lm)
        if not 0 < max_length <= llama.config.max_seq_len:
            raise ValueError(
                f"model.max_length is {max_length}, but the decoder has {llama.config.max_seq_len} positions"
            )
        self._calibrated = aligned is not None
        if aligned is not None:
            projector = load_trained_projector(read_extension(aligned), vision, llama)
        else:
            projector = Projector(ProjectorConfig(d_vision=vision.dim, d_lm=llama.config.dim, hidden=hidden))
        self.model = VisionLlama(vision, projector, llama, tokenizer, template_for(tokenizer, template))
        self.preparer = InstructPreparer(
            transform=vision.transform,
            prompts=self.model.prompts,
            max_length=max_length,
            image_size=encoder.image_size,
        )

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if not self.preparer.num_supervised(batch):
            raise ValueError(f"no supervised token in the batch of samples {', '.join(batch['keys'])}")
        embeddings = self.model.embed(batch["ids"], self._features(batch))
        # Padding stands on the right, where no real position looks, so plain causal attention is right.
        return answer_loss(self.model.lm, self.model.lm.hidden(embeddings), batch["labels"])

    def _features(self, batch: dict[str, Any]) -> Tensor:
        return self.model.features(normalised(batch["pixels"].to(self.device), self.model.encoder.transform))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._calibrated = True  # the projector that is resumed with was, when its run began

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._calibrated:
            return
        batch = self.trainer.datamodule.peek()  # type: ignore[attr-defined]
        if len(batch["pixels"]):
            self.model.projector.calibrate(self._features(batch), rms(self.model.lm.tok_embeddings.weight))

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        # A batch of text alone, or of nothing, reaches no projector weight; every rank has to, or the others wait.
        untouched = 0.0 * torch.stack([p.sum() for p in self.model.projector.parameters()]).sum()
        size = len(batch["keys"])
        share = rank_share(self.preparer.num_supervised(batch), self.device)
        if not size:
            return untouched
        loss, right = self._loss(batch)
        self.check_finite(loss, batch["keys"])
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log("train/token_accuracy", right, prog_bar=True, batch_size=size)
        self.log("train/dropped_turns", float(batch["dropped_turns"]), batch_size=size, reduce_fx="sum")
        log_learning_rate(self)
        return share * loss + untouched

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        size = len(batch["keys"])
        if not size:
            return
        loss, right = self._loss(batch)
        self.log("val/loss", loss, prog_bar=True, batch_size=size)
        self.log("val/token_accuracy", right, prog_bar=True, batch_size=size)

    def configure_optimizers(self) -> Any:
        return configure(self, self.optim)
