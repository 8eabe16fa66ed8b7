"""`visplice inspect`: what a model folder really is, and what a prompt with a picture really becomes."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from visplice.app.memory import main_memory, size_text
from visplice.app.named import extension_named
from visplice.lm.checkpoint import Checkpoint, open_checkpoint
from visplice.lm.config import LlamaConfig, family_of
from visplice.lm.extension import Extension, lm_folder
from visplice.lm.llava import LlavaExtension
from visplice.lm.prompt import IGNORE, PromptBuilder, VisualTokens
from visplice.lm.templates import template_for
from visplice.lm.tokenizer import Tokenizer
from visplice.lm.vision_llama import user_message
from visplice.vision.encoder import EncoderConfig, VisionEncoder
from visplice.vision.image import open_image
from visplice.vision.known import arithmetic

_DTYPES = {"float32": 4, "bfloat16": 2}


def main(args: argparse.Namespace) -> int:
    """Prints the tables; returns the exit status."""
    if args.question is None and (args.image or args.answer or args.template):
        raise ValueError(
            "--image, --answer and --template show a prompt, and a prompt needs a question behind the model"
        )
    extension = extension_named(args.model, args.vision_tower, args.model_base)
    if args.yaml:
        print(training_yaml(extension, args.model), end="")
        return 0
    source = lm_folder(extension.lm) if extension else args.model
    checkpoint = open_checkpoint(source, text_layers_only=args.text_layers_only, ignore_fields=args.ignore_field)
    tokenizer, missing = _tokenizer(checkpoint.folder)
    encoder = _encoder(extension.encoder) if extension else None
    if args.question is None:
        rows = [*_llama_rows(checkpoint, extension), *_tokenizer_rows(tokenizer, missing, extension)]
        rows += _extension_rows(extension, encoder) if extension and encoder else []
        _print_rows([*rows, ("", ""), *_memory_rows(checkpoint.config)])
        return 0
    if tokenizer is None:
        raise ValueError(missing)
    for file in args.image:
        open_image(file)
    template = template_for(tokenizer, args.template or (extension.template if extension else None))
    visual = VisualTokens(
        vocab_size=checkpoint.config.vocab_size,
        count=encoder.num_tokens if encoder else args.visual_tokens,
        sentinels=extension is None or extension.projector.sentinels,
    )
    messages: list[dict[str, Any]] = [user_message(args.question, args.image)]
    if args.answer is not None:
        messages.append({"role": "assistant", "content": args.answer})
    prompt = PromptBuilder(tokenizer, template, visual).build(messages, add_generation_prompt=args.answer is None)
    print("\n".join(prompt_table(prompt.ids, prompt.labels, tokenizer, visual, num_patches=_patches(encoder, visual))))
    return 0


def _patches(encoder: VisionEncoder | None, visual: VisualTokens) -> int:
    """Patches among a picture's visual tokens; without an encoder, all if they make a square, else all but a CLS."""
    if encoder is not None:
        return encoder.num_patches
    return visual.count - (math.isqrt(visual.count) ** 2 != visual.count)


def prompt_table(
    ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer, visual: VisualTokens, *, num_patches: int
) -> list[str]:
    """Lines of position, id, text, image patch and label for a spliced sequence.

    A patch is its number in the picture with row and column, counted from 0; a dot is a position without a label.
    """
    controls = {token: name for name, token in tokenizer.controls.items()}
    side, lines, image, patch = math.isqrt(num_patches), [], 0, num_patches
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        text, where = "", ""
        if token == visual.start:
            text, image, patch = "[VIS_START]", image + 1, num_patches - visual.count
        elif token == visual.end:
            text = "[VIS_END]"
        elif token == visual.patch:
            if patch == num_patches:  # without sentinels, the next picture begins here
                image, patch = image + 1, num_patches - visual.count
            where = f"{image}: CLS" if patch < 0 else f"{image}: {patch}"
            if patch >= 0 and side * side == num_patches:
                where += f" ({patch // side}, {patch % side})"
            patch += 1
        else:
            text = controls.get(token) or repr(tokenizer.decode([token]))
        marked = "." if label == IGNORE else str(label)
        lines.append(f"{position:>8}  {token:>7}  {text:<24}  {where:<18}  {marked:>7}")
    return [f"{'position':>8}  {'id':>7}  {'text':<24}  {'image patch':<18}  {'label':>7}", *lines]


def training_yaml(extension: Extension | None, model: str) -> str:
    """The part of a stage 2 config that goes on from an extension or a LLaVA.

    Raises:
        ValueError: the folder is neither.
    """
    if extension is None:
        raise ValueError(f"--yaml shows how to train on an extension or a LLaVA folder, and {model} is neither")
    encoder = {**extension.encoder.to_dict(), "weights": _absolute(extension.encoder.weights)}
    parts = {"lm": _absolute(extension.lm), "aligned": _absolute(str(extension.folder)), "template": extension.template}
    return yaml.safe_dump({"model": parts | {"encoder": encoder}}, sort_keys=False)


