"""Predictions as they come: a line for each question, appended by each process to a file of its own.

`answers-0.jsonl`, `answers-1.jsonl`, ... hold what is answered so far, in whatever order. Killed at any moment, a run
finds every whole line there and goes on behind it, with as many processes as it likes. When nothing is left to do,
`predictions.jsonl` gets the lines in the order of the questions and the other files go.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RUN = "run.json"  # what decides the answers
PREDICTIONS = "predictions.jsonl"
_PARTS = "answers-*.jsonl"
ID = "question_id"


class Journal:
    """The folder of one run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, process: int = 0) -> None:
        """Opens a folder, new or of an earlier run with the same settings.

        Raises:
            ValueError: it holds answers of another run (the message says what differs), or another process writes them.
            OSError: the folder cannot be written.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / RUN).exists():
            _refuse_other(folder, json.loads((folder / RUN).read_bytes()), settings)
        else:
            if stray := next(iter([*folder.glob(_PARTS), *folder.glob(PREDICTIONS)]), None):
                raise ValueError(f"{folder} holds {stray.name}, but no {RUN}; give another --out, or empty it")
            write_text(folder / RUN, json.dumps(settings, indent=2) + "\n")
        self._file = folder / f"answers-{process}.jsonl"
        self._stream: Any = None

    def begin(self) -> None:
        """Locks this process's file, and takes back a line that was cut off.

        Raises:
            ValueError: another process writes to it.
        """
        self._stream = open(self._file, "a+b")  # noqa: SIM115  closed by `close`
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another process is answering into this folder; wait for it") from None
        self._stream.seek(0)
        content = self._stream.read()
        self._stream.truncate(content.rfind(b"\n") + 1)

    def answered(self) -> dict[Any, dict[str, Any]]:
        """The lines that are there, by question, but for those that name a fault."""
        if (self.folder / PREDICTIONS).exists():
            return _rows((self.folder / PREDICTIONS).read_bytes())
        found: dict[Any, dict[str, Any]] = {}
        for file in sorted(self.folder.glob(_PARTS)):
            found |= _rows(file.read_bytes())
        return found

    @property
    def finished(self) -> bool:
        return (self.folder / PREDICTIONS).exists()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines.

        Raises:
            OSError: the disk is full; what was there stays.
        """
        try:
            self._stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            self._stream.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"the disk is full under {self.folder}; make room and run the same command again, which goes on where "
                "this one stopped"
            ) from error

    def finish(self, ids: Sequence[Any]) -> list[dict[str, Any]]:
        """Writes `predictions.jsonl` with a line for each of `ids`, in their order; returns the lines."""
        found = self.answered()
        rows = [found[name] for name in ids]
        if not self.finished:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(self.folder / PREDICTIONS, "".join(lines))
        self.close()
        for file in self.folder.glob(_PARTS):
            file.unlink(missing_ok=True)
        return rows

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def write_text(file: Path, text: str) -> None:
    """Writes a file beside its place, syncs it and renames it."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _rows(content: bytes) -> dict[Any, dict[str, Any]]:
    rows = (json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines())
    return {row[ID]: row for row in rows}


def _refuse_other(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    names = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
    if names:
        told = "; ".join(f"{name} was {found.get(name)!r} and is {asked.get(name)!r} now" for name in names)
        raise ValueError(f"{folder} holds answers of another run: {told}; give another --out")
