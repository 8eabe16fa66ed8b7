"""WebDataset shards: tar files of samples, and the manifest that says which are whole.

`manifest.json` is written last, so a folder without one is no finished data set:

    {"schema": 2, "source": {...}, "samples": 2500, "images": 2500, "bytes": 123456,
     "shards": [{"name": "shard-000000.tar", "samples": 1000, "images": 1000, "bytes": 61440, "sha256": "..."}, ...]}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import webdataset as wds

from visplice.train.data.record import SCHEMA, Sample
from visplice.train.data.tar_index import read_slot, scan_shard

MANIFEST = "manifest.json"
_TOTALS = ("samples", "images", "bytes")


class _Hashed:
    """A file opened for writing that knows the SHA-256 of what went through it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest, self.length = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.length += len(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self.length

    def flush(self) -> None:
        self._stream.flush()


def write_shard(file: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Writes one shard beside its place, syncs it and renames it; the same samples give the same bytes.

    Returns:
        Its entry in the manifest.
    Raises:
        ValueError: a key holds a dot behind its last slash, where WebDataset would end it.
    """
    partial = file.with_name(file.name + ".partial")
    num_samples = num_images = 0
    with open(partial, "wb") as raw:
        stream = _Hashed(raw)
        with wds.TarWriter(stream, mtime=0, encoder=False) as tar:
            for sample in samples:
                if "." in sample.key.rpartition("/")[2]:
                    raise ValueError(f"sample key {sample.key!r} holds a dot, where WebDataset would end it")
                record = {"images": [suffix for suffix, _ in sample.images], **sample.record}
                members: dict[str, Any] = {"__key__": sample.key, **dict(sample.images)}
                members["json"] = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
                tar.write(members)
                num_samples += 1
                num_images += len(sample.images)
        raw.flush()
        os.fsync(raw.fileno())
    os.replace(partial, file)
    return {
        "name": file.name,
        "samples": num_samples,
        "images": num_images,
        "bytes": stream.length,
        "sha256": stream.digest.hexdigest(),
    }


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.tar"


def write_shards(
    samples: Iterable[Sample], folder: str | Path, *, source: dict[str, Any], per_shard: int = 1000
) -> None:
    """Writes samples to `shard-000000.tar`, ... and the manifest, in place of what the folder held.

    Raises:
        ValueError: as `write_shard` does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for stale in folder.glob("shard-*.tar*"):
        stale.unlink()
    shards: list[dict[str, Any]] = []
    pending: list[Sample] = []
    for sample in samples:
        pending.append(sample)
        if len(pending) == per_shard:
            shards.append(write_shard(folder / shard_name(len(shards)), pending))
            pending.clear()
    if pending:
        shards.append(write_shard(folder / shard_name(len(shards)), pending))
    write_manifest(folder, source=source, shards=shards)


def write_manifest(folder: Path, *, source: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
    """Writes the manifest of finished shards."""
    totals = {name: sum(shard[name] for shard in shards) for name in _TOTALS}
    write_json(folder / MANIFEST, {"schema": SCHEMA, "source": source, **totals, "shards": list(shards)})


def write_json(file: Path, value: Any) -> None:
    """Writes JSON beside its place and renames it, so that a reader sees the old file or the whole new one."""
    partial = file.with_name(file.name + ".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def parse_manifest(text: str | bytes, name: str) -> dict[str, Any]:
    """A manifest of this schema, out of the text of the file or page `name`.

    Raises:
        ValueError: it is broken or of another schema.
    """
    try:
        manifest = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"{name}: schema is {found!r}; this version reads {SCHEMA}")
    try:
        whole = {"source", *_TOTALS} <= manifest.keys() and all(
            isinstance(shard["name"], str) and all(isinstance(shard[total], int) for total in _TOTALS)
            for shard in manifest["shards"]
        )
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{name}: lacks source, totals, or shards with name and totals; make the data set again")
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a data folder.

    Raises:
        ValueError: it is missing or broken, or of another schema.
    """
    file = Path(folder) / MANIFEST
    try:
        return parse_manifest(file.read_bytes(), str(file))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: no such file; data.path is a folder of shards with a manifest.json") from None


def read_samples(files: Iterable[str | Path]) -> Iterator[Sample]:
    """Every sample of shard files, in order.

    Raises:
        Fault: a sample cannot be read.
    """
    for file in files:
        with open(file, "rb") as stream:
            for slot in scan_shard(file):
                yield read_slot(stream.fileno(), slot)
