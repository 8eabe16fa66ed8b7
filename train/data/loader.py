"""Batches for training, from data sets of any size, in an order that does not depend on how many processes read.

The position is one number, the batches handed out so far: with it in a checkpoint, a resumed run sees what was left, in
the same order. Workers are sent addresses and give back prepared batches, together with the samples that they had to
leave out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from visplice.train.data.order import Address, Order
from visplice.train.data.remote import Prefetcher
from visplice.train.data.samples import Preparer, Samples, SkippedSamples, Source, delivered, loader_options


class _Batches:
    """The sampler: addresses of batch after batch."""

    def __init__(self, order: Order, positions: Iterator[int] | range) -> None:
        self._order, self._positions = order, positions

    def __iter__(self) -> Iterator[list[Address]]:
        return map(self._order.batch, self._positions)


class ShardLoader:
    """Batches of one epoch per iteration; an iteration goes on where the one before it, or a checkpoint, left off.

    Attributes:
        position: batches handed out so far, through all epochs.
        skipped: what could not be used so far, on this rank.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        preparer: Preparer,
        *,
        batch_size: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        shuffle_shards: int = 16,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        max_skipped: int = 100,
        pin_memory: bool = False,
        context: str | None = None,
    ) -> None:
        """Takes the sets and the numbers that fix the order.

        Args:
            sources: the sets of the mixture.
            preparer: makes rows of samples, and batches of rows.
            batch_size: samples per step and rank.
            weights: how often an epoch shows each sample of a set; once without them.
            seed: of the order, and of what is drawn for each sample.
            shuffle_shards: shards that are shuffled among each other.
            rank: which part of the samples.
            world: number of parts.
            num_workers: processes that read and decode; none reads in this one.
            max_skipped: unusable samples that are named and passed over, per rank and run, before it stops.
            pin_memory: whether batches are laid where a GPU can fetch them.
            context: how workers are started.
        Raises:
            ValueError: there are no samples, or a number is out of its range.
        """
        self.order, self._first = (
            Order(
                [source.counts for source in sources],
                batch_size=batch_size,
                seed=seed,
                weights=weights,
                rank=part,
                world=world,
                shuffle_shards=shuffle_shards,
            )
            for part in (rank, 0)
        )
        self._rank, self._world = rank, world
        self._made_of = {
            "batch_size": batch_size,
            "ranks": world,
            "seed": seed,
            "shuffle_shards": shuffle_shards,
            "data": [
                {**source.describe(), "weight": weight}
                for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True)
            ],
        }
        self._dataset = Samples(sources, preparer, seed)
        self._options = loader_options(num_workers, pin_memory=pin_memory, context=context)
        self._iterator: Any = None  # Lightning shuts the workers of an attribute of this name down when it is done
        self._prefetcher = Prefetcher(sources) if any(getattr(s, "is_remote", False) for s in sources) else None
        self.position = 0
        self.skipped = SkippedSamples(max_skipped, rank, world)

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.order.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        last = (self.position // len(self) + 1) * len(self)
        while self.position < last:
            yield self._next()

    def _next(self) -> dict[str, Any]:
        if self._iterator is None:  # one for all epochs, so that workers read on over their border
            batches = _Batches(self.order, itertools.count(self.position))
            self._iterator = iter(DataLoader(self._dataset, batch_sampler=batches, **self._options))
        if self._prefetcher is not None:
            self._prefetcher.want(self.order.shards_ahead(self.position))
        batch = delivered(self._iterator, self.skipped)
        self.position += 1
        return batch

    def peek(self) -> dict[str, Any]:
        """The first batch with a row, the same on every rank, read in this process; nothing moves or is counted.

        Raises:
            ValueError: no sample of an epoch can be used.
        """
        for position in range(len(self)):
            batch, _, error = self._dataset.__getitems__(self._first.batch(position))
            if batch is None:
                raise OSError(error)
            if batch["keys"]:
                return batch
        raise ValueError("no sample of the data can be used; `visplice data check` says why")

    def close(self) -> None:
        """Ends the workers; the next iteration starts others."""
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Position, what was skipped on every rank, and what fixes the order; all ranks call it together."""
        skipped: list[Any] = [dict(self.skipped.counts)]
        if self._world > 1 and torch.distributed.is_initialized():
            skipped = [None] * self._world
            torch.distributed.all_gather_object(skipped, dict(self.skipped.counts))
        return {"position": self.position, "skipped": skipped, "order": self._made_of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was taken.

        Raises:
            ValueError: it is of another order.
        """
        found, expected = (_comparable(made) for made in (state["order"], self._made_of))
        differing = [name for name, value in expected.items() if found.get(name) != value]
        if differing:
            theirs, ours = (_shown(made, differing) for made in (state["order"], self._made_of))
            raise ValueError(
                f"the checkpoint was written with {theirs}, but this run has {ours}; its place in the data means "
                "nothing in another order, so resume with the same, or start a new run"
            )
        self.position = state["position"]
        counts = state["skipped"]
        self.skipped.counts = Counter(counts[self._rank] if self._rank < len(counts) else {})
        self.close()


class EvaluationLoader:
    """Batches of all samples in their order, once per iteration; on every rank as many."""

    def __init__(
        self,
        sources: Sequence[Source],
        preparer: Preparer,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        max_skipped: int = 100,
        pin_memory: bool = False,
        context: str | None = None,
    ) -> None:
        """Takes the sets; arguments and errors are those of ShardLoader."""
        counts = [source.counts for source in sources]
        self.order = Order(counts, batch_size=batch_size, seed=None, rank=rank, world=world)
        self._dataset = Samples(sources, preparer, 0)  # draws the same captions every time
        self._options = loader_options(num_workers, pin_memory=pin_memory, context=context)
        self._loader: DataLoader | None = None
        self._iterator: Any = None  # as in ShardLoader
        self.skipped = SkippedSamples(max_skipped, rank, world, once=True)

    def __len__(self) -> int:
        """Batches per iteration, the same on every rank."""
        return self.order.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._iterator is None:  # the first time, or its workers were shut down
            batches = _Batches(self.order, range(len(self)))
            self._loader = DataLoader(self._dataset, batch_sampler=batches, **self._options)
        self._iterator = iter(self._loader)  # type: ignore[arg-type]
        for _ in range(len(self)):
            yield delivered(self._iterator, self.skipped)


def _comparable(made: Mapping[str, Any]) -> dict[str, Any]:
    """What fixes an order; where the data lies does not."""
    return {**made, "data": [(part["digest"], part["weight"]) for part in made["data"]]}


def _shown(made: Mapping[str, Any], names: Sequence[str]) -> str:
    data = ", ".join(
        f"{part['path']} ({part['samples']:,} samples, {part['digest'][:8]}, weight {part['weight']:g})"
        for part in made["data"]
    )
    return ", ".join(f"{name} {data if name == 'data' else made.get(name)}" for name in names)
