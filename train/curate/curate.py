"""Applies the filters of curation to a data set, and takes them back.

A filter sees the data as those before it left them, and writes an overlay (`curation`); shards are only read. Since
later filters saw what earlier ones left, an earlier one is taken back alone only if nothing lies over it: else the
later ones go with it, or run again with the same options over what is then there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from visplice.train.curate.run import options_of, run_filter
from visplice.train.curate.verdict import Filter
from visplice.train.data.curation import FOLDER, INDEX, OVERLAY_SCHEMA, fingerprint, load_curation, parse_index
from visplice.train.data.shards import read_manifest, write_json
from visplice.train.data.workers import Lock

_LOCK = f"{FOLDER}/lock"
_HERE = "visplice.train.curate"
FILTERS = {  # where each filter lives; imported when it is used
    "duplicate-urls": ("duplicates", "DuplicateUrls"),
    "duplicate-pictures": ("duplicates", "DuplicatePictures"),
    "near-pictures": ("near", "NearPictures"),
    "duplicate-lines": ("duplicates", "DuplicateLines"),
    "near-lines": ("near", "NearLines"),
    "privacy": ("privacy", "Privacy"),
    "language": ("text", "Language"),
    "length": ("text", "Length"),
    "picture-size": ("picture_size", "PictureSize"),
    "clip-score": ("clip_score", "ClipScore"),
}


def make_filter(name: str, options: Mapping[str, Any]) -> Filter:
    """The filter of that name.

    Raises:
        ValueError: there is none, it has no such option, one is out of range, or a package is not installed.
    """
    if name not in FILTERS:
        raise ValueError(f"{name} is no filter of this version; it has {', '.join(FILTERS)}")
    module, kind = FILTERS[name]
    plain = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    try:
        return getattr(import_module(f"{_HERE}.{module}"), kind)(**plain)
    except TypeError as error:
        raise ValueError(f"{name} does not take these options: {error}") from error


def curate(folder: str | Path, rule: Filter, *, workers: int = 1, dry_run: bool = False) -> dict[str, Any]:
    """Applies a filter to a local data set.

    Args:
        workers: processes that read and measure samples.
        dry_run: only find out what would be removed.
    Returns:
        Its entry in the index: filter, options, counts, examples. `counts` holds `samples`, `dropped`, `edited`, and by
        name what was `removed`, `noted` and `unreadable`. With "again" true nothing was done: the filter is applied
        with these options.
    Raises:
        ValueError: there is no data set, the filter is applied with other options, or would leave nothing.
        BlockingIOError: another process curates it. ChildProcessError: a worker died.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)

    def run(lock: Lock | None) -> dict[str, Any]:
        below = load_curation(folder, manifest).applied
        before = _applied_before(folder, below, rule)
        if before is not None:
            return before
        entry = run_filter(folder, manifest, below, rule, workers, lock, number=_next_number(below))
        if lock is not None:
            _write_index(folder, manifest, [*below, entry])
        return entry

    if dry_run:
        return run(None)
    with _locked(folder) as lock:
        return run(lock)


def undo(folder: str | Path, name: str, *, later: str | None = None, workers: int = 1) -> list[str]:
    """Takes back a filter, or `all`.

    Args:
        later: what becomes of filters that were applied after it: `undo` them too, or `redo` them with their options
            over what is then there. None refuses where there are any.
    Returns:
        The names of the filters that were taken back and not applied again.
    Raises:
        ValueError: the filter is not applied, or others were applied after it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a data set is a folder of shards with a manifest.json")
    if not (folder / INDEX).exists():
        if name == "all":
            return []
        raise ValueError(f"{folder}: {name} is not applied; nothing is")
    with _locked(folder) as lock:
        if name == "all":
            return _undo_all(folder)
        entries = applied(folder)
        names = [entry["filter"] for entry in entries]
        if name not in names:
            raise ValueError(f"{folder}: {name} is not applied; applied is {', '.join(names)}")
        at = names.index(name)
        below, above = entries[:at], entries[at + 1 :]
        if above and later is None:
            raise ValueError(
                f"{', '.join(names[at + 1 :])} was applied after {name} and saw what it left; add --later undo to take "
                "that back too, or --later redo to apply it again without it"
            )
        manifest = read_manifest(folder)
        if later == "redo":
            load_curation(folder, manifest)  # refuses what belongs to another data set
            number = _next_number(entries)
            for entry in above:
                rule = make_filter(entry["filter"], entry["options"])
                below = [*below, run_filter(folder, manifest, below, rule, workers, lock, number=number)]
                number += 1
        if not below:
            return _undo_all(folder)
        _write_index(folder, manifest, below)
        left = {entry["filter"] for entry in below}
        return [other for other in names[at:] if other not in left]


def applied(folder: str | Path) -> list[dict[str, Any]]:
    """The index entries of the filters that are applied, in their order, whatever data set they belong to.

    Raises:
        ValueError: the index is broken.
    """
    file = Path(folder) / INDEX
    try:
        return parse_index(file.read_bytes(), str(file))["applied"]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _applied_before(folder: Path, below: Sequence[Mapping[str, Any]], rule: Filter) -> dict[str, Any] | None:
    for entry in below:
        if entry["filter"] == rule.name:
            if entry["options"] == options_of(rule):
                return {**entry, "again": True}
            given = [f"{name} {value}" for name, value in entry["options"].items() if value not in (None, False)]
            raise ValueError(
                f"{folder}: {rule.name} is applied with other options ({', '.join(given) or 'none'}); take it back "
                f"first with `visplice data curate {folder} --undo {rule.name}`"
            )
    return None


def _next_number(entries: Sequence[Mapping[str, Any]]) -> int:
    numbers = [int(entry["file"].partition("-")[0]) for entry in entries]
    return max(numbers, default=0) + 1


def _write_index(folder: Path, manifest: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> None:
    """Makes these filters the ones that are applied, and removes overlays that no longer are."""
    index = {"schema": OVERLAY_SCHEMA, "data": fingerprint(manifest), "applied": list(entries)}
    write_json(folder / INDEX, index)
    named = {entry["file"] for entry in entries}
    for file in (folder / FOLDER).glob("*.jsonl*"):
        if file.name not in named:
            file.unlink()


def _undo_all(folder: Path) -> list[str]:
    try:
        names = [entry["filter"] for entry in applied(folder)]
    except ValueError:  # a broken index goes too; that is what its message promises
        names = ["all"]
    (folder / INDEX).unlink()
    return names


@contextmanager
def _locked(folder: Path) -> Iterator[Lock]:
    """Keeps other processes from curating the folder; held until the last worker is gone."""
    file = folder / _LOCK
    while True:
        file.parent.mkdir(exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Taking back the last filter removes the file; whoever opened it before that locks nothing.
            if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise BlockingIOError(f"another process curates {folder}; wait for it, or end it") from None
        os.close(descriptor)
    try:
        yield Lock(descriptor)
    finally:
        try:
            if not (folder / INDEX).exists():
                _remove_empty(file)
        finally:
            os.close(descriptor)


def _remove_empty(lock: Path) -> None:
    """Removes what is left in a curation folder without an index, and the folder."""
    for pattern in ("*.jsonl*", "*.partial", lock.name):
        for stray in lock.parent.glob(pattern):
            stray.unlink()
    with suppress(OSError):  # something of somebody else's lies in it
        lock.parent.rmdir()
