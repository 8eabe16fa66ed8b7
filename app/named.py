"""What `--model` names: an extension, a LLaVA, or a LLaMA alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from visplice.lm.checkpoint import load_llama
from visplice.lm.decoder import Llama
from visplice.lm.extension import EMBEDDED, Extension, embedded_folder, lm_folder, load_tokenizer, read_extension
from visplice.lm.hub import resolve
from visplice.lm.llava import llava_in
from visplice.lm.tokenizer import Tokenizer


def extension_named(model: str, vision_tower: str | None = None, model_base: str | None = None) -> Extension | None:
    """The extension or the LLaVA of that name, read but not loaded; None for any other folder or name.

    Raises:
        ValueError: it is broken, or a part of a LLaVA is given for what is none.
    """
    folder = embedded_folder("projector") if model == EMBEDDED else Path(model)
    if (folder / "visplice.json").is_file():
        return read_extension(model, vision_tower=vision_tower, model_base=model_base)
    return llava_in(folder, vision_tower=vision_tower, model_base=model_base)


@dataclass(frozen=True, kw_only=True)
class BareLlama:
    """A decoder and its tokenizer, without eyes."""

    lm: Llama
    tokenizer: Tokenizer


def load_bare(lm: str, *, device: torch.device, dtype: torch.dtype) -> BareLlama:
    """The decoder of that name: a folder, a hub name, or 'embedded'.

    Raises:
        ValueError: there is none, or it has no tokenizer.
    """
    folder = resolve(lm_folder(lm))
    llama = load_llama(folder, dtype=dtype, device=device, text_layers_only=True)
    return BareLlama(lm=llama, tokenizer=load_tokenizer(folder, llama.config.vocab_size))
