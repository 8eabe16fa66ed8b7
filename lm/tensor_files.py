"""One file of tensors: safetensors, or what torch.save wrote; memory-mapped where the format allows it."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import pickle
import re
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MADV_POPULATE_READ = 22  # Linux; maps all pages at once, a third of the time that faults one by one take
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ZIP = b"PK\x03\x04"


class TensorStore(ABC):
    """Tensors by name; `path` is the folder or the file where they lie."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def folder(self) -> Path:
        """Where the files lie, and what describes them: for Meta's that can be `original/`."""
        return self.path if self.path.is_dir() else self.path.parent

    @abstractmethod
    def names(self) -> list[str]:
        """Every tensor, in the order in which converting them needs least memory: the largest come first.

        While one is converted it stands in memory twice; that counts least while few others are there. Of `.bin` files
        one is opened after the other.
        """

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading the data."""

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which it is stored, without reading the data."""

    @abstractmethod
    def get(self, name: str, *, whole: bool = False) -> Tensor:
        """The tensor on the CPU in its stored dtype: a view of the file where the format allows it.

        `whole` says that all of it will be read now, to be cast or copied. Writing to it changes this process's copy,
        never the file.
        """

    @abstractmethod
    def file_of(self, name: str) -> Path:
        """The file that holds it; the first of them where every file holds a slice."""

    def absent(self, name: str) -> ValueError:
        names = self.names()
        return ValueError(f"{self.path}: no tensor {name!r} among {len(names)}, which are {listing(names)}")


class TensorFile(TensorStore):
    """One file; `close` lets go of what was read, and the next `get` reads again."""

    def file_of(self, name: str) -> Path:
        if name not in self.names():
            raise self.absent(name)
        return self.path

    def close(self) -> None:
        """Tensors that were handed out stay valid."""


def open_file(path: Path) -> TensorFile:
    """A `.safetensors` file, or one of torch.save under any other name; the latter is not read yet.

    Raises:
        ValueError: it is missing, a git-LFS pointer, or not a whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if start.startswith(_LFS_POINTER):
        size = re.search(rb"^size (\d+)$", start, re.MULTILINE)
        raise ValueError(
            f"{path}: a git-LFS pointer, not the file itself"
            + (f" of {int(size[1]):,} bytes" if size else "")
            + f"; run `git lfs pull` in {path.parent}"
        )
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


class SafetensorsFile(TensorFile):
    """Every tensor is a view of one private mapping of the file, and leaves memory when it is let go."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with safe_open(str(path), framework="pt"):
                pass  # holds the header against the size of the file: shapes, dtypes, no overlap, no hole
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._header.pop("__metadata__", None)
        self._data = 8 + length
        self._views: weakref.WeakValueDictionary[str, memoryview] = weakref.WeakValueDictionary()

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._header:
            raise self.absent(name)
        return self._header[name]

    def names(self) -> list[str]:
        return sorted(self._header, key=self.numel, reverse=True)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        stored = self._entry(name)["dtype"]
        if stored not in _DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {stored}; only {', '.join(_DTYPES)} can be read")
        return _DTYPES[stored]

    def get(self, name: str, *, whole: bool = False) -> Tensor:
        shape, dtype = self.shape(name), self.dtype(name)
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        start, end = (self._data + offset for offset in self._entry(name)["data_offsets"])
        if end - start != math.prod(shape) * dtype.itemsize or end > len(self._map):
            raise ValueError(f"{self.path}: {name} lies outside the file, which changed while it was read")
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = memoryview(self._map)[start:end]
            # What was read counts as memory of this process until it is unmapped, although the file could be read
            # again: a checkpoint converted to another dtype would stand in memory twice. So pages go with their
            # tensor, but for those that it shares with a neighbour.
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                weakref.finalize(view, self._map.madvise, mmap.MADV_DONTNEED, first, last - first).atexit = False
        if whole and sys.platform == "linux":
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # a kernel before 5.14 maps page by page, as they are read
                self._map.madvise(_MADV_POPULATE_READ, first, end - first)
        if start % dtype.itemsize:  # some old writers did not align the data
            return torch.frombuffer(bytearray(view), dtype=dtype).reshape(shape)
        return torch.frombuffer(view, dtype=dtype).reshape(shape)


class TorchFile(TensorFile):
    """Mapped when it is a zip archive, read whole when it is older than those (torch < 1.6)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._tensors: dict[str, Tensor] | None = None
        self._meta: dict[str, Tensor] | None = None

    def _load(self) -> dict[str, Tensor]:
        if self._tensors is not None:
            return self._tensors
        with self.path.open("rb") as file:
            zipped = file.read(len(_ZIP)) == _ZIP
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # a broken pickle can fail in any way
            foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if foreign is None:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise ValueError(f"{self.path}: not a whole file of torch.save ({reason}); fetch it again") from error
            raise ValueError(
                f"{self.path}: holds more than tensors ({foreign[1]}), and reading that would run code that came with "
                "it, so it is refused; use the safetensors version of this checkpoint"
            ) from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.path}: holds a {type(content).__name__}; expected tensors by name")
        for name, value in content.items():
            # Transformer Engine leaves empty entries.
            if not isinstance(value, Tensor) and not str(name).endswith("._extra_state"):
                raise ValueError(f"{self.path}: {name!r} is a {type(value).__name__}; expected tensors by name")
        self._tensors = {name: value.detach() for name, value in content.items() if isinstance(value, Tensor)}
        self._meta = {name: value.to("meta") for name, value in self._tensors.items()}
        return self._tensors

    def meta(self, name: str) -> Tensor:
        """Shape and dtype, as a tensor without data."""
        if self._meta is None:
            self._load()
        assert self._meta is not None
        if name not in self._meta:
            raise self.absent(name)
        return self._meta[name]

    def names(self) -> list[str]:
        if self._meta is None:
            self._load()
        assert self._meta is not None
        return sorted(self._meta, key=self.numel, reverse=True)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.meta(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.meta(name).dtype

    def get(self, name: str, *, whole: bool = False) -> Tensor:
        self.meta(name)  # refuses a name that is not there
        return self._load()[name]

    def close(self) -> None:
        self._tensors = None


def listing(names: Sequence[str]) -> str:
    """The first ten, and how many more."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
