"""WebDataset shards: tar files of samples, and the manifest that says which are whole.

A sample is one picture (`key.png`, `.jpg`, ...; absent for text alone) and `key.json`:

    {"captions": ["...", ...],                                          for stage 1, any number
     "conversations": [{"from": "human", "value": "<image>What ...?"},  for stage 2, LLaVA's form, turns alternating
                       {"from": "gpt", "value": "..."}]}

`manifest.json` is written last, so a folder without one is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset as wds

SCHEMA = 1
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One member of a shard: key, picture as it lies in the file (None for text alone), and the record."""

    key: str
    image: bytes | None
    suffix: str = "png"
    record: dict[str, Any]


def write_shards(
    samples: Iterable[Sample], folder: str | Path, *, source: dict[str, Any], per_shard: int = 1000
) -> None:
    """Writes samples to `shard-000000.tar`, ... and the manifest.

    Shards and manifest are written beside their place and renamed; the same samples give the same bytes.

    Raises:
        ValueError: a key has a dot behind its last slash, where WebDataset would end it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    for stale in folder.glob("shard-*.tar*"):
        stale.unlink()
    shards: list[dict[str, Any]] = []
    pending: list[Sample] = []

    def flush() -> None:
        name = f"shard-{len(shards):06d}.tar"
        partial = folder / f"{name}.partial"
        with open(partial, "wb") as stream, wds.TarWriter(stream, mtime=0, encoder=False) as tar:
            for sample in pending:
                members: dict[str, Any] = {"__key__": sample.key}
                if sample.image is not None:
                    members[sample.suffix] = sample.image
                members["json"] = json.dumps(sample.record, ensure_ascii=False).encode()
                tar.write(members)
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        shards.append({"name": name, "samples": len(pending), "bytes": partial.stat().st_size, "sha256": digest})
        os.replace(partial, folder / name)
        pending.clear()

    for sample in samples:
        if "." in sample.key.rpartition("/")[2]:
            raise ValueError(f"sample key {sample.key!r} holds a dot, where WebDataset would end it")
        pending.append(sample)
        if len(pending) == per_shard:
            flush()
    if pending:
        flush()
    total = sum(shard["samples"] for shard in shards)
    write_json(folder / "manifest.json", {"schema": SCHEMA, "source": source, "samples": total, "shards": shards})


def write_json(file: Path, value: Any) -> None:
    """Writes JSON beside its place and renames it, so that a reader sees the old file or the whole new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, file)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a data folder whose shards are all there.

    Raises:
        ValueError: the manifest is missing or broken, of another schema, or a shard is missing or cut short.
    """
    file = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: no such file; data.path is a folder of shards with a manifest.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"{file}: schema is {found!r}; this version reads {SCHEMA}")
    try:
        expected = {file.parent / shard["name"]: shard["bytes"] for shard in manifest["shards"]}
        complete = {"source", "samples"} <= manifest.keys()
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{file}: lacks source, samples, or shards with name and bytes; make the data set again")
    for path, length in expected.items():
        size = path.stat().st_size if path.is_file() else None
        if size != length:
            what = "missing" if size is None else f"{size} bytes long"
            raise ValueError(f"{path}: {what}, the manifest says {length} bytes; make the data set again")
    return manifest


def read_samples(files: list[str], *, shuffle_seed: int | None, buffer: int = 1000) -> Iterator[Sample]:
    """Samples of shard files, this rank's and this worker's share; shuffled from a seed unless that is None.

    Raises:
        ValueError: a sample has no record, or its record is not JSON.
    """
    rng = random.Random(shuffle_seed)
    files = list(files)
    if shuffle_seed is not None:
        rng.shuffle(files)
    stages: list[Any] = [wds.SimpleShardList(files), wds.split_by_node, wds.split_by_worker]
    stages.append(wds.tarfile_to_samples(handler=wds.reraise_exception))
    if shuffle_seed is not None:
        stages.append(wds.shuffle(buffer, initial=buffer, rng=rng))
    for raw in wds.DataPipeline(*stages):
        key = raw["__key__"]
        suffix = next((s for s in IMAGE_SUFFIXES if s in raw), None)
        try:
            record = json.loads(raw["json"])
        except KeyError:
            raise ValueError(f"{raw['__url__']}: sample {key} has no {key}.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{raw['__url__']}: {key}.json is not JSON ({error})") from error
        yield Sample(key=key, image=raw[suffix] if suffix else None, suffix=suffix or "png", record=record)
