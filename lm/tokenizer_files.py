"""Tokenizer files: which of the three kinds that LLaMAs come with a file is, told by what is in it.

    tokenizer.json     JSON of the Hugging Face tokenizers library: any LLaMA
    tokenizer.model    SentencePiece protobuf: LLaMA 1 and 2, Code Llama, Vicuna, Alpaca
    tokenizer.model    lines of "base64 rank", tiktoken's format: LLaMA 3 and 4

Each is read by the library that made it, from the disk alone.
"""

import re
from pathlib import Path
from typing import Protocol

from visplice.lm.tokenizer_json import JsonFile
from visplice.lm.tokenizer_sentencepiece import SentencePieceFile
from visplice.lm.tokenizer_tiktoken import TiktokenFile

# In the order of preference: tokenizer.json carries the tokens that were added after training.
_IN_FOLDER = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*(\n|$)")


class TokenizerFile(Protocol):
    """What `Tokenizer` asks of each kind."""

    vocab_size: int
    controls: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    drops_blank: bool  # decoding drops a blank that the text begins with, since encoding put it there

    def encode(self, text: str) -> list[int]: ...

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]: ...

    def token_bytes(self, token: int) -> bytes: ...


def find_tokenizer(path: Path) -> Path:
    """The tokenizer file at `path`, which is that file or a model folder.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        found = [path / name for name in _IN_FOLDER if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: no tokenizer in this folder; looked for {', '.join(_IN_FOLDER)}")
        return found[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer file; a model folder holds a tokenizer.json or a tokenizer.model")
    return path


def open_tokenizer(path: Path) -> TokenizerFile:
    """Opens a tokenizer file, or the one in a model folder.

    Raises:
        ValueError: there is none, it is of no known kind or not whole, or the files beside it contradict it.
    """
    file = find_tokenizer(path)
    with file.open("rb") as stream:
        head = stream.read(1024)
    if not head.strip():
        raise ValueError(f"{file}: the tokenizer file is empty; fetch it again")
    if head.startswith(_LFS_POINTER):
        raise ValueError(f"{file}: a git-LFS pointer, not the tokenizer itself; fetch it with `git lfs pull`")
    if head.lstrip().startswith(b"{"):
        return JsonFile(file)
    if head.startswith(b"\n"):  # tag of the protobuf's first piece
        return SentencePieceFile(file)
    if _TIKTOKEN_LINE.match(head):
        return TiktokenFile(file)
    raise ValueError(
        f"{file}: not a tokenizer; expected a tokenizer.json, a SentencePiece model or lines of 'base64 rank'"
    )
