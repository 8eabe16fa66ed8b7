"""The parts that several machines converted, as one data set: the same bytes as one machine would have made."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from visplice.train.convert.journal import Facts, differences, open_journal, part_name
from visplice.train.convert.report import check_shards, finish, finished
from visplice.train.data.record import SCHEMA

_PART = re.compile(r"part-(\d+)-of-(\d+)\.json")
_BEGUN = re.compile(r"\.convert-(\d+)-of-(\d+)\.jsonl")


def merge(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Puts the shards of all parts into one folder, by hard links where that works, and writes its manifest.

    In a folder that was the --out of its parts, shards stay where they are and the manifests of parts go.

    Args:
        folders: where `convert --part i/n` wrote.
        out: new, one of the folders, or of a merge of the same parts that was ended midway.
    Returns:
        The report, with "complete" true where the folder was finished before.
    Raises:
        ValueError: parts are missing, unfinished or of different data. OSError: a file cannot be read or written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; it has to be a folder, or new")
    parts: dict[int, tuple[Path, dict[str, Any]]] = {}
    for folder in dict.fromkeys(folders):
        for file in _part_files(folder):
            _add(parts, file)
    if not parts:
        return _merged_before(folders, out)
    first, total = next(iter(parts.values()))[1], next(iter(parts.values()))[1]["part"][1]
    _require_all(parts, total, folders)
    identity = first["source"]
    facts: list[Facts] = sorted((f for _, part in parts.values() for f in part["shards"]), key=lambda f: f["shard"])
    if [shard["shard"] for shard in facts] != list(range(first["of_shards"])):
        raise ValueError(f"the parts hold {len(facts)} shards of {first['of_shards']}; convert the parts again")
    for file, part in parts.values():
        check_shards(file.parent, [shard["entry"] for shard in part["shards"] if shard["entry"]], file.name)
    out.mkdir(parents=True, exist_ok=True)
    with closing(open_journal(out, identity, (0, total))) as journal:
        report = finished(out, identity, (1, 1))
        complete = report is not None
        if report is None:
            for file, part in parts.values():
                for shard in part["shards"]:
                    if shard["entry"]:
                        _bring(file.parent, out, shard["entry"])
            report = finish(out, identity, facts, journal)
        for number in parts:
            (out / part_name((number, total))).unlink(missing_ok=True)
        journal.remove()
    return report | {"complete": complete}


def _part_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    return sorted(file for file in folder.iterdir() if _PART.fullmatch(file.name))


def _add(parts: dict[int, tuple[Path, dict[str, Any]]], file: Path) -> None:
    try:
        part = json.loads(file.read_text(encoding="utf-8"))
        number, total = part["part"]
        whole = part["schema"] == SCHEMA and {"source", "of_shards", "shards"} <= part.keys()
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{file} is no manifest of a part of schema {SCHEMA}; convert this part again")
    for other, known in parts.values():
        pairs = list(differences(known["source"], part["source"]))
        if known["part"][1] != total:
            pairs.append(f"{known['part'][1]} parts there, {total} here")
        if pairs:
            raise ValueError(f"{file} does not belong to {other}: {'; '.join(pairs[:4])}")
    if number in parts and parts[number][1] != part:
        raise ValueError(f"{file} and {parts[number][0]} are the same part with different content")
    parts.setdefault(number, (file, part))


def _require_all(parts: dict[int, Any], total: int, folders: Sequence[Path]) -> None:
    missing = [number for number in range(1, total + 1) if number not in parts]
    if not missing:
        return
    begun = {int(match[1]) for folder in folders for file in folder.iterdir() if (match := _BEGUN.fullmatch(file.name))}
    named = [f"{number}{' (begun, not finished)' if number in begun else ''}" for number in missing[:20]]
    more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
    raise ValueError(
        f"of {total} parts these are missing: {', '.join(named)}{more}; convert them with --part i/{total}"
    )


def _merged_before(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    report = None
    if (out / "manifest.json").exists() and out in folders:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        report = finished(out, manifest.get("source"), (1, 1))
    if report is None:
        places = ", ".join(map(str, folders))
        raise ValueError(f"{places}: no part-i-of-n.json there; convert with --part i/n first")
    return report | {"complete": True}


def _bring(folder: Path, out: Path, entry: dict[str, Any]) -> None:
    """Has one shard in the output folder, under its own name."""
    here, there = folder / entry["name"], out / entry["name"]
    if there.exists():
        if os.path.samefile(here, there) or there.stat().st_size == entry["bytes"]:
            return
        raise ValueError(f"{there} is there already and of another size; give another folder with --out")
    try:
        os.link(here, there)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        _copy(here, there)


def _copy(here: Path, there: Path) -> None:
    partial = there.with_name(there.name + ".partial")
    with open(here, "rb") as source, open(partial, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
    os.replace(partial, there)
