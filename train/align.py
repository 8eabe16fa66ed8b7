"""Stage 1: align projected pictures with captions by InfoNCE."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visplice.lm.extension import load_backbones
from visplice.lm.templates import template_for
from visplice.lm.vision_llama import VisionLlama
from visplice.projector.mlp import Projector, ProjectorConfig, rms
from visplice.train.data.prepare import AlignPreparer
from visplice.train.losses import info_nce, retrieval
from visplice.train.optim import FrozenBackbones, OptimConfig, configure, log_learning_rate
from visplice.vision.encoder import EncoderConfig

MAX_LOGIT_SCALE = math.log(100.0)


class Align(FrozenBackbones, L.LightningModule):
    """The projected CLS token against the mean embedding of the caption's tokens, symmetric, over the batch.

    The temperature is learned and its inverse clamped at 100 (CLIP). Only the projector is trained; at the end the
    scale that cosine leaves free is folded into its second layer, so that tokens are as long as text embeddings.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        lm: str,
        hidden: int = 1024,
        template: str | None = None,
        temperature: float = 0.07,
        subtract_mean: bool = True,
        optim: OptimConfig = OptimConfig(),
    ) -> None:
        """Builds the model from its frozen parts.

        Args:
            encoder: the vision transformer.
            lm: folder of the LLaMA, or 'embedded'.
            hidden: width inside the projector.
            template: how prompts are written, saved with the projector; None takes what the tokenizer shows.
            temperature: where the learned temperature starts.
            subtract_mean: take the batch mean off the caption embeddings; raw means share a large common vector.
            optim: learning rate and schedule.
        """
        super().__init__()
        self.lm_source, self.subtract_mean, self.optim = lm, subtract_mean, optim
        if not temperature > 0:
            raise ValueError(f"model.temperature is {temperature}; it is positive")
        vision, llama, tokenizer = load_backbones(encoder, lm)
        projector = Projector(ProjectorConfig(d_vision=vision.dim, d_lm=llama.config.dim, hidden=hidden))
        self.model = VisionLlama(vision, projector, llama, tokenizer, template_for(tokenizer, template))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.preparer = AlignPreparer(transform=vision.transform, tokenizer=tokenizer)
        projector.sentinels.requires_grad_(False)  # they take no part in this stage

    def pictures(self, pixels: Tensor) -> Tensor:
        """Projected CLS tokens `[B, D]`; of an encoder without CLS, the projected mean of the patches."""
        features = self.model.encoder(pixels)
        pooled = features[:, 0] if self.model.encoder.has_cls else features.mean(1)
        return self.model.projector(pooled)

    @torch.no_grad()
    def captions(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Mean token embeddings `[B, D]` of flat caption ids `[T]`."""
        return F.embedding_bag(ids, self.model.lm.tok_embeddings.weight, offsets, mode="mean")

    def _pair(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        text = self.captions(batch["captions"], batch["offsets"])
        if self.subtract_mean:
            text = text - text.mean(0)
        return self.pictures(batch["pixels"]), text

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        image, text = self._pair(batch)
        loss = info_nce(image, text, self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp())
        self.check_finite(loss, batch["keys"])
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/r@1", retrieval(image.detach(), text, 1), prog_bar=True)
        self.log("train/temperature", self.logit_scale.detach().neg().exp())
        log_learning_rate(self)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        image, text = self._pair(batch)
        size = len(image)
        self.log("val/loss", info_nce(image, text, self.logit_scale.exp()), batch_size=size, prog_bar=True)
        for k in (1, 5, 10):
            self.log(f"val/r@{k}", retrieval(image, text, k), batch_size=size, prog_bar=k == 1)

    def on_train_end(self) -> None:
        """Folds the scale in, on the pictures of one more batch."""
        pixels = next(iter(self.trainer.datamodule.train_dataloader()))["pixels"]  # type: ignore[attr-defined]
        features = self.model.features(pixels.to(self.device))
        self.model.projector.calibrate(features, rms(self.model.lm.tok_embeddings.weight))

    def configure_optimizers(self) -> Any:
        return configure(self, self.optim)
