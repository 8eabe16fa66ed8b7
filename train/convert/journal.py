"""What a converting run has finished so far: a file that the next run goes on from, and the lock of the folder.

Each line of `.convert-i-of-n.jsonl` is JSON: the first says what the run is of, each other one is the facts of a
finished shard. A line without its end, where a run was killed while writing it, does not count.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visplice.train.data.record import SCHEMA
from visplice.train.data.shards import MANIFEST
from visplice.train.data.workers import Lock

Facts = dict[str, Any]
_PATIENCE = 5.0  # seconds; workers of a killed run need a moment to notice
_JOURNAL = re.compile(r"\.convert-(\d+)-of-(\d+)\.jsonl")
_PART = re.compile(r"part-(\d+)-of-(\d+)\.json")


class Journal:
    """An open journal: facts of finished shards, by their number; more are added as they come."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self.file, self.lock = file, Lock(descriptor)
        self.done: dict[int, Facts] = {}

    def add(self, facts: Facts) -> None:
        self.append(facts)
        self.done[facts["shard"]] = facts

    def append(self, value: Any) -> None:
        line = memoryview(json.dumps(value).encode() + b"\n")
        while line:
            line = line[os.write(self.lock.descriptor, line) :]
        os.fsync(self.lock.descriptor)

    def remove(self) -> None:
        """Removes the file; for when all that it says is said elsewhere."""
        self.file.unlink()

    def close(self) -> None:
        os.close(self.lock.descriptor)


def part_name(part: tuple[int, int]) -> str:
    """The manifest of one part."""
    return f"part-{part[0]}-of-{part[1]}.json"


def open_journal(out: Path, identity: dict[str, Any], part: tuple[int, int]) -> Journal:
    """Locks the folder for this part, and reads what it has finished.

    Args:
        identity: source and options, as they will stand in the manifest.
    Raises:
        ValueError: the folder is of something else. BlockingIOError: another process works on this part.
    """
    journal = _locked(out / ".convert-{}-of-{}.jsonl".format(*part), part)
    try:
        lines = _lines(journal.lock.descriptor)
        try:
            if not lines:
                _refuse_unknown_shards(out)
                journal.append({"schema": SCHEMA, "source": identity, "part": part})
            _compare_all(out, identity, part)
        except BaseException:
            if not lines:
                journal.remove()
            raise
        journal.done = {facts["shard"]: facts for facts in lines[1:]}
        return journal
    except BaseException:
        journal.close()
        raise


def _locked(file: Path, part: tuple[int, int]) -> Journal:
    until = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return Journal(file, descriptor)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise
            if time.monotonic() > until:
                os.close(descriptor)
                which = "" if part[1] == 1 else f" part {part[0]} of {part[1]}"
                message = f"another process is converting{which} into {file.parent}; wait for it, or end it"
                raise BlockingIOError(message) from None
            time.sleep(0.05)
        os.close(descriptor)


def _lines(descriptor: int) -> list[Any]:
    """Whole lines of the journal; what follows the last is cut off."""
    with open(descriptor, "rb", closefd=False) as file:
        content = file.read()
    whole = content.rfind(b"\n") + 1
    os.ftruncate(descriptor, whole)
    return [json.loads(line) for line in content[:whole].splitlines()]


def _records(out: Path) -> list[Path]:
    """Files that say what the shards of a folder are."""
    known = (re.compile(re.escape(MANIFEST)), _PART, _JOURNAL)
    return [file for file in sorted(out.iterdir()) if any(name.fullmatch(file.name) for name in known)]


def _refuse_unknown_shards(out: Path) -> None:
    if any(out.glob("shard-*.tar")) and not any(file.stat().st_size for file in _records(out)):
        raise ValueError(f"{out} holds shards that no manifest and no journal knows; give another folder with --out")


def _compare_all(out: Path, identity: dict[str, Any], part: tuple[int, int]) -> None:
    """Refuses a folder that was begun, in part or whole, with other data or options. Our own header is there by now, so
    of two runs that begin at once at least one sees the other."""
    for file in _records(out):
        try:
            with open(file, encoding="utf-8") as stream:
                header = json.loads(stream.readline() if file.suffix == ".jsonl" else stream.read())
        except (ValueError, FileNotFoundError):
            continue  # of a run that just began or just ended
        _compare(file, header, identity, part)


def _compare(file: Path, header: Any, identity: dict[str, Any], part: tuple[int, int]) -> None:
    there = header.get("source") if isinstance(header, dict) else None
    pairs = list(differences(there, json.loads(json.dumps(identity))))
    if header.get("schema") != SCHEMA:
        pairs.insert(0, f"schema {header.get('schema')} there, {SCHEMA} now")
    if "part" in header and header["part"][1] != part[1]:
        pairs.append(f"{header['part'][1]} parts there, {part[1]} now")
    if pairs:
        again = "give the same to go on, or another folder with --out"
        raise ValueError(f"{file.parent} was begun with other data or options: {'; '.join(pairs[:4])}; {again}")


def differences(there: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where two values of JSON differ, in words."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in [*there, *(key for key in now if key not in there)]:
            yield from differences(there.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        for index, (left, right) in enumerate(zip(there, now, strict=True)):
            yield from differences(left, right, f"{name}[{index}]")
    elif there != now:
        yield f"{name or 'source'} is {_short(there)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = "not given" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
