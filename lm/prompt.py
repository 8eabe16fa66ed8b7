"""Prompts: messages to token ids, label mask and image slots, in one pass over the template.

Every segment is encoded once, where it stands, and the ids and the labels grow together. No prefix is encoded a second
time to find out how long it was, so the mask cannot drift from the ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visplice.lm.tokenizer import Tokenizer

IGNORE = -100  # label of a position that is not supervised
IMAGE = "<image>"  # stands for one picture in the text of a message


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a family of models writes a conversation; every string is one control token."""

    name: str
    begin: tuple[str, ...]  # before everything
    user: tuple[str, ...]  # before what the user says
    assistant: tuple[str, ...]  # before what the model says
    end: tuple[str, ...]  # behind what the model says; the first of them stops generation


TURNS = Template(name="turns", begin=("<|begin|>",), user=("<|user|>",), assistant=("<|assistant|>",), end=("<|end|>",))

TEMPLATES = {template.name: template for template in (TURNS,)}


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """The virtual ids of spliced images, directly above the vocabulary, which the model can neither embed nor emit."""

    vocab_size: int
    count: int  # visual tokens of one image, N

    @property
    def start(self) -> int:
        return self.vocab_size

    @property
    def end(self) -> int:
        return self.vocab_size + 1

    @property
    def patch(self) -> int:
        return self.vocab_size + 2

    def block(self) -> list[int]:
        """VIS_START, N placeholders, VIS_END."""
        return [self.start, *[self.patch] * self.count, self.end]


@dataclass(frozen=True)
class Prompt:
    """Ids with the image blocks in place, and for every id its label: itself where supervised, else `IGNORE`."""

    ids: list[int]
    labels: list[int]
    num_images: int

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


class PromptBuilder:
    """Turns messages into a `Prompt` for one tokenizer, template and number of visual tokens."""

    def __init__(self, tokenizer: Tokenizer, template: Template, visual: VisualTokens) -> None:
        self.tokenizer, self.template, self.visual = tokenizer, template, visual
        self._begin = self._controls(template.begin)
        self._user = self._controls(template.user)
        self._assistant = self._controls(template.assistant)
        self._end = self._controls(template.end)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return (self._end[0],)

    def _controls(self, names: Sequence[str]) -> list[int]:
        return [self.tokenizer.control(name) for name in names]

    def build(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> Prompt:
        """Encodes a conversation.

        Args:
            messages: `{"role": "user" | "assistant", "content": ...}`, users first and taking turns; content is text,
                or a list of `{"type": "text", "text": ...}` and `{"type": "image"}` parts. `<image>` in a user's text
                is an image part too.
            add_generation_prompt: end with the opening of the assistant's turn.
        Raises:
            ValueError: a role or part is unknown, out of turn, or an image stands in an answer.
        """
        ids, labels, num_images = list(self._begin), [IGNORE] * len(self._begin), 0
        for index, message in enumerate(messages):
            role, expected = message.get("role"), ("user", "assistant")[index % 2]
            if role != expected:
                raise ValueError(f"message {index + 1} has role {role!r} where {expected!r} is due; turns alternate")
            supervised = role == "assistant"
            new = list(self._user if not supervised else self._assistant)
            labels += [IGNORE] * len(new)
            ids += new
            for part in _parts(message.get("content"), split_images=not supervised):
                if part is None:
                    if supervised:
                        raise ValueError(f"message {index + 1} is an answer and holds an image; images belong to users")
                    new, num_images = self.visual.block(), num_images + 1
                else:
                    new = self.tokenizer.encode(part)
                ids += new
                labels += new if supervised else [IGNORE] * len(new)
            if supervised:
                ids += self._end
                labels += self._end
        if add_generation_prompt:
            if len(messages) % 2 == 0:
                raise ValueError("nothing to answer: the last message must be the user's")
            ids += self._assistant
            labels += [IGNORE] * len(self._assistant)
        return Prompt(ids, labels, num_images)


def _parts(content: Any, *, split_images: bool) -> list[str | None]:
    """Texts and, as None, images, in order; empty texts and the line breaks around images are dropped."""
    if isinstance(content, str):
        pieces: list[str | None] = []
        for number, piece in enumerate(content.split(IMAGE) if split_images else [content]):
            if number:
                pieces.append(None)
            if split_images:
                piece = piece.strip("\n")
            if piece:
                pieces.append(piece)
        return pieces
    if not isinstance(content, Sequence):
        raise ValueError(f"message content is {content!r}; it is text or a list of text and image parts")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            pieces.append(None)
        elif kind == "text" and isinstance(part.get("text"), str):
            if part["text"]:
                pieces.append(part["text"])
        else:
            raise ValueError(
                f"message part {part!r} is neither {{'type': 'text', 'text': ...}} nor {{'type': 'image'}}"
            )
    return pieces
