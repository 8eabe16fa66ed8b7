"""Tokenizers: text to ids and back, and ids to text while they stream; one class for every LLaMA."""

import codecs
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from visplice.lm.tokenizer_files import open_tokenizer

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """The tokenizer of a LLaMA, whichever file it comes in (see `tokenizer_files`).

    Control tokens are reached through `control` alone: text that spells one is encoded as the letters it is made of.
    Ordinary text comes back from `decode(encode(text))` as it was, where the file itself keeps it: a `tokenizer.json`
    that puts a blank only before text without one cannot tell the two apart, and SentencePiece writes U+2581 for a
    blank. A lone surrogate, which UTF-8 cannot hold, counts as U+FFFD.
    """

    vocab_size: int  # ids, control tokens included
    bos_id: int | None
    eos_id: int | None

    def __init__(self, path: str | Path) -> None:
        self._file = open_tokenizer(Path(path))
        self.vocab_size = self._file.vocab_size
        self.bos_id, self.eos_id = self._file.bos_id, self._file.eos_id
        self._controls = dict(self._file.controls)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer file or the model folder that holds one.

        Raises:
            ValueError: there is no such file, or it is not a LLaMA's tokenizer.
        """
        return cls(path)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without begin or end tokens."""
        return self._file.encode(_without_surrogates(text))

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Ids as from `encode`, and for each the index in `text` of the first character that it covers.

        Starts never decrease. A blank that the tokenizer puts before the text starts where the text does; the tokens
        of one character's bytes all start at that character.
        """
        return self._file.encode_with_starts(_without_surrogates(text))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation; `visplice.lm.prompt.encode_chat` says what messages, templates and tools are."""
        from visplice.lm import prompt  # which imports this module

        return prompt.encode_chat(
            self, messages, template=template, add_generation_prompt=add_generation_prompt, tools=tools
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens are left out, and bytes that are no character show as U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        data = b"".join([self.token_bytes(token) for token in ids])
        if self._file.drops_blank and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """What the token adds to a text, in UTF-8: perhaps a part of a character, and nothing for a control token.

        Raises:
            ValueError: the id is not in the vocabulary.
        """
        data = self._bytes.get(token)
        if data is None:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"id {token} is not in the tokenizer's vocabulary; ids are 0 to {self.vocab_size - 1}")
            data = self._bytes[token] = self._file.token_bytes(token)
        return data

    @property
    def drops_blank(self) -> bool:
        """Whether the blank that a text's first token begins with belongs to the tokenizer, not to the text."""
        return self._file.drops_blank

    @property
    def controls(self) -> Mapping[str, int]:
        """Control tokens and their ids."""
        return MappingProxyType(self._controls)

    def control(self, token: str) -> int:
        """Id of a control token.

        Raises:
            ValueError: the tokenizer has no such control token.
        """
        if token not in self._controls:
            known = sorted(name for name in self._controls if "reserved_special_token" not in name)
            names = ", ".join(known) or "none"
            if reserved := len(self._controls) - len(known):
                names += f" and {reserved} reserved ones"
            raise ValueError(f"the tokenizer has no control token {token!r}; it has {names}")
        return self._controls[token]


class StreamDecoder:
    """Text of a growing id sequence, handed out only in complete characters; in all, what `decode` makes of the ids.

    A character of several bytes may spread over several tokens: its bytes wait here until the last one has come.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_blank = tokenizer.drops_blank  # until there is text: only the first piece loses its blank

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps empty.

        Raises:
            ValueError: the id is not in the vocabulary.
        """
        data = self._tokenizer.token_bytes(token)
        if self._drops_blank and data:
            self._drops_blank = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left when the sequence ends inside a character."""
        return self._utf8.decode(b"", final=True)


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
    return text
