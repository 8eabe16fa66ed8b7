"""The Lightning data module of both stages: shards in, batches out."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from visplice.train.data.record import Fault
from visplice.train.data.shard_set import ShardSet


class ShardDataset(IterableDataset):
    """Prepared samples of a data folder, in another order every epoch."""

    def __init__(self, folder: Path, preparer: Any, *, seed: int | None, max_skipped: int) -> None:
        self._source = ShardSet(folder)
        self.num_samples = sum(self._source.counts)
        if not self.num_samples:
            raise ValueError(f"{folder}: the data set holds no samples")
        self._preparer, self._seed, self._max_skipped = preparer, seed, max_skipped
        self.epoch = 0

    def __len__(self) -> int:
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return self.num_samples // ranks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng, skipped = random.Random(0), 0  # validation draws the same captions every time
        slots = [(shard, slot) for shard, count in enumerate(self._source.counts) for slot in range(count)]
        if self._seed is not None:
            rng = random.Random(f"{self._seed} {self.epoch}")
            rng.shuffle(slots)
        worker = get_worker_info()
        if worker is not None:
            slots = slots[worker.id :: worker.num_workers]
        for shard, slot in slots:
            try:
                row = self._preparer(self._source.read(shard, slot), rng)
            except Fault as fault:
                skipped += 1
                print(f"skipped: {fault.name}: {fault}", file=sys.stderr)
                if skipped > self._max_skipped:
                    raise ValueError(
                        f"{skipped} samples could not be used, more than data.max_skipped {self._max_skipped}; "
                        f"the last one is {fault}"
                    ) from fault
                continue
            yield row
        self.epoch += 1


class ShardData(L.LightningDataModule):
    """Training and validation shards."""

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        max_skipped: int = 100,
    ) -> None:
        """Names the data.

        Args:
            path: folder of training shards with its manifest.json.
            val_path: folder of validation shards; none without it.
            batch_size: samples per step and rank.
            num_workers: processes that read and decode.
            seed: fixes the order.
            max_skipped: unusable samples that are named and passed over, per worker and epoch, before the run stops.
        """
        super().__init__()
        self.path, self.val_path = Path(path), Path(val_path) if val_path else None
        self.batch_size, self.num_workers, self.seed, self.max_skipped = batch_size, num_workers, seed, max_skipped
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}; it is at least 1")
        for folder in filter(None, (self.path, self.val_path)):
            ShardSet(folder)  # a wrong path is said before any model is loaded

    def _loader(self, folder: Path, *, train: bool) -> DataLoader:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        preparer = module.preparer
        seed = self.seed if train else None
        dataset = ShardDataset(folder, preparer, seed=seed, max_skipped=self.max_skipped)
        if train and len(dataset) < self.batch_size:
            raise ValueError(
                f"{folder} gives {len(dataset)} samples a rank, fewer than data.batch_size {self.batch_size}"
            )
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=preparer.collate,
            drop_last=train,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.path, train=True)

    def val_dataloader(self) -> DataLoader | list[Any]:
        return self._loader(self.val_path, train=False) if self.val_path else []
