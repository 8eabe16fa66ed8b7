"""Tells one frozen backbone from another, whatever file layout, dtype or device it was loaded from or to."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class Fingerprint:
    """A hash over names, shapes and up to 1,024 values of every tensor, rounded to bfloat16.

    The values lie in 16 runs, so that of a mapped file few pages are read. They are taken as they are stored: a float32
    value that first becomes a float16 may round to another bfloat16.
    """

    _RUNS, _LENGTH = 16, 64

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        flat, length = tensor.detach().reshape(-1), self._LENGTH
        if len(flat) > self._RUNS * length:
            starts = [run * (len(flat) - length) // (self._RUNS - 1) for run in range(self._RUNS)]
            flat = torch.cat([flat[start : start + length] for start in starts])
        values = flat.to("cpu", torch.bfloat16).contiguous()
        self._parts[name] = f"{name} {list(tensor.shape)}".encode() + values.view(torch.int16).numpy().tobytes()

    def hexdigest(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._parts):
            digest.update(self._parts[name])
        return digest.hexdigest()


def fingerprint(module: nn.Module) -> str:
    """The fingerprint that a module got when it was loaded, or that of its weights as they are."""
    stored = getattr(module, "fingerprint", None)
    if isinstance(stored, str):
        return stored
    parts = Fingerprint()
    for name, tensor in module.state_dict().items():
        parts.add(name, tensor)
    return parts.hexdigest()