def _absolute(name: str | None) -> str | None:
    """A path that means the same in every working directory; names as they are."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name


def _encoder(config: EncoderConfig) -> VisionEncoder:
    with torch.device("meta"):  # its shape is enough
        return VisionEncoder(replace(config, weights=None))


def _tokenizer(folder: Path) -> tuple[Tokenizer | None, str]:
    try:
        return Tokenizer.from_pretrained(folder), ""
    except ValueError as error:
        return None, str(error)


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        print(f"{label:{width}}{value}".rstrip())


def _llama_rows(checkpoint: Checkpoint, extension: Extension | None) -> list[tuple[str, str]]:
    config = checkpoint.config
    dtypes = Counter(checkpoint.store.dtype(entry.stored) for entry in checkpoint.entries)
    kinds = ", ".join(f"{str(dtype).removeprefix('torch.')}" for dtype, _ in dtypes.most_common())
    heads = f"{config.num_heads} query heads, {config.num_kv_heads} key-value heads of {config.head_dim}"
    experts = (
        f", {config.num_experts} experts in {len(config.moe_layers)} layers, {config.experts_per_token} a token"
        if config.num_experts
        else ""
    )
    rope = config.rope.kind if config.rope.kind == "default" else f"{config.rope.kind} by {config.rope.factor:g}"
    return [
        ("folder", str(checkpoint.store.folder)),
        ("family", family_of(config) or "a LLaMA, of no published shape"),
        ("parameters", f"{config.num_parameters:,}"),
        ("stored as", f"{kinds}, {len(checkpoint.entries)} tensors"),
        ("shape", f"{config.num_layers} layers, {config.dim} wide, feed-forward {config.ffn_dim}, {heads}{experts}"),
        ("context", f"{config.context_length:,} positions, rotary base {config.rope_theta:,.0f}, stretch {rope}"),
        ("vocabulary", f"{config.vocab_size:,} rows{', head tied to them' if config.tie_embeddings else ''}"),
        # Of a LLaVA, the rest follows below.
        *(("left out", what) for what in checkpoint.told_left_out if extension is None),
    ]


def _tokenizer_rows(tokenizer: Tokenizer | None, missing: str, extension: Extension | None) -> list[tuple[str, str]]:
    if tokenizer is None:
        return [("tokenizer", f"none: {missing}")]
    rows = [("tokenizer", f"{tokenizer.vocab_size:,} ids, {len(tokenizer.controls)} control tokens")]
    try:
        template = extension.template if extension else template_for(tokenizer).name
    except ValueError as error:
        template = str(error)
    return [*rows, ("template", template)]


def _extension_rows(extension: Extension, encoder: VisionEncoder) -> list[tuple[str, str]]:
    projector = extension.projector
    widths = projector.d_vision, projector.hidden, projector.d_lm
    size = encoder.config.image_size
    around = "and the two sentinels" if projector.sentinels else "without sentinels, in place of <image>"
    kind = f"LLaVA-1.5, as {extension.kind} writes it" if isinstance(extension, LlavaExtension) else "extension"
    return [
        ("", ""),
        ("kind", kind),
        ("encoder", f"{encoder.config.model}, {size} pixels, resize {encoder.config.resize}"),
        ("its weights", str(extension.encoder.weights)),
        ("features", _features(encoder)),
        ("projector", " -> ".join(map(str, widths))),
        ("visual tokens", f"{encoder.num_tokens} a picture, {around}"),
    ]


def _features(encoder: VisionEncoder) -> str:
    config, facts = encoder.config, arithmetic(encoder.vit)
    side = math.isqrt(encoder.num_patches)
    grid = f"{side} x {side} patches of {encoder.dim} values, layer {config.layer}, {facts['activation']}"
    return f"CLS and {grid}" if encoder.has_cls else f"{grid}; no CLS, so stage 1 aligns the mean of the patches"


def _memory_rows(config: LlamaConfig) -> list[tuple[str, str]]:
    """What weights and cache need, and what every device has."""
    assert config.head_dim is not None
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # numbers per position
    rows = [
        (
            f"in {name}",
            f"{size_text(config.num_parameters * size)} of weights, "
            f"{size_text(1000 * cached * size)} of cache for 1,000 positions",
        )
        for name, size in _DTYPES.items()
    ]
    main = main_memory()
    devices = [("cpu", main[0])] if main else []
    if torch.cuda.is_available():
        devices += [
            (f"cuda:{i} {torch.cuda.get_device_name(i)}", torch.cuda.mem_get_info(i)[0])
            for i in range(torch.cuda.device_count())
        ]
    for name, free in devices:
        fits = [dtype for dtype, size in _DTYPES.items() if config.num_parameters * size < free]
        rows.append((name, f"{size_text(free)} free: {f'fits in {fits[0]}' if fits else 'does not fit'}"))
    return rows
