"""Tokenizers: text to ids and back, and ids to text while they stream."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers


class Tokenizer:
    """A `tokenizer.json` file (the Hugging Face tokenizers format).

    Control tokens are reached through `control` alone: text that spells one is encoded as the letters it is made of.
    """

    def __init__(self, path: str | Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.encode_special_tokens = True
        self._controls = {
            token.content: index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json` file or the folder that holds one.

        Raises:
            ValueError: there is no such file, or it is not a tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file}: no such tokenizer file; a model folder holds its tokenizer.json")
        try:
            return cls(file)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"{file}: not a tokenizer.json ({error})") from error

    @property
    def vocab_size(self) -> int:
        """Ids, control tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without begin or end tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def control(self, token: str) -> int:
        """Id of a control token.

        Raises:
            ValueError: the tokenizer has no such control token.
        """
        if token not in self._controls:
            known = ", ".join(sorted(self._controls)) or "none"
            raise ValueError(f"the tokenizer has no control token {token!r}; it has {known}")
        return self._controls[token]


class StreamDecoder:
    """Text of a growing id sequence, handed out only in complete characters.

    A character of several bytes may spread over several tokens; until its last byte is there, a decoder shows the
    replacement character, which must not reach the reader.
    """

    _BROKEN = "\N{REPLACEMENT CHARACTER}"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0  # ids whose text was handed out

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps empty."""
        self._ids.append(token)
        # The ids before are decoded along, since a token's text can depend on what stands before it.
        before = self._tokenizer.decode(self._ids[: self._done])
        text = self._tokenizer.decode(self._ids)
        if text.endswith(self._BROKEN):
            return ""
        self._done = len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """What is left when the sequence ends inside a character."""
        before = self._tokenizer.decode(self._ids[: self._done])
        self._done = len(self._ids)
        return self._tokenizer.decode(self._ids)[len(before) :]
