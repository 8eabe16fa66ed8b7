"""Who may look at whom: boolean masks `[B, 1, S, T]`, true where query s may look at position t."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(lengths: Tensor, width: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Positions `[B, S]` and mask `[B, 1, S, T]` of a batch padded on the left to `width` = S in a cache of `capacity`.

    Padding rows look at themselves: a row of a softmax without any key is not a number.
    """
    slots = torch.arange(capacity, device=lengths.device)
    padding = (width - lengths)[:, None]  # [B, 1]
    real, causal = slots >= padding, slots <= slots[:width, None]  # [B, T], [S, T]
    mask = real[:, None, :] & causal | (slots == slots[:width, None])
    return (slots[:width] - padding).clamp(min=0), mask[:, None]


def documents(lengths: Sequence[int], *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Positions `[1, S]` and mask `[1, 1, S, S]` of documents packed one behind the other.

    Every document counts its positions from 0 and sees itself alone, so its logits are those it has by itself.

    Raises:
        ValueError: a document without a token.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"documents of {list(lengths)} tokens; every document has at least one")
    sizes = torch.tensor(lengths, device=device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)  # [S]
    steps = torch.arange(len(owner), device=device)
    positions = steps - (sizes.cumsum(0) - sizes)[owner]
    mask = (owner[:, None] == owner) & (steps[:, None] >= steps)
    return positions[None], mask[None, None]
