"""Perplexity of a decoder on a text, per token, and in bits per byte, which models of other vocabularies can share.

A document begins with the tokenizer's begin token where it has one; that one is never predicted. Without one, the
first token of a document has nothing before it and does not count, nor do its bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from visplice.lm.decoder import Llama
from visplice.lm.likelihood import measure
from visplice.lm.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Text:
    """The documents of a file."""

    path: str
    sha256: str
    documents: list[str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One decoder on a text."""

    log_probability: float  # of all predicted tokens together
    num_tokens: int
    num_bytes: int  # that the predicted tokens spell
    begin_token: str | None  # that every document was given
    window: int
    stride: int
    checksums: Tensor  # int64 [num_tokens], of the logits of each

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_probability / self.num_tokens)

    @property
    def bits_per_byte(self) -> float:
        return -self.log_probability / math.log(2) / self.num_bytes


def read_text(path: str) -> Text:
    """A UTF-8 file as one document, or the field 'text' of each line of a `.jsonl` file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8, a line has no text, or there is no text at all.
    """
    content = Path(path).read_bytes()
    try:
        whole = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is no text in UTF-8 ({error})") from error
    documents = _lines(whole, path) if Path(path).suffix == ".jsonl" else [whole]
    if not any(documents):
        raise ValueError(f"{path}: there is no text in it")
    return Text(path=path, sha256=hashlib.sha256(content).hexdigest(), documents=documents)


def _lines(whole: str, path: str) -> list[str]:
    documents = []
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number}: this is no JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"{path}: line {number}: field 'text' is missing or no text, expected one document a line")
        documents.append(row["text"])
    return documents


def measure_text(
    lm: Llama,
    tokenizer: Tokenizer,
    text: Text,
    *,
    window: int,
    stride: int,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> Result:
    """Runs a decoder over every document; arguments as for `visplice.lm.likelihood.measure`.

    Raises:
        ValueError: no document has a token to predict, or window and stride make no sense.
        FloatingPointError: a logit is not finite.
    """
    ids, num_bytes = zip(*(_encoded(tokenizer, document) for document in text.documents), strict=True)
    expected = sum(max(0, len(row) - 1) for row in ids)
    if not expected:
        raise ValueError(f"{text.path}: no document has two tokens, so there is none to predict")
    with tqdm(total=expected, desc="reading", unit=" tokens", disable=None) as bar:
        found = [measure(lm, row, window=window, stride=stride, embed=embed, progress=bar.update) for row in ids]
    log_probabilities = torch.cat([one.log_probabilities for one in found]).double()
    total = float(log_probabilities.sum())
    if not math.isfinite(total):
        lost = int((~log_probabilities.isfinite()).sum())
        raise FloatingPointError(
            f"{lost} of {expected} tokens have a likelihood that is no finite number in {lm.dtype}; try another --dtype"
        )
    assert len(log_probabilities) == expected
    return Result(
        log_probability=total,
        num_tokens=expected,
        num_bytes=sum(num_bytes),
        begin_token=next((name for name, i in tokenizer.controls.items() if i == tokenizer.bos_id), None),
        window=window,
        stride=stride,
        checksums=torch.cat([one.checksums for one in found]),
    )


def _encoded(tokenizer: Tokenizer, document: str) -> tuple[list[int], int]:
    """Ids of a document with what it begins with, and the bytes of what is predicted."""
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *tokenizer.encode(document)], _num_bytes(document)
    ids, starts = tokenizer.encode_with_starts(document)
    return ids, _num_bytes(document[starts[1] :]) if len(ids) > 1 else 0


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def perplexity_report(
    text: Text, result: Result, without: Result | None = None, *, tuned: Sequence[str] = ()
) -> dict[str, Any]:
    """What `--json` prints.

    Args:
        without: the same text without the extension.
        tuned: what of the decoder was trained with it, so that its logits may differ.
    """
    told: dict[str, Any] = {
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "log_probability": result.log_probability,
        "num_documents": len(text.documents),
        "num_tokens": result.num_tokens,
        "num_bytes": result.num_bytes,
        "begin_token": result.begin_token,
        "window": result.window,
        "stride": result.stride,
    }
    if without is not None:
        told["without_extension"] = {"perplexity": without.perplexity, "bits_per_byte": without.bits_per_byte}
        told["num_different_logits"] = int((result.checksums != without.checksums).sum())
        told["trained_of_decoder"] = list(tuned)
    told["text"] = {"path": text.path, "sha256": text.sha256}
    packages = ("visplice", "torch", "tokenizers")
    told["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return told


def perplexity_text(told: Mapping[str, Any]) -> str:
    """The same for a person."""
    documents = told["num_documents"]
    begin = told["begin_token"]
    lines = [
        f"perplexity {told['perplexity']:.4f}, {told['bits_per_byte']:.4f} bits per byte, on {told['num_tokens']:,} "
        f"tokens of {told['num_bytes']:,} bytes in {documents:,} document{'' if documents == 1 else 's'}",
        f"windows of up to {told['window']:,} tokens, {told['stride']:,} apart: past the first window of a document, "
        f"at least {told['window'] - told['stride']:,} tokens of context",
        f"a document begins with {begin}, which is not predicted"
        if begin
        else "the tokenizer has no begin token, so the first token of a document is not predicted",
    ]
    if (same := _with_and_without(told)) is not None:
        lines.append(same)
    return "\n".join([*lines, f"text: {told['text']['path']}, sha256 {told['text']['sha256']}"])


def _with_and_without(told: Mapping[str, Any]) -> str | None:
    if "without_extension" not in told:
        return None
    num_tokens, different = told["num_tokens"], told["num_different_logits"]
    if not different:
        return f"with and without the extension: bit-identical logits on {num_tokens:,} tokens"
    trained = told["trained_of_decoder"]
    why = f"{' and '.join(trained)} changes the decoder" if trained else "and nothing of the decoder was trained"
    return (
        f"with and without the extension: perplexity {told['perplexity']:.4f} and "
        f"{told['without_extension']['perplexity']:.4f}, logits differ on {different:,} of {num_tokens:,} tokens; {why}"
    )
