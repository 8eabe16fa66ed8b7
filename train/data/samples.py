"""What reads samples, here or in worker processes, and how what cannot be used is counted, named and limited."""

from __future__ import annotations

import multiprocessing
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from tqdm import tqdm

from visplice.train.data.order import Address, sample_random
from visplice.train.data.record import Fault


class Source(Protocol):
    """A data set: a folder of shards, or of features."""

    names: list[str]  # of the shards
    counts: list[int]  # samples of each

    def describe(self) -> dict[str, Any]: ...

    def read(self, shard: int, slot: int) -> Any: ...


class Preparer(Protocol):
    """What a stage makes of a sample; `collate` takes no rows, too."""

    def __call__(self, sample: Any, rng: random.Random) -> dict[str, Any]: ...

    def collate(self, rows: list[Any]) -> dict[str, Any]: ...


class TooManySkipped(ValueError):
    """More samples could not be used than the run allows."""


Skipped = tuple[str, str, str]  # where, name of the fault, message


class Samples(torch.utils.data.Dataset):
    """What a worker holds: addresses in, a prepared batch out."""

    def __init__(self, sources: Sequence[Source], preparer: Preparer, seed: int) -> None:
        self._sources, self._preparer, self._seed = sources, preparer, seed

    def __getitems__(self, addresses: list[Address]) -> tuple[dict[str, Any] | None, list[Skipped], str]:
        """The batch, what was left out of it, and why there is no batch."""
        rows, skipped = [], []
        for address in addresses:
            source = self._sources[address.source]
            try:
                sample = source.read(address.shard, address.slot)
                rows.append(self._preparer(sample, sample_random(self._seed, address)))
            except Fault as fault:
                shard, key = self._name(address)
                skipped.append((f"{shard}: {key}", fault.name, str(fault).removeprefix(f"{key}: ")))
            except OSError as error:  # it would come out of a worker as a page of traceback
                return None, skipped, str(error)
        return self._preparer.collate(rows), skipped, ""

    def _name(self, address: Address) -> tuple[str, str]:
        """Shard and key of a sample, also of one that cannot be read."""
        source = self._sources[address.source]
        slots = getattr(source, "slots", None)
        key = slots(address.shard)[address.slot].key if slots else f"sample {address.slot}"
        return source.names[address.shard], key


class SkippedSamples:
    """Counts what could not be used, by name, says it, and stops the run when it is too much."""

    def __init__(self, limit: int, rank: int = 0, world: int = 1, *, once: bool = False) -> None:
        """Takes the budget; with `once`, a sample that comes up again is neither counted nor named again."""
        self.counts: Counter[str] = Counter()
        self._seen: set[str] | None = set() if once else None
        self._limit, self._where = limit, f" on rank {rank}" if world > 1 else ""

    def note(self, skipped: Sequence[Skipped]) -> None:
        """Takes in what one batch left out.

        Raises:
            TooManySkipped: the budget is spent.
        """
        for where, name, message in skipped:
            if self._seen is not None:
                if where in self._seen:
                    continue
                self._seen.add(where)
            self.counts[name] += 1
            tqdm.write(f"skipped: {where}: {name}: {message}", file=sys.stderr)
            if self.counts.total() > self._limit:
                raise TooManySkipped(
                    f"{self.counts.total()} samples could not be used{self._where} ({self}), more than "
                    f"data.max_skipped {self._limit}; the last one is {where}: {name}: {message}"
                )

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))


def _as_it_is(batch: Any) -> Any:
    return batch


def loader_options(num_workers: int, *, pin_memory: bool, context: str | None) -> dict[str, Any]:
    """How a DataLoader over `Samples` is run, and how it starts its workers.

    They come from a server process without threads: a fork of a process in which torch has threads can wait forever
    for one that was not copied.
    """
    if num_workers < 0:
        raise ValueError(f"data.num_workers is {num_workers}; it is 0 or more")
    options: dict[str, Any] = {"collate_fn": _as_it_is, "pin_memory": pin_memory}
    if not num_workers:
        return options
    if context is None:
        context = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    chosen: Any = multiprocessing.get_context(context)
    if context == "forkserver":
        chosen.set_forkserver_preload(["visplice.train.data.prepare"])
    return options | {"num_workers": num_workers, "multiprocessing_context": chosen, "persistent_workers": True}


def delivered(iterator: Iterator[Any], skipped: SkippedSamples) -> dict[str, Any]:
    """The next batch of a DataLoader over `Samples`, when what it left out is noted.

    Raises:
        OSError: the data cannot be read, or a worker was killed.
        TooManySkipped: more could not be used than the run allows.
    """
    try:
        batch, left_out, error = next(iterator)
    except (RuntimeError, EOFError, OSError) as problem:  # what a worker cannot read, it says by `error`
        if isinstance(problem, RuntimeError) and "DataLoader worker" not in str(problem):
            raise
        raise ChildProcessError(
            f"a process that reads data is gone ({problem or type(problem).__name__}); most often the system ended it "
            "because memory ran out, so lower data.num_workers or data.batch_size"
        ) from problem
    skipped.note(left_out)
    if batch is None:
        raise OSError(error)
    return batch
