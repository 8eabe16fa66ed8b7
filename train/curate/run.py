"""One run of a filter: measures every sample of a data set, and writes what is to be removed as an overlay."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from visplice.train.curate.verdict import Filter, Located, Verdict
from visplice.train.data.curation import FOLDER, Curation, curation_of, overlay_line
from visplice.train.data.record import Fault
from visplice.train.data.tar_index import read_slot, scan_shard
from visplice.train.data.workers import Lock, run_tasks
from visplice.vision.image import ImageError

_EXAMPLES = 5  # of each reason


def options_of(rule: Filter) -> dict[str, Any]:
    """The options that decide what a filter removes, as they stand in the index."""
    given = asdict(rule)  # type: ignore[call-overload]  # every filter is a dataclass
    compared = {option.name for option in fields(rule) if option.compare}  # type: ignore[arg-type]
    return json.loads(json.dumps({option: value for option, value in given.items() if option in compared}))


@dataclass(frozen=True, kw_only=True)
class _Measurer:
    """Measures the samples of one shard; worker processes are sent it."""

    folder: Path
    names: Sequence[str]
    below: Sequence[Mapping[str, Any]]  # filters whose work is seen
    rule: Filter

    def __call__(self, shard: int) -> tuple[int, list[tuple[str, Any]]]:
        return shard, list(self.stream(curation_of(self.folder, self.below), shard))

    def stream(self, curation: Curation, shard: int) -> Iterator[tuple[str, Any]]:
        """Key and what was measured, or a Fault, of every sample that is not dropped yet."""
        name = self.names[shard]
        dropped = curation.dropped(name)
        with open(self.folder / name, "rb") as stream:
            for slot in scan_shard(self.folder / name):
                if slot.fault is None and slot.key in dropped:
                    continue
                try:
                    sample = curation.apply(name, read_slot(stream.fileno(), slot, images=False))
                    if self.rule.reads_pictures(sample.record):
                        sample = curation.apply(name, read_slot(stream.fileno(), slot))
                    yield slot.key, self.rule.measure(sample)
                except Fault as fault:
                    yield slot.key, fault
                except ImageError as error:
                    yield slot.key, Fault(error.kind, str(error))


def _measured(measurer: _Measurer, workers: int, lock: Lock | None) -> Iterator[tuple[int, list[tuple[str, Any]]]]:
    """Shards in order, with what was measured of their samples; a shard may come in several parts."""
    count = len(measurer.names)
    workers = max(1, min(workers, count))
    if workers == 1:  # one sample at a time: a shard of pictures need not fit into memory
        curation = curation_of(measurer.folder, measurer.below)
        for shard in range(count):
            for row in measurer.stream(curation, shard):
                yield shard, [row]
        return
    waiting: dict[int, list[tuple[str, Any]]] = {}
    following = 0
    with open(os.devnull, "rb") as nothing:
        held = lock or Lock(nothing.fileno())
        try:
            with closing(
                run_tasks(measurer, range(count), num_workers=workers, lock=held, preload=__name__)
            ) as results:
                for shard, rows in results:
                    waiting[shard] = rows
                    while following in waiting:
                        yield following, waiting.pop(following)
                        following += 1
        except ChildProcessError as error:
            raise ChildProcessError(f"{str(error).rpartition(';')[0]}; nothing was applied") from None


def run_filter(
    folder: Path,
    manifest: Mapping[str, Any],
    below: Sequence[Mapping[str, Any]],
    rule: Filter,
    workers: int,
    lock: Lock | None,
    *,
    number: int,
) -> dict[str, Any]:
    """Runs a filter over what those `below` it leave; the index is not touched.

    Args:
        lock: of the curation folder; without one, nothing is written.
        number: what the file of the overlay begins with.
    Returns:
        The entry for the index.
    Raises:
        ValueError: nothing would be left. ChildProcessError: a worker died.
    """
    names = [shard["name"] for shard in manifest["shards"]]
    measurer = _Measurer(folder=folder, names=names, below=list(below), rule=rule)
    seen, unreadable = Counter[str](), Counter[str]()
    curation = curation_of(folder, below)
    total = manifest["samples"] - sum(len(curation.dropped(name)) for name in names)

    def located() -> Iterator[Located]:
        with tqdm(total=total, desc=rule.name, unit="sample", mininterval=0.5) as bar:
            for shard, rows in _measured(measurer, workers, lock):
                for key, found in rows:
                    bar.update()
                    seen["samples"] += 1
                    if isinstance(found, Fault):
                        unreadable[found.name] += 1
                    else:
                        yield Located(names[shard], key, found)

    tally = _Tally()
    file = folder / FOLDER / f"{number:02d}-{rule.name}.jsonl"
    sha256 = _write_overlay(file if lock else None, rule.verdicts(located()), tally)
    counts = {
        "samples": seen["samples"],
        "dropped": tally.dropped,
        "edited": tally.edited,
        "removed": dict(sorted(tally.removed.items())),
        "noted": dict(sorted(tally.noted.items())),
        "unreadable": dict(sorted(unreadable.items())),
    }
    if lock and tally.dropped and tally.dropped + unreadable.total() == seen["samples"]:
        file.unlink()
        raise ValueError(f"{rule.name} would leave no sample of {folder}; nothing was applied")
    return {
        "file": file.name,
        "sha256": sha256,
        "filter": rule.name,
        "options": options_of(rule),
        "counts": counts,
        "examples": tally.examples,
    }


class _Tally:
    """What a run removed, counted, with the first examples."""

    def __init__(self) -> None:
        self.dropped = self.edited = 0
        self.removed, self.noted = Counter[str](), Counter[str]()
        self.examples: dict[str, list[dict[str, str]]] = {}

    def add(self, shard: str, key: str, verdict: Verdict) -> None:
        self.dropped += verdict.drop
        self.edited += bool(verdict.edits) and not verdict.drop
        self.noted.update(verdict.noted)
        for removal in verdict.removed:
            self.removed[removal.reason] += 1
            examples = self.examples.setdefault(removal.reason, [])
            if len(examples) < _EXAMPLES:
                examples.append({"shard": shard, "key": key, "what": removal.example})


def _write_overlay(file: Path | None, verdicts: Iterator[tuple[str, str, Verdict]], tally: _Tally) -> str:
    """Writes the lines of an overlay beside its place, syncs and renames it; its SHA-256."""
    digest = hashlib.sha256()
    partial = file.with_name(file.name + ".partial") if file else Path(os.devnull)
    try:
        with open(partial, "wb") as stream:
            for line in _lines(verdicts, tally):
                digest.update(line)
                stream.write(line)
            stream.flush()
            if file:
                os.fsync(stream.fileno())
        if file:
            os.replace(partial, file)
    except BaseException:
        if file:
            partial.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _lines(verdicts: Iterable[tuple[str, str, Verdict]], tally: _Tally) -> Iterator[bytes]:
    changes = (row for row in _told(verdicts, tally) if row[2].drop or row[2].edits)
    for shard, rows in groupby(changes, key=lambda row: row[0]):
        dropped: list[str] = []
        edits: dict[str, dict[str, Any]] = {}
        for _, key, verdict in rows:
            if verdict.drop:
                dropped.append(key)
            else:
                edits[key] = verdict.edits
        yield overlay_line(shard, dropped, edits)


def _told(verdicts: Iterable[tuple[str, str, Verdict]], tally: _Tally) -> Iterator[tuple[str, str, Verdict]]:
    for shard, key, verdict in verdicts:
        tally.add(shard, key, verdict)
        yield shard, key, verdict
