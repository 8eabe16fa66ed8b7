"""A folder of shards, opened for reading any sample of any shard."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from visplice.train.data.record import Fault, Sample
from visplice.train.data.shards import MANIFEST, read_manifest
from visplice.train.data.tar_index import Slot, read_slot, scan_shard


class ShardSet:
    """Shards with their manifest, or any folder of tar files, which is then scanned once.

    Attributes:
        names: of the shards, in order.
        counts: samples of each, those with a fault included.
        manifest: as written; `{}` where there is none.
    """

    def __init__(self, path: str | Path, *, cache: str | Path | None = None, keep: int = 16) -> None:
        """Opens a folder.

        Args:
            path: of the folder.
            keep: shards that stay open and indexed.
        Raises:
            ValueError: there is no data set, or its manifest is of another schema.
            FileNotFoundError: a shard of the manifest is missing.
        """
        self.path, self._keep = str(path), keep
        self._open: OrderedDict[int, tuple[int, list[Slot]]] = OrderedDict()
        folder = Path(path)
        loose = sorted(folder.glob("*.tar"))
        if loose and not (folder / MANIFEST).exists():
            self.manifest: dict[str, Any] = {}
            self.names = [file.name for file in loose]
            self.counts = [len(scan_shard(file)) for file in tqdm(loose, desc=f"reading {folder}", unit="shard")]
            self._stated = list(self.counts)
        else:
            self.manifest = read_manifest(folder)
            self.names = [shard["name"] for shard in self.manifest["shards"]]
            self._stated = [shard["samples"] for shard in self.manifest["shards"]]
            self.counts = [self._count(shard) for shard in range(len(self.names))]

    def _count(self, shard: int) -> int:
        """Samples of a shard: what the manifest says, unless the file was changed since."""
        entry = self.manifest["shards"][shard]
        try:
            size = self._file(shard).stat().st_size
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self._file(shard)}: no such file, but the manifest names it; copy or make the data set again"
            ) from None
        return entry["samples"] if size == entry["bytes"] else len(self._scan(shard))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # descriptors mean nothing in another process

    def describe(self) -> dict[str, Any]:
        """Path and number of samples for people, and a digest of what the shards hold."""
        shards = self.manifest.get("shards") or [
            [name, self._file(index).stat().st_size] for index, name in enumerate(self.names)
        ]
        digest = hashlib.sha256(json.dumps([shards, self.counts], sort_keys=True).encode()).hexdigest()
        return {"path": self.path, "samples": sum(self.counts), "digest": digest}

    def _file(self, shard: int) -> Path:
        return Path(self.path) / self.names[shard]

    def _scan(self, shard: int) -> list[Slot]:
        """All slots of a shard; what the manifest counts beyond what is found are slots with a fault."""
        file = self._file(shard)
        slots = scan_shard(file)
        for number in range(len(slots), self._stated[shard]):
            fault = Fault(
                "truncated-tar", f"{file}: {len(slots)} samples found, {self._stated[shard]} stated in the manifest"
            )
            slots.append(Slot(key=f"{self.names[shard]} sample {number}", fault=fault))
        return slots

    def slots(self, shard: int) -> list[Slot]:
        """The samples of a shard in their order."""
        return self._opened(shard)[1]

    def read(self, shard: int, slot: int, *, images: bool = True) -> Sample:
        """One sample.

        Raises:
            Fault: it cannot be used.
        """
        descriptor, slots = self._opened(shard)
        return read_slot(descriptor, slots[slot], images=images)

    def _opened(self, shard: int) -> tuple[int, list[Slot]]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        slots = self._scan(shard)
        self._open[shard] = os.open(self._file(shard), os.O_RDONLY), slots
        while len(self._open) > self._keep:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[shard]
