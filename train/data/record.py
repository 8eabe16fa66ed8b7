"""One sample of a data set: the schema of its record, and the names of everything that can be wrong with it.

A sample is its pictures and `key.json`, members of a WebDataset shard:

    {"images": ["jpg"],                     suffixes of its pictures, in the order of the <image> marks;
                                            ["0.jpg", "1.png"] when there are several, [] for text alone
     "id": "...",                           what the source calls it
     "captions": ["...", ...],              for stage 1, any number
     "conversations": [{"from": "human", "value": "<image>\\nWhat ...?"},   for stage 2, LLaVA's form, turns alternating
                       {"from": "gpt", "value": "..."}],
     "questions": [{"question_id": 1, "question": "...", "answers": ["...", ...]}],    of a VQA set, as published
     "url": "..."}                          where the picture came from, if the source says it

Other fields are kept and ignored. A sample without `key.json` is a picture and a caption in `key.txt`, as img2dataset
writes them; a record without `images` owns every picture of its key.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visplice.vision.image_facts import IMAGE_FAULTS

SCHEMA = 2
_MAX_DEPTH = 100  # of lists and objects in each other; what data sets publish has ten at most
MARK = "<image>"  # where a picture stands in a turn of the human

FAULTS = {
    **IMAGE_FAULTS,
    "missing-image": "a picture that the record names is not there",
    "missing-record": "a picture without record or caption",
    "bad-json": "the record is not JSON",
    "not-utf8": "text or a name that is not UTF-8",
    "wrong-type": "a field of the record has another type than the schema",
    "no-image": "text alone, where a picture is needed",
    "no-text": "neither captions nor conversations, or empty ones",
    "no-answer": "a question that nobody answered",
    "no-question": "an answer whose question is not there",
    "bad-row": "a row of a table with too many or too few fields",
    "turn-order": "turns that do not alternate between human and gpt",
    "placeholder-count": "another number of <image> marks than of pictures",
    "duplicate-key": "a key that stood in the shard before",
    "duplicate-id": "an id that stood in the source before",
    "unsafe-name": "a member name that leads out of the folder, or is no plain file",
    "truncated-tar": "the shard ends before the sample does",
    "damaged-tar": "bytes in a shard that are no tar, or a shard that is none",
    "too-large": "a record or picture of more bytes than are read",
    "too-long": "more positions than the model or the run allows",
    "no-tokens": "a caption of which the tokenizer leaves nothing",
}

_SHORT = reprlib.Repr()  # of a value of any size, without writing out the whole of it
_SHORT.maxstring = _SHORT.maxother = 80


class Fault(ValueError):
    """Why one sample cannot be used: a name out of FAULTS to count it under, and a message for people."""

    def __init__(self, name: str, message: str) -> None:
        assert name in FAULTS, name
        # It quotes what came from elsewhere: no line breaks, no control codes of terminals, no halves of characters.
        super().__init__("".join(letter if letter.isprintable() else _escaped(letter) for letter in message))
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:  # it crosses process borders, and has two arguments
        return Fault, (self.name, str(self))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Key, pictures as they lie in the file (suffix and bytes; none for text alone), and the record."""

    key: str
    images: tuple[tuple[str, bytes], ...] = ()
    record: dict[str, Any]


def load_json(data: bytes) -> Any:
    """Decodes JSON that came from elsewhere; NaN and infinities, which JSON has not, become null.

    Raises:
        Fault: `not-utf8`, `bad-json`.
    """
    try:
        return json.loads(data.decode(), parse_constant=lambda name: None)
    except UnicodeDecodeError as error:
        raise Fault("not-utf8", f"the record is not UTF-8 ({error})") from None
    except (ValueError, RecursionError) as error:
        raise Fault("bad-json", f"the record is not JSON ({error})") from None


def has_text(record: Mapping[str, Any]) -> bool:
    """Whether a record has something to train on beside its pictures."""
    return bool(record.get("captions") or record.get("conversations"))


