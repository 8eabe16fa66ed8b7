"""What curation leaves out and changes: overlays beside the shards, which themselves stay as they are.

`DIR/curation/index.json` lists the overlays that apply, in the order in which they were made; without it, the data set
is as it was converted:

    {"schema": 1, "data": "<fingerprint of the shards>",
     "applied": [{"file": "01-privacy.jsonl", "sha256": "...", "filter": "privacy", "options": {...},
                  "counts": {...}, "examples": {...}}]}

An overlay has a line for every shard that it touches. Edits replace fields of a record, and those of a later overlay
what an earlier one wrote:

    {"shard": "shard-000000.tar", "dropped": ["key", ...], "edits": {"key": {"captions": ["..."]}}}

A filter is applied when the index names its overlay, and no sooner; a file that the index does not name counts for
nothing. So one rename applies a filter or takes it back, wherever the process is killed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visplice.train.data.record import Sample
from visplice.train.data.shards import read_manifest

FOLDER = "curation"
INDEX = f"{FOLDER}/index.json"  # relative to the data folder or its URL
OVERLAY_SCHEMA = 1
_NOTHING: tuple[frozenset[str], dict[str, dict[str, Any]]] = (frozenset(), {})
_PARSED_SHARDS = 256  # kept at a time


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Names the shards of a data set by their content; another conversion with the same result has the same one."""
    text = json.dumps(manifest["shards"], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Curation:
    """The overlays of a data set, merged. It is small beside the data and can be sent to worker processes."""

    def __init__(self, applied: Iterable[Mapping[str, Any]] = (), overlays: Iterable[bytes] = ()) -> None:
        """Takes the entries of the index and, in the same order, the bytes of their files.

        Raises:
            ValueError: an overlay is not what its entry says.
        """
        self.applied = [dict(entry) for entry in applied]
        self._lines: dict[str, list[bytes]] = {}
        for entry, data in zip(self.applied, overlays, strict=True):
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise ValueError(
                    f"{FOLDER}/{entry['file']}: not the file that the index names (its SHA-256 differs); undo "
                    f"{entry['filter']} with `visplice data curate DIR --undo {entry['filter']}` and apply it again"
                )
            for line in data.splitlines():
                # A line opens with the shard's name, so that the rest is parsed when the shard is read.
                self._lines.setdefault(_shard_of(line), []).append(line)
        self._parsed: dict[str, tuple[frozenset[str], dict[str, dict[str, Any]]]] = {}

    def dropped(self, shard: str) -> frozenset[str]:
        """Keys of the samples of a shard that are left out."""
        return self._merged(shard)[0]

    def edits(self, shard: str) -> dict[str, dict[str, Any]]:
        """For the samples of a shard that are changed: key to the fields of the record that are replaced."""
        return self._merged(shard)[1]

    def apply(self, shard: str, sample: Sample) -> Sample:
        """A sample of a shard that is not dropped, as the filters left it."""
        changed = self.edits(shard).get(sample.key)
        return replace(sample, record={**sample.record, **changed}) if changed else sample

    def describe(self) -> list[dict[str, str]]:
        """What names the curated data in a cache or a checkpoint: filters that changed something, and their hashes."""
        changing = [entry for entry in self.applied if entry["counts"]["dropped"] or entry["counts"]["edited"]]
        return [{"filter": entry["filter"], "sha256": entry["sha256"]} for entry in changing]

    def _merged(self, shard: str) -> tuple[frozenset[str], dict[str, dict[str, Any]]]:
        if shard not in self._lines:
            return _NOTHING
        if shard not in self._parsed:
            dropped: set[str] = set()
            edits: dict[str, dict[str, Any]] = {}
            for line in map(json.loads, self._lines[shard]):
                dropped.update(line["dropped"])
                for key, fields in line["edits"].items():
                    edits[key] = {**edits.get(key, {}), **fields}
            for key in dropped & edits.keys():
                del edits[key]
            while len(self._parsed) >= _PARSED_SHARDS:
                del self._parsed[next(iter(self._parsed))]
            self._parsed[shard] = (frozenset(dropped), edits)
        return self._parsed[shard]


def overlay_line(shard: str, dropped: Iterable[str], edits: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The line of one shard in an overlay file; its bytes depend on nothing else."""
    line = {"shard": shard, "dropped": list(dropped), "edits": edits}
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _shard_of(line: bytes) -> str:
    try:
        return json.loads(line.partition(b', "dropped": ')[0] + b"}")["shard"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{FOLDER}/: an overlay has a line without a shard; undo its filter and apply it") from None


def parse_index(text: bytes, name: str) -> dict[str, Any]:
    """An index out of the text of the file or page `name`.

    Raises:
        ValueError: it is broken or of another schema.
    """
    try:
        index = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error}); `visplice data curate DIR --undo all` removes it") from None
    found = index.get("schema") if isinstance(index, dict) else type(index).__name__
    if found != OVERLAY_SCHEMA:
        raise ValueError(f"{name}: schema is {found!r}; this version reads {OVERLAY_SCHEMA}")
    try:
        whole = isinstance(index["data"], str) and all(
            {"options", "examples"} <= entry.keys()
            and all(isinstance(entry[field], str) for field in ("file", "sha256", "filter"))
            and all(isinstance(entry["counts"][field], int) for field in ("dropped", "edited"))
            and re.fullmatch(r"\d+-[\w-]+\.jsonl", entry["file"])
            for entry in index["applied"]
        )
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{name}: entries lack fields; `visplice data curate DIR --undo all` removes it")
    return index


def read_curation(read: Callable[[str], bytes], manifest: Mapping[str, Any], where: str) -> Curation:
    """The curation of a data set that lies anywhere.

    Args:
        read: the bytes of a file by its path relative to the data set; FileNotFoundError where there is none.
        manifest: of the data set.
        where: folder or URL, for messages.
    Raises:
        ValueError: the curation belongs to another data set, or is broken.
    """
    try:
        text = read(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        return Curation()
    index = parse_index(text, f"{where}/{INDEX}")
    if index["data"] != fingerprint(manifest):
        names = ", ".join(entry["filter"] for entry in index["applied"])
        raise ValueError(
            f"{where}/{INDEX}: {names} was applied to other shards, the data set was made again since; take it back "
            "with `visplice data curate DIR --undo all` and apply it anew"
        )
    return _read_overlays(read, index["applied"], where)


def _read_overlays(read: Callable[[str], bytes], applied: Sequence[Mapping[str, Any]], where: str) -> Curation:
    overlays = []
    for entry in applied:
        try:
            overlays.append(read(f"{FOLDER}/{entry['file']}"))
        except FileNotFoundError:
            raise ValueError(
                f"{where}/{FOLDER}/{entry['file']}: missing, though {entry['filter']} is applied; take it back with "
                f"`visplice data curate DIR --undo {entry['filter']}`"
            ) from None
    return Curation(applied, overlays)


def curation_of(folder: Path, applied: Sequence[Mapping[str, Any]]) -> Curation:
    """The curation by these overlays of a local folder, whatever its index says.

    Raises:
        ValueError: one is missing, or is not what its entry says.
    """
    return _read_overlays(lambda name: (folder / name).read_bytes(), applied, str(folder))


def load_curation(folder: str | Path, manifest: Mapping[str, Any] | None = None) -> Curation:
    """The curation of a local data folder; none is an empty one.

    Raises:
        ValueError: as `read_curation` does.
    """
    folder = Path(folder)
    found = read_manifest(folder) if manifest is None else manifest
    return read_curation(lambda name: (folder / name).read_bytes(), found, str(folder))
