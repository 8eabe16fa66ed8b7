"""The tensors of a checkpoint by name, whatever files they lie in: one at a time, memory-mapped where that is possible.

Read are, in this order of preference: safetensors (one file, shards with an index, shards without), `pytorch_model.bin`
(the same three) and Meta's `consolidated.NN.pth`, whose model-parallel slices are put together tensor by tensor. Names
stay as they were written. Nothing runs code from a checkpoint: `.bin` and `.pth` go through
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import re
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
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
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ZIP = b"PK\x03\x04"


class TensorStore(ABC):
    """Tensors by name; `folder` is where the files lie (`original/` where Meta's do)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def names(self) -> list[str]:
        """Every tensor, in the order in which reading is cheapest."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading the data."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which it is stored, without reading the data."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """The tensor on the CPU in its stored dtype: a view of the file where the format allows it.

        Writing to it changes this process's copy, never the file.
        """

    @abstractmethod
    def file_of(self, name: str) -> Path:
        """The file that holds it; the first of them where every file holds a slice."""

    def _absent(self, name: str) -> ValueError:
        names = self.names()
        return ValueError(f"{self.folder}: no tensor {name!r} among {len(names)}, such as {', '.join(names[:3])}")


def open_store(source: str | Path) -> TensorStore:
    """Finds out what lies in a folder (or opens one file) and checks it as far as that needs no weights to be read.

    Raises:
        ValueError: no checkpoint is there, or a file of it is missing, truncated, a git-LFS pointer, or contradicts
            the index or the other files.
    """
    source = Path(source)
    paths, index = _find(source)
    if _META_FILE.fullmatch(paths[0].name):
        return _MetaStore(paths)
    return _FileStore(source if source.is_dir() else source.parent, paths, index)


def read_tensor(source: str | Path, name: str) -> Tensor:
    """One tensor alone: with an index, no other shard is touched.

    Raises:
        ValueError: as `open_store`, and when there is no such tensor.
    """
    source = Path(source)
    _, index = _find(source)
    if index is not None and name in index.where:
        file = _open(source / index.where[name])
        index.check(file)
        return file.get(name)
    return open_store(source).get(name)


class _SafetensorsFile:
    """One safetensors file; every tensor is a view of one private mapping, and leaves memory when it is let go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="pt"):
                pass  # holds the header against the size of the file: shapes, dtypes, offsets without holes or overlap
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._header.pop("__metadata__", None)
        self._data = 8 + length
        self._views: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def names(self) -> list[str]:
        return sorted(self._header, key=lambda name: self._header[name]["data_offsets"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        stored = self._header[name]["dtype"]
        if stored not in _DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {stored}; only {', '.join(_DTYPES)} can be read")
        return _DTYPES[stored]

    def get(self, name: str) -> Tensor:
        shape, dtype = self.shape(name), self.dtype(name)
        start, end = (self._data + offset for offset in self._header[name]["data_offsets"])
        if end - start != math.prod(shape) * dtype.itemsize or end > len(self._map):
            raise ValueError(f"{self.path}: {name} does not lie inside the file, which changed while it was read")
        if start == end:
            return torch.empty(shape, dtype=dtype)
        view = self._views.get(name)
        if view is None:
            view = memoryview(self._map)[start:end]
            # Pages that were read count as this process's memory until they are unmapped, although they could be read
            # again: a checkpoint converted to another dtype would stand in memory twice. So they go with the tensor.
            # Pages shared with a neighbour stay.
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                weakref.finalize(view, self._map.madvise, mmap.MADV_DONTNEED, first, last - first).atexit = False
            self._views[name] = view
        if start % dtype.itemsize:  # old writers did not align the data
            return torch.frombuffer(bytearray(view), dtype=dtype).reshape(shape)
        return torch.frombuffer(view, dtype=dtype).reshape(shape)

    def close(self) -> None:
        pass


class _TorchFile:
    """One file of torch.save; mapped when it is a zip archive, read whole when it is older than that (torch < 1.6)."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
                raise ValueError(f"{self.path}: not a whole file of torch.save ({_first_line(error)})") from error
            raise ValueError(
                f"{self.path}: holds more than tensors ({foreign[1]}); reading that would run code that came with it, "
                "so it is refused; use the safetensors version of this checkpoint"
            ) from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.path}: holds a {type(content).__name__}; expected tensors by name")
        others = [name for name, value in content.items() if not isinstance(value, Tensor)]
        others = [name for name in others if not _IGNORED.search(str(name))]
        if others:
            raise ValueError(
                f"{self.path}: {others[0]!r} is a {type(content[others[0]]).__name__}; expected only tensors by name"
            )
        self._tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        self._meta = {name: value.to("meta") for name, value in self._tensors.items()}
        return self._tensors

    def meta(self) -> dict[str, Tensor]:
        """Shapes and dtypes, as tensors without data."""
        if self._meta is None:
            self._load()
        assert self._meta is not None
        return self._meta

    def names(self) -> list[str]:
        return list(self.meta())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.meta()[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.meta()[name].dtype

    def get(self, name: str) -> Tensor:
        return self._load()[name]

    def close(self) -> None:
        """Lets the data go; shapes and dtypes stay known."""
        self._tensors = None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _open(path: Path) -> _SafetensorsFile | _TorchFile:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(200)
    if start.startswith(_LFS_POINTER):
        size = re.search(rb"^size (\d+)$", start, re.MULTILINE)
        raise ValueError(
            f"{path}: a git-LFS pointer of {path.stat().st_size} bytes, not the file itself"
            + (f" ({int(size[1]):,} bytes)" if size else "")
            + f"; run `git lfs pull` in {path.parent}"
        )
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)


# ---- What lies in a folder

_META_FILE = re.compile(r"consolidated(?:\.(\d\d))?\.pth")
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


@dataclass(frozen=True, kw_only=True)
class _Index:
    """`*.index.json` of a sharded checkpoint: which file holds which tensor."""

    path: Path
    where: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> _Index:
        try:
            where = json.loads(path.read_text())["weight_map"]
            names = set(where.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an index with a weight_map ({_first_line(error)})") from error
        for name in names:
            # A path could lead out of the folder.
            if not isinstance(name, str) or name != Path(name).name:
                raise ValueError(f"{path}: names {name!r}; expected the name of a file beside it")
        missing = sorted(name for name in names if not (path.parent / name).is_file())
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} of {len(names)} files are not there: {_listing(missing)}; fetch them again"
            )
        return cls(path=path, where=where)

    def check(self, file: _SafetensorsFile | _TorchFile) -> None:
        promised = {name for name, where in self.where.items() if where == file.path.name}
        if lacking := sorted(promised - set(file.names())):
            raise ValueError(
                f"{file.path}: lacks {_listing(lacking)}, which {self.path.name} says it holds; "
                "fetch both from the same revision"
            )


def _listing(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _find(source: Path) -> tuple[list[Path], _Index | None]:
    """The files of the checkpoint at `source`, and its index where it has one."""
    if source.is_file():
        if source.suffix not in (".safetensors", ".bin", ".pth", ".pt"):
            raise ValueError(
                f"{source}: not a checkpoint; expected a folder, or a .safetensors, .bin, .pth or .pt file"
            )
        return [source], None
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if (source / f"{stem}{suffix}").is_file():
            return [source / f"{stem}{suffix}"], None
        index_file = source / f"{stem}{suffix}.index.json"
        if index_file.is_file():
            index = _Index.read(index_file)
            return [source / name for name in sorted(set(index.where.values()))], index
        pattern = "*.safetensors" if suffix == ".safetensors" else "pytorch_model-*-of-*.bin"
        found = [path for path in sorted(source.glob(pattern)) if not path.name.startswith("adapter_")]
        if found:
            _refuse_gaps(found)
            return found, None
    for folder in (source, source / "original"):
        found = [path for path in sorted(folder.glob("consolidated*.pth")) if _META_FILE.fullmatch(path.name)]
        if found:
            numbers = [path.name for path in found]
            expected = [f"consolidated.{number:02d}.pth" for number in range(len(found))]
            if numbers not in (expected, ["consolidated.pth"]):
                raise ValueError(f"{folder}: holds {_listing(numbers)}; expected {_listing(expected)} without a gap")
            return found, None
    there = sorted(path.name for path in source.iterdir())
    raise ValueError(
        f"{source}: no checkpoint; expected model.safetensors, its shards, pytorch_model.bin or consolidated.00.pth, "
        f"found {_listing(there) or 'nothing'}"
    )


def _refuse_gaps(paths: list[Path]) -> None:
    """Shards are numbered `-00001-of-00004`; without an index only that tells whether all are there."""
    shards: dict[tuple[str, int], list[int]] = {}
    for path in paths:
        if number := _NUMBERED.fullmatch(path.name):
            shards.setdefault((number[1], int(number[3])), []).append(int(number[2]))
    for (stem, count), numbers in shards.items():
        folder = paths[0].parent
        if beyond := [number for number in numbers if not 1 <= number <= count]:
            raise ValueError(f"{folder}: {stem} has a shard {beyond[0]} of {count}; they are numbered from 1")
        if lacking := sorted(set(range(1, count + 1)) - set(numbers)):
            raise ValueError(
                f"{folder}: {stem} has {len(numbers)} of {count} shards; {_listing([str(n) for n in lacking])} missing"
            )


class _FileStore(TensorStore):
    """Files that hold whole tensors."""

    def __init__(self, folder: Path, paths: list[Path], index: _Index | None) -> None:
        super().__init__(folder)
        self._files = {path.name: _open(path) for path in paths}
        self._index = index
        self._last: _SafetensorsFile | _TorchFile | None = None
        self._where: dict[str, str] = {}
        for key, file in self._files.items():
            # Headers of safetensors cost nothing; what a .bin holds is seen when it is read, until then its index counts.
            if index is not None and isinstance(file, _TorchFile):
                names = [name for name, where in index.where.items() if where == key]
            else:
                names = file.names()
                if index is not None:
                    index.check(file)
            for name in names:
                if name in self._where:
                    raise ValueError(
                        f"{folder}: {name} lies in {self._where[name]} and in {key}; expected it once, so "
                        "take away the files that do not belong to the checkpoint"
                    )
                self._where[name] = key

    def _file(self, name: str) -> _SafetensorsFile | _TorchFile:
        if name not in self._where:
            raise self._absent(name)
        file = self._files[self._where[name]]
        if self._index is not None and isinstance(file, _TorchFile):
            self._index.check(file)
        return file

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._file(name).dtype(name)

    def get(self, name: str) -> Tensor:
        file = self._file(name)
        if self._last is not None and self._last is not file:
            self._last.close()  # one .bin at a time: the oldest kind is read whole
        self._last = file
        return file.get(name)

    def file_of(self, name: str) -> Path:
        return self._file(name).path


# ---- Meta's slices

_IGNORED = re.compile(
    r"rope\.freqs$"  # computed again from the config
    r"|\._extra_state$|\.expert_activation_DE$|\.global_gate_stats_3E$"  # left by the training
    r"|^vision_embeddings\.|^vision_projection\."  # LLaMA 4's own eyes, no part of the decoder
)
# How a tensor was cut for model parallelism, by its name inside its layer; what is not here, each file holds whole.
# Follows fairscale's parallel layers, and llama-models' checkpoint.py for LLaMA 4.
_CUTS = {
    "tok_embeddings.weight": "table",  # LLaMA 1 and 2 by column, later ones by row
    "output.weight": "rows",
    "attention.wq.weight": "rows",
    "attention.wk.weight": "heads",
    "attention.wv.weight": "heads",
    "attention.wo.weight": "columns",
    "attention.wqkv.weight": "fused heads",
    "feed_forward.w1.weight": "rows",
    "feed_forward.w2.weight": "columns",
    "feed_forward.w3.weight": "rows",
    "feed_forward.mlp.fc1_weight": "fused halves",
    "feed_forward.mlp.fc2_weight": "columns",
    "feed_forward.w_in_shared_FD.weight": "rows",
    "feed_forward.w_swiglu_FD.weight": "rows",
    "feed_forward.w_out_shared_DF.weight": "columns",
    "feed_forward.experts.moe_w_in_eD_F": "expert columns",
    "feed_forward.experts.moe_w_swiglu_eD_F": "expert columns",
    "feed_forward.experts.moe_w_out_eF_D": "expert rows",
}


class _MetaStore(TensorStore):
    """`consolidated.NN.pth`: every file holds its slice of every tensor, and norms whole.

    Names are Meta's. Fused tensors stay fused, in the order of a model that was never cut: all queries, keys, values;
    all of w1, then w3. Experts are [E, D, F] and [E, F, D].
    """

    def __init__(self, paths: list[Path]) -> None:
        super().__init__(paths[0].parent)
        quantised = sorted(path.name for path in self.folder.glob("*_scales_*.pt"))
        if quantised:
            raise ValueError(f"{self.folder}: quantised weights ({_listing(quantised)}); expected the bf16 checkpoint")
        files = [_open(path) for path in paths]
        assert all(isinstance(file, _TorchFile) for file in files)
        self._files: list[_TorchFile] = files  # type: ignore[assignment]
        self._names = [name for name in self._files[0].names() if not _IGNORED.search(name)]
        for file in self._files[1:]:
            if odd := sorted({n for n in file.names() if not _IGNORED.search(n)} ^ set(self._names)):
                raise ValueError(
                    f"{file.path}: {_listing(odd)} in only one of this and {paths[0].name}; mixed checkpoints?"
                )
            for name in self._names:
                if file.shape(name) != self._files[0].shape(name) or file.dtype(name) != self._files[0].dtype(name):
                    raise ValueError(
                        f"{file.path}: {name} is {list(file.shape(name))} {file.dtype(name)}, in {paths[0].name} "
                        f"{list(self._files[0].shape(name))} {self._files[0].dtype(name)}; mixed checkpoints?"
                    )
        self._params = self._read_params()
        self._refuse_missing_slices()

    def _read_params(self) -> dict[str, Any]:
        path = self.folder / "params.json"
        try:
            params = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        if not isinstance(params, dict):
            raise ValueError(f"{path}: not a JSON object but {type(params).__name__}")
        return params

    def _refuse_missing_slices(self) -> None:
        """The numbers in the names do not tell how many files there should be, but the widths do."""
        if "norm.weight" not in self._names:
            return
        (width,) = self._files[0].shape("norm.weight")
        heads, head_dim = self._params.get("n_heads"), self._params.get("head_dim")
        expected = heads * head_dim if heads and head_dim else width
        columns = [name for name in self._names if name.endswith("attention.wo.weight")]
        for name in columns[:1]:
            found = self.shape(name)[-1]
            if found != expected:
                raise ValueError(
                    f"{self.folder}: {len(self._files)} slices of {name} make {found} columns, expected {expected}; "
                    f"{'files are missing' if found < expected else 'there are too many files'}"
                )

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._merge(name, [file.meta()[name] for file in self._slices(name)]).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._slices(name)[0].dtype(name)

    def get(self, name: str) -> Tensor:
        return self._merge(name, [file.get(name) for file in self._slices(name)])

    def file_of(self, name: str) -> Path:
        return self._slices(name)[0].path

    def _slices(self, name: str) -> list[_TorchFile]:
        if name not in self._names:
            raise self._absent(name)
        return self._files

    def _merge(self, name: str, parts: list[Tensor]) -> Tensor:
        """Puts the slices together; only their shapes where they are on the meta device."""
        within = re.sub(r"^layers\.\d+\.", "", name)
        layer = name.removesuffix(within)
        cut = _CUTS.get(within)
        if cut is None:
            self._refuse_difference(name, parts)
            return parts[0]
        if cut.startswith("expert"):
            experts = self._files[0].shape(f"{layer}feed_forward.router_DE")[1]
            parts = [part.reshape(experts, -1, part.shape[-1]) for part in parts]
        if len(parts) == 1:
            return parts[0]
        if cut == "table":
            cut = "rows" if parts[0].shape[1] == self._files[0].shape("norm.weight")[0] else "columns"
        if cut == "heads":
            return torch.cat(self._distinct(name, parts))
        if cut == "fused heads":
            queries = self._files[0].shape(f"{layer}attention.wo.weight")[1]
            pairs = (parts[0].shape[0] - queries) // 2
            q, k, v = zip(*(part.split((queries, pairs, pairs)) for part in parts), strict=True)
            return torch.cat([*q, *self._distinct(name, list(k)), *self._distinct(name, list(v))])
        if cut == "fused halves":
            return torch.cat([half for halves in zip(*(p.chunk(2) for p in parts), strict=True) for half in halves])
        return torch.cat(parts, dim={"rows": 0, "columns": -1, "expert rows": 1, "expert columns": -1}[cut])

    def _distinct(self, name: str, parts: list[Tensor]) -> list[Tensor]:
        """Where there are more files than key-value heads (405 B in 16 files), neighbours hold copies of one head."""
        heads = self._params.get("n_kv_heads") or len(parts)
        copies = max(1, len(parts) // heads)
        for start in range(0, len(parts), copies):
            self._refuse_difference(name, parts[start : start + copies])
        return parts[::copies]

    def _refuse_difference(self, name: str, parts: list[Tensor]) -> None:
        for file, part in zip(self._files, parts, strict=False):
            if not part.is_meta and not torch.equal(part, parts[0]):
                raise ValueError(
                    f"{file.path}: {name} differs from the other files, which all hold it whole; mixed checkpoints?"
                )
