"""This process's place among those that `torchrun` started, if it did."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

_PATIENCE = timedelta(days=7)  # a slow process is waited for; one that died ends the others through torchrun


@dataclass(frozen=True, kw_only=True)
class Place:
    """Number of a process, from 0, and how many there are."""

    number: int = 0
    of: int = 1

    @property
    def first(self) -> bool:
        return self.number == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.of > 1:
            distributed.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Place, torch.device]]:
    """This process's place, and its device: of several GPUs its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Place(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Place(number=distributed.get_rank(), of=distributed.get_world_size()), device
    finally:
        distributed.destroy_process_group()
