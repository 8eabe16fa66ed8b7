"""`visplice import`: a LLaMA from any of its layouts to a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from visplice.app.device import pick_dtype
from visplice.app.memory import size_text
from visplice.lm.checkpoint import Checkpoint, open_checkpoint, write_llama
from visplice.lm.config import family_of
from visplice.lm.tokenizer import Tokenizer

# What a tokenizer and its use are described by; `original/` is where Hugging Face puts Meta's own files.
_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)


def main(args: argparse.Namespace) -> int:
    """Writes `--out` whole or not at all; returns the exit status."""
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is {'not empty' if out.is_dir() else 'a file'}; give a new or an empty folder")
    checkpoint = open_checkpoint(args.source, text_layers_only=args.text_layers_only, ignore_fields=args.ignore_field)
    dtype = pick_dtype(args.dtype) if args.dtype else checkpoint.dtype
    tokenizer = _tokenizer_folder(checkpoint.folder)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, checkpoint)
    try:
        _write(checkpoint, out, dtype)
        for file in [tokenizer / name for name in _COPIED] if tokenizer else ():
            if file.is_file():
                shutil.copyfile(file, out / file.name)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # an interrupted import leaves nothing that could be taken for whole
        raise
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(
        f"{out}: {family_of(checkpoint.config) or 'a LLaMA of its own shape'}, "
        f"{checkpoint.config.num_parameters:,} parameters, {str(dtype).removeprefix('torch.')}, {size_text(written)}"
    )
    for what in checkpoint.told_left_out:
        print(f"left out: {what}")
    if tokenizer is None:
        print(f"no tokenizer in {checkpoint.folder}; put tokenizer.json or tokenizer.model into {out}")
    return 0


def _tokenizer_folder(folder: Path) -> Path | None:
    places = (folder, folder / "original", folder.parent)
    return next((p for p in places if any((p / name).is_file() for name in _COPIED[:2])), None)


def _check_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    found, rows = Tokenizer.from_pretrained(folder).vocab_size, checkpoint.config.vocab_size
    if found > rows:
        raise ValueError(f"{folder}: the tokenizer has {found} ids, the embedding table only {rows} rows")


def _write(checkpoint: Checkpoint, out: Path, dtype: torch.dtype) -> None:
    source = {name: (entry, part) for entry in checkpoint.entries for part, name in enumerate(entry.weights)}
    with tqdm(total=len(source), desc="importing", unit="tensor") as bar:

        def weight(name: str) -> Tensor:
            entry, part = source[name]
            bar.update()
            return checkpoint.read(entry, dtype=dtype)[part]

        write_llama(checkpoint.config, weight, out, dtype=dtype)
