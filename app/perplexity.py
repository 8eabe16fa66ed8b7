"""`visplice perplexity`: of the decoder on a text, and whether the extension has changed a bit of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visplice.lm.extension import Extension
    from visplice.train.scoring.perplexity import Result, Text

_WINDOW = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments behind the verb, but for those of a LLaVA and a device."""
    parser.description = (
        "Perplexity of the decoder on a text, in sliding windows. Of an extension it also runs the LLaMA without it "
        "and says whether all logits are the same to the bit. Exit status 1 when they should be and are not."
    )
    parser.add_argument(
        "--model", default="embedded", help="extension, LLaVA or LLaMA folder (default: the shipped small model)"
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; of FILE.jsonl the field 'text' of a line")
    parser.add_argument(
        "--window", type=int, metavar="N", help=f"tokens that are seen at once (default: {_WINDOW}, or what fits)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (default: half a window)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing rounded")


def main(options: argparse.Namespace) -> int:
    """Runs it; returns the exit status: 1 where a frozen decoder has other logits than without the extension."""
    import json

    from visplice.app.named import extension_named
    from visplice.lm.tuned import LM, LM_LORA
    from visplice.train.scoring.perplexity import perplexity_report, perplexity_text, read_text

    text = read_text(options.text)
    extension = extension_named(options.model, options.vision_tower, options.model_base)
    if extension is None:
        result, without = _bare(options, options.model, text), None
    else:
        without = _bare(options, _named_decoder(extension), text)  # and let go of before the next is loaded
        result = _with_extension(options, text)
    tuned = [part for part in (LM, LM_LORA) if extension is not None and part in extension.trained]
    told: dict[str, Any] = {"model": options.model} | perplexity_report(text, result, without, tuned=tuned)
    told |= {"dtype": options.dtype, "device": options.device}
    print(json.dumps(told, indent=2) if options.json else perplexity_text(told))
    return int(bool(told.get("num_different_logits")) and not tuned)


def _named_decoder(extension: Extension) -> str:
    """What the extension was trained on; beside `visplice.json` there may lie one that was trained with it."""
    import json

    from visplice.lm.tuned import LM

    if LM in extension.trained:
        return str(json.loads(extension.file.read_text())["lm"])
    return extension.lm


def _bare(options: argparse.Namespace, lm: str, text: Text) -> Result:
    from visplice.app.device import pick_device, pick_dtype
    from visplice.app.named import load_bare
    from visplice.train.scoring.perplexity import measure_text

    bare = load_bare(lm, device=pick_device(options.device), dtype=pick_dtype(options.dtype))
    window, stride = _windows(options, bare.lm.config.context_length)
    return measure_text(bare.lm, bare.tokenizer, text, window=window, stride=stride)


def _with_extension(options: argparse.Namespace, text: Text) -> Result:
    import torch

    from visplice.app.device import pick_device, pick_dtype
    from visplice.lm.extension import load_extension
    from visplice.train.scoring.perplexity import measure_text

    model = load_extension(
        options.model,
        device=pick_device(options.device),
        dtype=pick_dtype(options.dtype),
        vision_tower=options.vision_tower,
        model_base=options.model_base,
    )
    window, stride = _windows(options, model.lm.config.context_length)
    no_pictures = torch.zeros(0, model.visual.count, model.encoder.dim, device=model.device)
    return measure_text(
        model.lm,
        model.tokenizer,
        text,
        window=window,
        stride=stride,
        embed=lambda ids: model.embed(ids, no_pictures),  # through projector and splice, as with pictures
    )


def _windows(options: argparse.Namespace, context_length: int) -> tuple[int, int]:
    window = min(_WINDOW, context_length) if options.window is None else options.window
    return window, max(1, window // 2) if options.stride is None else options.stride
