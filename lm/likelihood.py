"""How likely a decoder finds text: negative log-likelihoods of sliding windows, and of several ways to go on.

Logits are made for a few rows at a time and never kept: of 4,096 positions and 128 K ids they would be 2 GB.

Shape letters: S positions, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visplice.lm.decoder import Llama
from visplice.lm.masks import Packed

_MAX_LOGITS = 1 << 24  # numbers that are made at once


@dataclass(frozen=True, kw_only=True)
class Window:
    """A piece of a document that the decoder sees at once, and where in it the tokens begin that count."""

    begin: int
    end: int
    first: int  # of the tokens that are predicted here; those before it are context


def windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows of up to `window` tokens, each `stride` behind the last, in which every token but the first counts once.

    So does transformers' page on perplexity. A token has at least `window - stride` tokens before it, but at the start
    of the document.

    Raises:
        ValueError: the windows would leave tokens out or leave one without a token before it.
    """
    if not 1 <= stride < window:
        raise ValueError(
            f"--stride is {stride} and --window {window}; a stride is at least 1 and less than the window, so that "
            "every token has one before it"
        )
    first = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        if first < end:
            yield Window(begin=begin, end=end, first=first)
        first = end
        if end == num_tokens:
            return


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one token after another: how likely it was, and a checksum of the logits that say so."""

    log_probabilities: Tensor  # float32 [S], natural logarithms, on the CPU
    checksums: Tensor  # int64 [S], of all bits of the V logits


@torch.inference_mode()
def measure(
    lm: Llama,
    ids: Sequence[int],
    *,
    window: int,
    stride: int,
    embed: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Measured:
    """Log-probabilities of `ids[1:]`, each given what stands before it in its window.

    Args:
        lm: the decoder.
        ids: one document.
        window, stride: as for `windows`.
        embed: embeddings `[1, S, D]` of ids `[1, S]`; None is the decoder's table.
        progress: told the number of tokens of each window that is done.
    Raises:
        ValueError: the window is longer than the decoder was made for, or as for `windows`.
    """
    if window > lm.config.context_length:
        raise ValueError(f"--window is {window}, but the model has {lm.config.context_length} positions")
    found: list[tuple[Tensor, Tensor]] = []
    for piece in windows(len(ids), window, stride):
        own = torch.tensor([ids[piece.begin : piece.end]], device=lm.device)
        hidden = lm.hidden((embed or lm.tok_embeddings)(own))[0]
        start = piece.first - piece.begin
        found.append(_of_rows(lm, hidden[start - 1 : -1], own[0, start:]))
        if progress is not None:
            progress(piece.end - piece.first)
    if not found:
        return Measured(log_probabilities=torch.zeros(0), checksums=torch.zeros(0, dtype=torch.int64))
    log_probabilities, checksums = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return Measured(log_probabilities=log_probabilities, checksums=checksums)


def _of_rows(lm: Llama, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and checksums `[S]` of targets `[S]` behind rows `[S, D]` of the stream."""
    size = max(1, _MAX_LOGITS // lm.config.vocab_size)
    found = []
    for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = lm.logits(rows)
        found.append((log_probabilities(logits, wanted), checksums(logits)))
    first, second = (torch.cat(parts) for parts in zip(*found, strict=True))
    return first, second


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities, float32 `[S]`, of targets `[S]` under logits `[S, V]`."""
    return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def checksums(logits: Tensor) -> Tensor:
    """A number, int64 `[S]`, of all the bits in each row of logits `[S, V]`.

    A weighted sum modulo 2 ** 64 with odd weights: one differing logit always shows, and several hide each other once
    in about 2 ** 63.
    """
    bits = logits.contiguous().view(torch.int16 if logits.element_size() == 2 else torch.int32).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, bits.shape[-1:], generator=generator).to(bits.device) * 2 + 1
    return bits.mul_(weights).sum(-1)


@torch.inference_mode()
def choice_log_probabilities(lm: Llama, prefix: Tensor, choices: Sequence[Sequence[int]]) -> list[float]:
    """The log-probability of each choice's ids behind the same prefix, which is computed once.

    Choices stand one behind the other in one row as branches that do not see each other.

    Args:
        lm: the decoder.
        prefix: embeddings `[S, D]`, perhaps with pictures in them.
        choices: ids, at least one each.
    Raises:
        ValueError: prefix and choice do not fit into the decoder's positions.
        FloatingPointError: a likelihood is no finite number.
    """
    assert len(prefix) and all(choices), "a prefix and choices of one token at least"
    shared, longest = len(prefix), max(map(len, choices))
    if shared + longest > lm.config.context_length:
        raise ValueError(
            f"the prompt has {shared} tokens and the longest choice {longest}, but the model has "
            f"{lm.config.context_length} positions"
        )
    # Nothing is predicted from the last token of a choice, so it is not put in.
    lengths = [len(choice) - 1 for choice in choices]
    inside = [token for choice in choices for token in choice[:-1]]
    branches = [0] * shared + [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    positions = [*range(shared)] + [shared + step for length in lengths for step in range(length)]
    rows = [torch.tensor([row], device=lm.device) for row in ([0] * len(branches), branches, positions)]
    packed = Packed(*rows)
    embeddings = torch.cat([prefix, lm.tok_embeddings(torch.tensor(inside, dtype=torch.int64, device=lm.device))])
    # Written out: blocks for FlexAttention are compiled anew for every length.
    mask = packed.dense() if inside else None
    hidden = lm.hidden(embeddings[None], positions=packed.positions if inside else None, mask=mask)[0]
    begins = [shared + sum(lengths[:number]) for number in range(len(choices))]
    wanted = [
        row
        for begin, length in zip(begins, lengths, strict=True)
        for row in (shared - 1, *range(begin, begin + length))
    ]
    targets = torch.tensor([token for choice in choices for token in choice], device=lm.device)
    size = max(1, _MAX_LOGITS // lm.config.vocab_size)
    kept = hidden[torch.tensor(wanted, device=lm.device)]
    each = torch.cat(
        [log_probabilities(lm.logits(r), t) for r, t in zip(kept.split(size), targets.split(size), strict=True)]
    )
    if not each.isfinite().all():
        raise FloatingPointError(
            f"a choice has a likelihood that is no finite number in {lm.dtype}; try another --dtype"
        )
    return [float(part.double().sum()) for part in each.cpu().split([len(choice) for choice in choices])]