def check_record(record: Any) -> None:
    """Checks types, text and turns; whether the pictures fit is `check_marks`.

    Raises:
        Fault: `wrong-type`, `bad-json`, `not-utf8`, `no-text`, `no-answer`, `turn-order`.
    """
    if not isinstance(record, dict):
        raise Fault("wrong-type", f"the record is a {type(record).__name__}, not an object")
    check_depth(record)
    for field in ("images", "captions"):
        texts = record.get(field)
        if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise Fault("wrong-type", f"{field} is {_short(texts)}; it is a list of strings")
    captions, turns = record.get("captions") or [], record.get("conversations")
    if turns is not None:
        _check_turns(turns)
    asked = _question_texts(record.get("questions"))
    for text in (*captions, *(turn["value"] for turn in turns or ()), *asked):
        check_text(text)
    if any(not caption.strip() for caption in captions) or not has_text(record):
        raise Fault("no-text", "a caption is empty" if captions else "the record has no captions and no conversations")


def check_text(text: str) -> None:
    """Refuses what JSON can write and no tokenizer can read: half of a surrogate pair.

    Raises:
        Fault: `not-utf8`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Fault("not-utf8", f"{_short(text)} holds half of a surrogate pair ({error.reason})") from None


def check_depth(record: Mapping[str, Any]) -> None:
    """Refuses what JSON can read and neither JSON nor pickle can write: each level costs them a call.

    Raises:
        Fault: `bad-json`.
    """
    level: list[Any] = [record]
    for _ in range(_MAX_DEPTH):
        parts = (part for item in level for part in (item.values() if isinstance(item, dict) else item))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise Fault("bad-json", f"the record is nested more than {_MAX_DEPTH} deep")


def _question_texts(questions: Any) -> list[str]:
    """The questions of a VQA set and their answers.

    Raises:
        Fault: `wrong-type`.
    """
    texts: list[Any] = []
    if questions is not None and not isinstance(questions, list):
        raise Fault("wrong-type", f"questions is {_short(questions)}; it is a list of objects")
    for item in questions or ():
        answers = item.get("answers", []) if isinstance(item, dict) else None
        if not isinstance(answers, list):
            raise Fault("wrong-type", f"question {_short(item)} is not {{'question': text, 'answers': [text, ...]}}")
        texts += [item.get("question"), *answers]
    for text in texts:
        if not isinstance(text, str):
            raise Fault("wrong-type", f"a question or answer of it is {_short(text)}, not a string")
    return texts


def _check_turns(turns: Any) -> None:
    if not isinstance(turns, list):
        raise Fault("wrong-type", f"conversations is {_short(turns)}; it is a list of turns")
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise Fault("wrong-type", f"turn {_short(turn)} is not {{'from': 'human' | 'gpt', 'value': text}}")
    for index, turn in enumerate(turns):
        expected = ("human", "gpt")[index % 2]
        if turn["from"] != expected:
            raise Fault(
                "turn-order", f"turn {index} is from {turn['from']!r}; turns alternate, so {expected!r} is next"
            )
    if len(turns) == 1:
        raise Fault("no-answer", "the conversation is a question without an answer")
    if any(not turn["value"].strip() for turn in turns[1::2]):
        raise Fault("no-answer", "an answer is empty")


def check_marks(record: Mapping[str, Any], num_images: int) -> None:
    """Checks that every picture has its <image> mark; none at all puts the pictures in front of the first question.

    Raises:
        Fault: `placeholder-count`.
    """
    turns: Sequence[Mapping[str, str]] = record.get("conversations") or ()
    marks = sum(turn["value"].count(MARK) for turn in turns[0::2])
    if (turns and marks not in (0, num_images)) or (marks and not num_images):
        raise Fault("placeholder-count", f"the conversation has {marks} {MARK} marks, but {num_images} pictures")


def _short(value: Any) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
