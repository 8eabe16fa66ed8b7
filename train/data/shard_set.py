"""A folder of shards, here or behind a URL, opened for reading any sample of any shard."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from visplice.train.data.curation import Curation, load_curation, read_curation
from visplice.train.data.record import Fault, Sample, check_record
from visplice.train.data.remote import RemoteFolder, is_url
from visplice.train.data.shards import MANIFEST, parse_manifest, read_manifest
from visplice.train.data.tar_index import Slot, read_slot, scan_shard

_UNFINISHED = (".convert-*", "part-*-of-*.json", "*.partial")  # what a converting run leaves before its manifest


class ShardSet:
    """Shards with their manifest, or any local folder of tar files, which is then scanned once.

    Samples that curation dropped are not there: they have no slot and are not counted.

    Attributes:
        path: folder or URL, without what lets others in.
        names: of the shards, in order.
        counts: samples of each, those with a fault included.
        manifest: as written; `{}` where there is none.
        curation: the filters that apply.
        is_remote: whether shards are fetched before they are read.
    """

    def __init__(
        self, path: str | Path, *, cache: str | Path | None = None, cache_gb: float = 50.0, keep: int = 16
    ) -> None:
        """Opens a data set.

        Args:
            path: folder, or URL of any kind that fsspec knows.
            cache: folder for the shards of a URL; `~/.cache/visplice/shards` without it.
            cache_gb: 10^9 bytes that it takes.
            keep: shards that stay open and indexed.
        Raises:
            ValueError: there is no data set, or its manifest or curation is broken or of another schema.
            OSError: a shard of the manifest is missing, or the URL does not answer.
        """
        path = str(path).removeprefix("file://")
        self._keep, self._open = keep, OrderedDict[int, tuple[int, list[Slot]]]()
        self._remote = RemoteFolder(path, cache=cache, cache_gb=cache_gb) if is_url(path) else None
        self.is_remote = self._remote is not None
        self.path = self._remote.url if self._remote else path
        self.manifest: dict[str, Any] = {}
        self.curation = Curation()
        if self._remote is None and not (Path(path) / MANIFEST).exists() and (loose := _loose(Path(path))):
            self.names = [file.name for file in loose]
            self._stated = [len(scan_shard(file)) for file in tqdm(loose, desc=f"indexing {path}", unit="shard")]
            self.counts = list(self._stated)
            total = f"{sum(self.counts):,} samples in {len(loose):,} tar files"
            print(f"{path}: no {MANIFEST}, so its files are read as they are, {total}", file=sys.stderr)
            return
        if self._remote is None:
            self.manifest = read_manifest(path)
            self.curation = load_curation(path, self.manifest)
        else:
            self.manifest = _remote_manifest(self._remote)
            self.curation = read_curation(self._remote.read, self.manifest, self.path)
        self._entries: list[dict[str, Any]] = self.manifest["shards"]
        self.names = [entry["name"] for entry in self._entries]
        self._stated = [entry["samples"] for entry in self._entries]
        _check_entries(self._entries, self.path)
        self.counts = [self._count(shard) for shard in range(len(self.names))]

    def _count(self, shard: int) -> int:
        """Samples of a shard: what the manifest says, unless the file was changed since."""
        name, entry = self.names[shard], self._entries[shard]
        if self._remote is None:
            file = Path(self.path) / name
            try:
                size = file.stat().st_size
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{file}: no such file, but the manifest names it; copy it again, or make the data set again"
                ) from None
            if size != entry["bytes"]:
                return len(self._index(shard, file))
        return entry["samples"] - len(self.curation.dropped(name))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # descriptors mean nothing in another process

    def describe(self) -> dict[str, Any]:
        """Path and number of samples for people, and a digest of what the shards hold."""
        shards: Any = [
            [entry["name"], entry["samples"], entry.get("sha256")] for entry in self.manifest.get("shards", ())
        ]
        content = [shards or self.names, self.counts, self.curation.describe()]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return {"path": self.path, "samples": sum(self.counts), "digest": digest}

    def slots(self, shard: int) -> list[Slot]:
        """The samples of a shard in their order."""
        return self._opened(shard)[1]

    def read(self, shard: int, slot: int, *, images: bool = True) -> Sample:
        """One sample, as curation left it.

        Args:
            images: whether picture bytes are read; without, every picture is empty bytes.
        Raises:
            Fault: it cannot be used.
            OSError: the shard cannot be read or fetched.
        """
        descriptor, slots = self._opened(shard)
        sample = read_slot(descriptor, slots[slot], images=images)
        curated = self.curation.apply(self.names[shard], sample)
        if curated is not sample:
            check_record(curated.record)
        return curated

    def prefetch(self, shard: int) -> None:
        """Fetches a shard of a URL into the cache."""
        if self._remote is not None:
            self._local(shard)

    def check_cache(self, num_shards: int) -> None:
        """Raises ValueError if the cache cannot hold so many shards at a time."""
        if self._remote is not None:
            largest = sum(sorted(entry["bytes"] for entry in self._entries)[-num_shards:])
            if largest > self._remote.limit:
                raise ValueError(
                    f"{self.path}: {num_shards} shards are used at a time, up to {largest / 1e9:.3g} GB, but "
                    f"data.cache_gb is {self._remote.limit / 1e9:g}; raise it, or lower data.shuffle_shards"
                )

    def _local(self, shard: int) -> Path:
        if self._remote is None:
            return Path(self.path) / self.names[shard]
        entry = self._entries[shard]
        return self._remote.fetch(entry["name"], size=entry["bytes"], sha256=entry["sha256"])

    def _opened(self, shard: int) -> tuple[int, list[Slot]]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        file = self._local(shard)
        try:
            slots, descriptor = self._index(shard, file), os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            if self._remote is None:
                raise
            return self._opened(shard)  # another process made room in the cache just now
        if len(slots) != self.counts[shard]:
            os.close(descriptor)
            raise OSError(
                f"{file}: {len(slots):,} samples, but {self.counts[shard]:,} were counted; it was changed while it was "
                "read, or its manifest is of another data set"
            )
        while len(self._open) >= self._keep:
            os.close(self._open.popitem(last=False)[1][0])
        self._open[shard] = descriptor, slots
        return self._open[shard]

    def _index(self, shard: int, file: Path) -> list[Slot]:
        """Slots of a shard, as many as the manifest states unless it is a longer file by now.

        What is not found of them are slots with a fault; where the file is broken but the samples are all there, the
        break itself is no slot.
        """
        found, stated = scan_shard(file), self._stated[shard]
        for number in range(len(found), stated):
            message = f"{file}: {len(found):,} of {stated:,} samples are found"
            found.append(Slot(key=f"sample {number}", fault=Fault("truncated-tar", message)))
        for index in reversed(range(len(found))):
            if len(found) > stated and found[index].fault is not None and not found[index].members:
                del found[index]
        dropped = self.curation.dropped(self.names[shard])
        return [slot for slot in found if slot.fault is not None or slot.key not in dropped] if dropped else found


def _loose(folder: Path) -> Sequence[Path]:
    """The tar files of a folder without manifest.

    Raises:
        ValueError: it is a data set that is not finished.
    """
    if any(next(folder.glob(pattern), None) for pattern in _UNFINISHED):
        raise ValueError(
            f"{folder}: the data set is not finished, it has no {MANIFEST} yet; run the same `visplice data convert` "
            "again, or `visplice data merge` if it was made in parts"
        )
    return sorted(folder.glob("*.tar"))


def _remote_manifest(remote: RemoteFolder) -> dict[str, Any]:
    where = f"{remote.url}/{MANIFEST}"
    try:
        return parse_manifest(remote.read(MANIFEST), where)
    except FileNotFoundError:
        raise ValueError(f"{where}: no such file; data.path is a folder of shards with a {MANIFEST}") from None


def _check_entries(entries: Sequence[dict[str, Any]], path: str) -> None:
    """Refuses entries that name files elsewhere: names and hashes become paths."""
    for entry in entries:
        name, sha256 = entry["name"], entry.get("sha256")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{path}/{MANIFEST}: shard {name!r} leads out of the folder")
        if not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
            raise ValueError(f"{path}/{MANIFEST}: shard {name!r} has sha256 {sha256!r}; it is 64 hexadecimal digits")
