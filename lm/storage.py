"""The tensors of a checkpoint by name, whatever files they lie in: one at a time, memory-mapped where that is possible.

Read are, in this order of preference: safetensors (one file, shards with an index, shards without), `pytorch_model.bin`
(the same three) and Meta's `consolidated.NN.pth`, whose model-parallel slices are put together tensor by tensor. Names
stay as they were written. Nothing runs code from a checkpoint: `.bin` and `.pth` go through
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from visplice.lm.model_parallel import META_FILE, ModelParallelStore
from visplice.lm.tensor_files import SafetensorsFile, TensorFile, TensorStore, listing, open_file

__all__ = ["TensorStore", "open_store", "read_tensor"]

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


def open_store(source: str | Path) -> TensorStore:
    """Finds out what lies in a folder, or opens one file, and checks it as far as that needs no weights to be read.

    Raises:
        ValueError: there is no checkpoint, or a file of it is missing, truncated, a git-LFS pointer, or contradicts
            the index or the other files. What a `.bin` holds is seen only when one of its tensors is asked for.
    """
    source = Path(source)
    paths, index = _find(source)
    if META_FILE.fullmatch(paths[0].name):
        return ModelParallelStore(paths)
    return open_file(source) if source.is_file() else _ShardStore(source, paths, index)


def read_tensor(source: str | Path, name: str) -> Tensor:
    """One tensor alone: where there is an index, no other shard is touched.

    Raises:
        ValueError: as `open_store`, and when there is no such tensor.
    """
    source = Path(source)
    paths, index = _find(source)
    if index is not None and name in index.where:
        return _ShardStore(source, [path for path in paths if path.name == index.where[name]], index).get(name)
    return open_store(source).get(name)


@dataclass(frozen=True, kw_only=True)
class _Index:
    """`*.index.json` of a sharded checkpoint: which file holds which tensor."""

    path: Path
    where: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> _Index:
        try:
            where = json.loads(path.read_text())["weight_map"]
            files = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{path}: not an index; expected {{"weight_map": {{tensor: file}}}}') from None
        # A path could lead out of the folder.
        if odd := [name for name in files if not isinstance(name, str) or not name or name != Path(name).name]:
            raise ValueError(f"{path}: names {odd[0]!r}; expected the name of a file beside it")
        if not files:
            raise ValueError(f"{path}: names no files")
        if missing := [name for name in files if not (path.parent / name).is_file()]:
            raise ValueError(
                f"{path}: {len(missing)} of {len(files)} files are missing: {listing(missing)}; fetch them again"
            )
        return cls(path=path, where=where)

    def names_in(self, path: Path) -> list[str]:
        return [name for name, file in self.where.items() if file == path.name]

    def check(self, file: TensorFile) -> None:
        """Raises ValueError when the file lacks a tensor that the index puts there."""
        if lacking := sorted(set(self.names_in(file.path)) - set(file.names())):
            raise ValueError(
                f"{file.path}: lacks {listing(lacking)}, which {self.path.name} says it holds; "
                "fetch both from the same revision"
            )


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
    for name, shards in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model-*-of-*.bin")):
        if (source / name).is_file():
            return [source / name], None
        if (source / f"{name}.index.json").is_file():
            index = _Index.read(source / f"{name}.index.json")
            return [source / file for file in sorted(set(index.where.values()))], index
        # An adapter (LoRA) is no model of its own.
        if found := [path for path in sorted(source.glob(shards)) if not path.name.startswith("adapter_")]:
            _refuse_gaps(found)
            return found, None
    for folder in (source, source / "original"):
        if found := [path for path in sorted(folder.glob("consolidated*.pth")) if META_FILE.fullmatch(path.name)]:
            names = [path.name for path in found]
            expected = [f"consolidated.{number:02d}.pth" for number in range(len(found))]
            if names not in (expected, ["consolidated.pth"]):
                raise ValueError(f"{folder}: holds {listing(names)}; expected {listing(expected)}, none missing")
            return found, None
    there = sorted(path.name for path in source.iterdir())
    raise ValueError(
        f"{source}: no checkpoint; expected model.safetensors or its shards, pytorch_model.bin or its shards, or "
        f"consolidated.00.pth, found {listing(there) or 'nothing'}"
    )


def _refuse_gaps(paths: list[Path]) -> None:
    """Shards are numbered like 00001-of-00004; without an index only that tells whether all are there."""
    shards: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if number := _NUMBERED.fullmatch(path.name):
            shards.setdefault((number[1], int(number[3])), set()).add(int(number[2]))
    for (stem, count), numbers in shards.items():
        folder = paths[0].parent
        if beyond := [number for number in sorted(numbers) if not 1 <= number <= count]:
            raise ValueError(f"{folder}: {stem} has a shard {beyond[0]} of {count}; expected 1 to {count}")
        if missing := sorted(set(range(1, count + 1)) - numbers):
            raise ValueError(
                f"{folder}: {stem} has {len(numbers)} of {count} shards, number {listing([*map(str, missing)])} is "
                "missing; fetch them again"
            )


class _ShardStore(TensorStore):
    """Files that hold whole tensors, with or without an index."""

    def __init__(self, folder: Path, paths: list[Path], index: _Index | None) -> None:
        super().__init__(folder)
        self._index = index
        self._where: dict[str, TensorFile] = {}
        self._last: TensorFile | None = None
        self._unchecked: set[TensorFile] = set()
        for path in paths:
            file = open_file(path)
            # The header of a safetensors file costs nothing; a .bin is believed to hold what its index says until it
            # is opened.
            if index is None or isinstance(file, SafetensorsFile):
                names = file.names()
                if index is not None:
                    index.check(file)
            else:
                names = index.names_in(path)
                self._unchecked.add(file)
            for name in names:
                if name in self._where:
                    raise ValueError(
                        f"{folder}: {name} lies in {self._where[name].path.name} and in {path.name}; expected it once: "
                        "take away the files that are not of this checkpoint"
                    )
                self._where[name] = file
        if all(isinstance(file, SafetensorsFile) for file in self._where.values()):
            self._where = {name: self._where[name] for name in sorted(self._where, key=self.numel, reverse=True)}

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._open(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._open(name).dtype(name)

    def get(self, name: str, *, whole: bool = False) -> Tensor:
        return self._open(name).get(name, whole=whole)

    def file_of(self, name: str) -> Path:
        if name not in self._where:
            raise self.absent(name)
        return self._where[name].path

    def _open(self, name: str) -> TensorFile:
        if name not in self._where:
            raise self.absent(name)
        file = self._where[name]
        if file is not self._last:
            if self._last is not None:
                self._last.close()  # one .bin at a time: the oldest kind is held whole
            if file in self._unchecked and self._index is not None:
                self._index.check(file)
                self._unchecked.remove(file)
            self._last = file
        return file
