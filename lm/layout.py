"""What the checkpoint layouts have in common: which stored tensors become which weights, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _as_it_is(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored tensor, the weights that it holds, and how it is taken apart and put together."""

    stored: str
    weights: tuple[str, ...]  # names in `Llama.state_dict()`
    read: Callable[[Tensor], Sequence[Tensor]] = _as_it_is  # stored -> weights
    write: Callable[..., Tensor] = _itself  # weights -> stored


def to_half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key matrix `[H d, D]` from interleaved rotary pairs `(2i, 2i + 1)` to `(i, i + d/2)`."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """The way back."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turned(stored: str, weight: str, num_heads: int) -> Entry:
    """A query or key matrix that is stored with interleaved pairs."""
    return Entry(
        stored=stored,
        weights=(weight,),
        read=lambda tensor: (to_half_split(tensor, num_heads),),
        write=lambda tensor: to_interleaved(tensor, num_heads),
    )


def plain(stored: str, weight: str) -> Entry:
    """A tensor that is stored as it is used."""
    return Entry(stored=stored, weights=(weight,))


def side_by_side(stored: str, weights: tuple[str, ...], dim: int) -> Entry:
    """Weights of one shape that are stored as one tensor, next to each other along `dim`."""
    return Entry(
        stored=stored,
        weights=weights,
        read=lambda tensor: tensor.chunk(len(weights), dim),
        write=lambda *parts: torch.cat(parts, dim),
    )


def first_rows(stored: str, weight: str, rows: int) -> Entry:
    """A table that is stored with more rows than are used."""
    return Entry(stored=stored, weights=(weight,), read=lambda tensor: (tensor[:rows],))
