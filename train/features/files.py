"""Files of frozen features: safetensors that hold the usable samples of one shard, in their order.

`features-000000.safetensors`, features in bfloat16:

    cls       [P, d_vision]     one vector per picture: CLS, or the mean of the patches of an encoder without it
    captions  [C, d_lm]         mean embedding of each caption's own tokens
    offsets   [n + 1, 3]        int64: where the pictures, the captions and the key (bytes) of sample i begin
    keys      [bytes]           the keys, UTF-8, one after the other
    scale     [S, N, d_vision]  visual tokens of a few pictures, for the scale that cosine leaves free

`tokens-000000.safetensors`, on request, holds the visual tokens of all pictures: `tokens [P, N, d_vision]`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_DTYPES = {"BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
_HEADER = 256  # bytes kept for the header of a file of tokens, which are not counted before the last is there
_NOTE = "visplice"  # the one field of metadata: the library writes several in any order


def features_name(shard: int) -> str:
    return f"features-{shard:06d}.safetensors"


def tokens_name(shard: int) -> str:
    return f"tokens-{shard:06d}.safetensors"


class FeatureFile:
    """The tensors of one file, views of its mapping, which holds no descriptor; and the note in its header."""

    def __init__(self, file: Path) -> None:
        """Maps a file.

        Raises:
            ValueError: it is missing or broken.
        """
        try:
            with safe_open(str(file), framework="pt") as opened:  # holds the header against the size of the file
                metadata = opened.metadata() or {}
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            size = file.stat().st_size
            content = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)[8 + length :]
            self.note: dict[str, Any] = json.loads(metadata.get(_NOTE, "{}"))
            self.tensors = {name: _view(content, entry) for name, entry in header.items()}
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file") from None
        except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{file}: no whole file of features ({error})") from error

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def _view(content: Tensor, entry: Mapping[str, Any]) -> Tensor:
    first, last = entry["data_offsets"]
    return content[first:last].view(_DTYPES[entry["dtype"]]).view(entry["shape"])


def write_features(file: Path, tensors: dict[str, Tensor], note: Mapping[str, Any]) -> None:
    """Writes a file beside its place, syncs it and renames it; the same tensors give the same bytes."""
    data = save(tensors, metadata={_NOTE: json.dumps(note)})
    partial = file.with_name(file.name + ".partial")
    with open(partial, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


class TokensFile:
    """`tokens [P, N, d_vision]` of one shard, written as they come: half a gigabyte for a thousand pictures."""

    def __init__(self, file: Path, num_tokens: int, d_vision: int) -> None:
        self._file, self._partial = file, file.with_name(file.name + ".partial")
        self._shape = (num_tokens, d_vision)
        self._count = 0
        self._stream = open(self._partial, "wb")  # noqa: SIM115  closed by `close` and `discard`
        self._stream.write(bytes(_HEADER))

    def add(self, tokens: Tensor) -> None:
        """Appends bfloat16 tokens `[p, N, d_vision]`."""
        self._stream.write(tokens.contiguous().view(torch.uint8).numpy().data)
        self._count += len(tokens)

    def close(self) -> dict[str, Any]:
        """Syncs the file and puts it into place; returns name, bytes and sha256."""
        size = self._stream.tell() - _HEADER
        shape = [self._count, *self._shape]
        header = json.dumps({"tokens": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
        self._stream.seek(0)
        self._stream.write((_HEADER - 8).to_bytes(8, "little") + header.ljust(_HEADER - 8))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._partial, self._file)
        return {"name": self._file.name, **weigh(self._file)}

    def discard(self) -> None:
        """Lets go of a file that will not be finished, so that a full disk has room again."""
        with contextlib.suppress(OSError):  # what waits in the buffer does not fit either
            self._stream.close()
        self._partial.unlink(missing_ok=True)


def weigh(file: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}
