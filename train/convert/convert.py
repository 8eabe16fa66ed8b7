"""From the entries of a source to shards: in parallel, and such that a run that was killed goes on where it stood.

One task is one shard: a fixed range of entries, so what a shard holds depends neither on the workers nor on their
order. A shard appears whole or not at all (`write_shard`), and once it is there its facts go into a journal, which the
next run goes on from. The manifest is written last, and then the journal goes. So at every moment a folder holds
finished shards, at most some `.partial` files, and a journal or a manifest.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from visplice.train.convert.journal import Facts, Journal, open_journal
from visplice.train.convert.report import MAX_EXAMPLES, finish, finish_part, finished, identity_of
from visplice.train.convert.sources import Entry, LeftOut, Source, left_out
from visplice.train.data.record import Fault, Sample, check_marks, check_record
from visplice.train.data.shards import shard_name, write_shard
from visplice.train.data.tar_index import MAX_PICTURE, MAX_TEXT
from visplice.train.data.workers import run_tasks
from visplice.vision.image import ImageError
from visplice.vision.image_facts import ODDITIES, examine

# What opening a file says when it is the file's fault, and not that of the disk or the network, which may pass.
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.ENXIO}


@dataclass(frozen=True, kw_only=True)
class Task:
    """The entries of one shard."""

    index: int
    first: int  # ordinal of its first entry
    entries: Sequence[Entry]


@dataclass(frozen=True, kw_only=True)
class ShardMaker:
    """Makes one shard; an object that worker processes can be sent."""

    out: Path
    images: Path | None
    strict: bool  # whether what is odd about a picture counts as a fault

    def __call__(self, task: Task) -> Facts:
        """Writes the shard, unless nothing of it is usable.

        Returns:
            What the report and the manifest need to know of it.
        Raises:
            OSError: a file cannot be read or written, and not because it is missing.
        """
        facts: Facts = {"shard": task.index, "entries": len(task.entries), "items": 0, "skipped": [], "oddities": {}}
        file = self.out / shard_name(task.index)
        samples = self._samples(task, facts)
        first = next(samples, None)
        if first is None:
            file.unlink(missing_ok=True)
            return facts | {"entry": None}
        try:
            return facts | {"entry": write_shard(file, chain([first], samples))}
        except OSError as error:
            raise _naming(file, error) from error

    def _samples(self, task: Task, facts: Facts) -> Iterator[Sample]:
        for ordinal, entry in enumerate(task.entries, task.first):
            skipped = list(entry.left_out)
            if entry.record is not None:
                try:
                    sample, odd = self._sample(f"{ordinal:09d}", entry)
                except Fault as fault:
                    skipped.append(left_out(entry.id, fault, items=entry.items))
                else:
                    if odd and self.strict:
                        name, file = odd[0]
                        message = f"{file}: {ODDITIES[name]}"
                        skipped.append(LeftOut(id=entry.id, fault=name, message=message, items=entry.items))
                    else:
                        facts["items"] += entry.items
                        _count_odd(facts["oddities"], ordinal, entry.id, odd)
                        yield sample
            facts["skipped"] += [
                {"entry": ordinal, "id": item.id, "fault": item.fault, "items": item.items, "message": item.message}
                for item in skipped
            ]

    def _sample(self, key: str, entry: Entry) -> tuple[Sample, list[tuple[str, str]]]:
        """The sample, and what is odd about its pictures with their names."""
        record = dict(entry.record or {})
        if entry.caption_file is not None:
            record["captions"] = [self._caption(entry.caption_file)]
        if entry.images:
            record["files"] = list(entry.images)
        check_record(record)
        check_marks(record, len(entry.images))
        try:
            length = len(json.dumps(record, ensure_ascii=False).encode())
        except UnicodeEncodeError as error:
            raise Fault("not-utf8", f"the record holds half of a surrogate pair ({error.reason})") from None
        if length > MAX_TEXT:
            raise Fault("too-large", f"the record has {length} bytes; at most {MAX_TEXT} are read")
        pictures, odd = [], []
        for number, name in enumerate(entry.images):
            data = self._read(name, MAX_PICTURE)
            try:
                facts, _ = examine(data, os.path.splitext(name)[1] or None)
            except ImageError as error:
                raise Fault(error.kind, f"{name}: {error}") from None
            pictures.append((facts.suffix if len(entry.images) == 1 else f"{number}.{facts.suffix}", data))
            odd += [(oddity, name) for oddity in facts.oddities]
        return Sample(key=key, images=tuple(pictures), record=record), odd

    def _caption(self, name: str) -> str:
        try:
            return self._read(name, MAX_TEXT).decode().removeprefix("\ufeff").strip()
        except UnicodeDecodeError as error:
            raise Fault("not-utf8", f"{name} is not UTF-8 ({error})") from None

    def _read(self, name: str, limit: int) -> bytes:
        if os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
            raise Fault("unsafe-name", f"{name!r} leads out of the folder of pictures")
        assert self.images is not None
        try:
            # Without blocking, or a named pipe would hold the run for ever.
            descriptor = os.open(self.images / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                facts = os.fstat(descriptor)
                if not stat.S_ISREG(facts.st_mode):
                    raise Fault("missing-image", f"{name} is no plain file")
                if facts.st_size > limit:
                    raise Fault("too-large", f"{name} has {facts.st_size} bytes; at most {limit} are read")
                with open(descriptor, "rb", closefd=False) as file:
                    return file.read()
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise _naming(self.images / name, error) from error
            raise Fault("missing-image", f"{name}: {error.strerror}") from None


def _naming(file: Path, error: OSError) -> OSError:
    """The error with the name of the file, which reading and writing leave out."""
    return error if error.filename is not None else OSError(error.errno, error.strerror, str(file))


def _count_odd(oddities: dict[str, Any], ordinal: int, identity: str, odd: list[tuple[str, str]]) -> None:
    for name, file in odd:
        known = oddities.setdefault(name, {"count": 0, "examples": []})
        known["count"] += 1
        if len(known["examples"]) < MAX_EXAMPLES:
            known["examples"].append({"entry": ordinal, "id": identity, "file": file})


def convert(
    source: Source,
    out: Path,
    *,
    images: Path | None = None,
    per_shard: int = 1000,
    workers: int = 1,
    strict: bool = False,
    part: tuple[int, int] = (1, 1),
    progress: Callable[[int], object] = lambda entries: None,
) -> dict[str, Any]:
    """Writes the shards of a source, its manifest, `report.json` and `skipped.jsonl`; goes on where a killed run stood.

    Args:
        out: folder; new, or of a run with the same source and options.
        images: folder that names of pictures count from.
        per_shard: entries of a shard.
        strict: skip pictures that are odd (ODDITIES), too.
        part: (i, n) makes every n-th shard from the i-th on, and in place of the manifest `part-i-of-n.json`.
        progress: called with a number of entries whenever as many more are done.
    Returns:
        The report, with "complete" true where the folder was finished before.
    Raises:
        ValueError: the folder is of other data, or nothing usable was found. OSError: reading or writing failed.
        ChildProcessError: a worker died.
    """
    parts = part[1]
    if not source.entries:
        raise ValueError(f"{source.files[0]['name']} has no {source.unit}")
    if images is None and (name := next((name for entry in source.entries for name in entry.images), None)):
        raise ValueError(f"{source.files[0]['name']} names pictures ({name!r} first); give their folder with --images")
    identity = identity_of(source, per_shard=per_shard, strict=strict)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; it has to be a folder, or new")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with closing(open_journal(out, identity, part)) as journal:
            report = finished(out, identity, part)
            if report is not None:
                journal.remove()
                return report | {"complete": True}
            maker = ShardMaker(out=out, images=images, strict=strict)
            _make_shards(source, maker, journal, part, per_shard=per_shard, workers=workers, progress=progress)
            facts = [journal.done[index] for index in sorted(journal.done)]
            if parts > 1:
                report = finish_part(out, identity, part, facts, total=num_shards(len(source.entries), per_shard))
            else:
                report = finish(out, identity, facts, journal)
            journal.remove()
            return report | {"complete": False}
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            again = "make room and run the same command again; finished shards are kept"
            raise OSError(f"no space left in {out}; {again}") from None
        raise


def num_shards(num_entries: int, per_shard: int) -> int:
    return -(-num_entries // per_shard)


def _make_shards(
    source: Source,
    maker: ShardMaker,
    journal: Journal,
    part: tuple[int, int],
    *,
    per_shard: int,
    workers: int,
    progress: Callable[[int], object],
) -> None:
    own = range(part[0] - 1, num_shards(len(source.entries), per_shard), part[1])
    _forget_lost(journal, maker.out)
    _remove_partial(maker.out, own)
    for facts in journal.done.values():
        progress(facts["entries"])
    open_shards = [index for index in own if index not in journal.done]
    tasks = (
        Task(index=index, first=index * per_shard, entries=source.entries[index * per_shard : (index + 1) * per_shard])
        for index in open_shards
    )
    workers = max(1, min(workers, len(open_shards)))
    results = run_tasks(maker, tasks, num_workers=workers, lock=journal.lock, preload=__name__)
    try:
        with closing(results):
            for facts in results:
                journal.add(facts)
                progress(facts["entries"])
    except BaseException:
        _remove_partial(maker.out, own)  # nobody writes there any more; on a full disk it is room, too
        raise


def _forget_lost(journal: Journal, out: Path) -> None:
    """A shard that is gone or cut, which a power failure can do behind the journal's back, is made again."""
    for index, facts in list(journal.done.items()):
        entry = facts["entry"]
        try:
            whole = entry is None or (out / entry["name"]).stat().st_size == entry["bytes"]
        except FileNotFoundError:
            whole = False
        if not whole:
            del journal.done[index]


def _remove_partial(out: Path, own: range) -> None:
    for index in own:
        (out / f"{shard_name(index)}.partial").unlink(missing_ok=True)
