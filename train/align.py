"""Stage 1: align projected pictures with captions by InfoNCE, from pictures and text or from cached features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visplice.lm.extension import load_backbones, write_extension
from visplice.lm.templates import template_for
from visplice.lm.vision_llama import VisionLlama
from visplice.projector.mlp import Projector, ProjectorConfig, rms
from visplice.train.data.prepare import AlignPreparer, normalised
from visplice.train.features.features import FeaturePreparer, FeatureSet
from visplice.train.features.frozen import refuse_other_encoder, refuse_other_lm
from visplice.train.losses import info_nce, rank_share, retrieval
from visplice.train.optim import FrozenBackbones, OptimConfig, configure, log_learning_rate
from visplice.vision.encoder import EncoderConfig

MAX_LOGIT_SCALE = math.log(100.0)


class ProjectorAlone(nn.Module):
    """What is left of the model where its frozen parts are features on disk."""

    def __init__(self, projector: Projector) -> None:
        super().__init__()
        self.projector = projector


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
        features: str | None = None,
    ) -> None:
        """Builds the model from its frozen parts, or the projector alone for features that were made with them.

        Args:
            encoder: the vision transformer.
            lm: folder of the LLaMA, or 'embedded'.
            hidden: width inside the projector.
            template: how prompts are written, saved with the projector; None takes what the tokenizer shows.
            temperature: where the learned temperature starts.
            subtract_mean: take the batch mean off the caption embeddings; raw means share a large common vector.
            optim: learning rate and schedule.
            features: folder that `visplice data encode` wrote; then neither encoder nor LLaMA is loaded, and both have
                to be those of the features.
        """
        super().__init__()
        self.lm_source, self.subtract_mean, self.optim = lm, subtract_mean, optim
        if not temperature > 0:
            raise ValueError(f"model.temperature is {temperature}; it is positive")
        self.features = FeatureSet(features) if features is not None else None
        self.model: VisionLlama | ProjectorAlone
        if self.features is not None:
            made_with = self.features.made_with
            refuse_other_encoder(made_with, encoder, self.features.path)
            refuse_other_lm(made_with, lm, self.features.path)
            self._encoder, self._template = encoder, template_for(self.features, template).name
            d_vision, d_lm = made_with["d_vision"], made_with["d_lm"]
            self.model = ProjectorAlone(Projector(ProjectorConfig(d_vision=d_vision, d_lm=d_lm, hidden=hidden)))
            self.preparer: Any = FeaturePreparer(d_vision=d_vision, d_lm=d_lm)
        else:
            vision, llama, tokenizer = load_backbones(encoder, lm)
            projector = Projector(ProjectorConfig(d_vision=vision.dim, d_lm=llama.config.dim, hidden=hidden))
            self.model = VisionLlama(vision, projector, llama, tokenizer, template_for(tokenizer, template))
            self.preparer = AlignPreparer(transform=vision.transform, tokenizer=tokenizer)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.model.projector.sentinels.requires_grad_(False)  # they take no part in this stage

    def pictures(self, pixels: Tensor) -> Tensor:
        """Projected CLS tokens `[B, D]`; of an encoder without CLS, the projected mean of the patches."""
        encoder = self._whole.encoder
        return self.model.projector(encoder.pooled(encoder(normalised(pixels, encoder.transform))))

    @torch.no_grad()
    def captions(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Mean token embeddings `[B, D]` of flat caption ids `[T]`."""
        return F.embedding_bag(ids, self._whole.lm.tok_embeddings.weight, offsets, mode="mean")

    @property
    def _whole(self) -> VisionLlama:
        assert isinstance(self.model, VisionLlama)
        return self.model

    def _pair(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Projected pictures and the embeddings of their captions, `[B, D]` each."""
        if self.features is not None:
            image, text = self.model.projector(batch["cls"].float()), batch["text"].float()
        else:
            image, text = self.pictures(batch["pixels"]), self.captions(batch["captions"], batch["offsets"])
        return image, text - text.mean(0) if self.subtract_mean else text

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        log_learning_rate(self)
        pairs = len(batch["keys"])
        share = rank_share(pairs if pairs > 1 else 0, self.device)  # one pair has no negatives
        if pairs < 2:  # yet every rank has to reach every weight, or the others wait for it
            return 0.0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
        image, text = self._pair(batch)
        loss = info_nce(image, text, self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp())
        self.check_finite(loss, batch["keys"])
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/r@1", retrieval(image.detach(), text, 1), prog_bar=True)
        self.log("train/temperature", self.logit_scale.detach().neg().exp())
        return share * loss

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        size = len(batch["keys"])
        if not size:
            return
        image, text = self._pair(batch)
        self.log("val/loss", info_nce(image, text, self.logit_scale.exp()), batch_size=size, prog_bar=True)
        for k in (1, 5, 10):
            self.log(f"val/r@{k}", retrieval(image, text, k), batch_size=size, prog_bar=k == 1)

    def on_train_end(self) -> None:
        """Folds the scale in, on a few pictures."""
        if self.features is not None:
            visual, target = self.features.scale_sample().to(self.device).float(), self.features.made_with["rms"]
        else:
            pixels = self.trainer.datamodule.peek()["pixels"].to(self.device)  # type: ignore[attr-defined]
            visual = self._whole.features(normalised(pixels, self._whole.encoder.transform))
            target = rms(self._whole.lm.tok_embeddings.weight)
        self.model.projector.calibrate(visual, target)

    def save(self, folder: str | Path) -> None:
        """Writes the extension folder; where the features came from is known from them."""
        if self.features is None:
            return super().save(folder)
        fingerprints = {name: self.features.made_with["fingerprint"][name] for name in ("encoder", "lm")}
        write_extension(
            folder,
            self.model.projector,
            encoder=self._encoder,
            lm=self.lm_source,
            template=self._template,
            fingerprints=fingerprints,
        )

    def configure_optimizers(self) -> Any:
        return configure(self, self.optim)
