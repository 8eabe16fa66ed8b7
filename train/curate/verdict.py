"""What every filter of curation is, and what it may do to one record."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from visplice.train.data.record import MARK, Sample

FIELDS = ("captions", "conversations", "questions")  # of a record, that hold text
_SHOWN = 100  # characters of an example


class Removal(NamedTuple):
    """One thing that is removed: the name it is counted under, and an example for the report, fit to be printed."""

    reason: str
    example: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a filter does to one sample."""

    drop: bool = False
    edits: dict[str, Any] = field(default_factory=dict)  # fields of the record that are replaced
    removed: tuple[Removal, ...] = ()
    noted: tuple[str, ...] = ()  # names of what could not be judged, and was left


class Located(NamedTuple):
    """What was measured of one sample, and where that lies."""

    shard: str
    key: str
    measured: Any


class Filter:
    """A rule of curation: an immutable dataclass of its options.

    `measure` sees one sample and may run in another process; `verdicts` sees what was measured of all, in order.
    """

    name: ClassVar[str]

    def reads_pictures(self, record: Mapping[str, Any]) -> bool:
        """Whether `measure` needs the bytes of the pictures of this record."""
        return False

    def measure(self, sample: Sample) -> Any:
        """What `verdicts` needs of a sample; of a filter that looks at one sample at a time, its Verdict."""
        raise NotImplementedError

    def verdicts(self, measured: Iterable[Located]) -> Iterator[tuple[str, str, Verdict]]:
        """Shard, key and verdict of samples, in their order; those without are left as they are."""
        yield from measured


def normalised(text: str) -> str:
    """Text as it is compared: Unicode NFKC, without case, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text.replace(MARK, " ")).casefold().split())


def digest(*parts: str | bytes) -> bytes:
    """16 bytes that stand for these parts in this order."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()


def shown(text: str) -> str:
    """Text on one line, cut, with nothing in it that a terminal would obey."""
    line = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in " ".join(text.split()))
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def question_answers(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Question and answer of every pair of turns, without <image> marks; a question without answer has ''."""
    turns = record.get("conversations") or []
    answers = [turn["value"] for turn in turns[1::2]] + [""]
    return [(turn["value"].replace(MARK, " ").strip(), answers[at]) for at, turn in enumerate(turns[0::2])]


def caption_lines(record: Mapping[str, Any], *, answers: bool) -> list[str]:
    """The captions of a record.

    Args:
        answers: whether the answer of a conversation of one pair is a caption, where there are no captions; LLaVA's
            data for stage 1 is written so. Then `without_captions` removes that pair.
    """
    captions = record.get("captions") or []
    if not captions and answers and len(record.get("conversations") or []) == 2:
        return [record["conversations"][1]["value"]]
    return list(captions)


def without_captions(record: Mapping[str, Any], removed: Collection[int]) -> tuple[bool, dict[str, Any]]:
    """As `without`, for indices into `caption_lines`."""
    return without(record, captions=removed) if record.get("captions") else without(record, pairs=removed)


def without(
    record: Mapping[str, Any], *, captions: Collection[int] = (), pairs: Collection[int] = ()
) -> tuple[bool, dict[str, Any]]:
    """Removes captions and pairs of turns by index: whether nothing is left, and the fields that are replaced.

    The <image> marks of a removed question go to the front of the next, or behind the last, so that every picture keeps
    its mark and its place in the order.
    """
    old_captions, old_turns = record.get("captions") or [], record.get("conversations") or []
    kept_captions = [caption for index, caption in enumerate(old_captions) if index not in captions]
    kept_turns: list[dict[str, str]] = []
    homeless = 0
    for index in range(0, len(old_turns), 2):
        pair = old_turns[index : index + 2]
        if index // 2 in pairs:
            homeless += pair[0]["value"].count(MARK)
        else:
            first = {**pair[0], "value": f"{MARK}\n" * homeless + pair[0]["value"]}
            kept_turns += [first, *pair[1:]]
            homeless = 0
    answered = len(kept_turns) > 1  # a question that nobody answered is no conversation
    if kept_turns and homeless:
        last = (len(kept_turns) - 1) // 2 * 2
        kept_turns[last] = {**kept_turns[last], "value": kept_turns[last]["value"] + f"\n{MARK}" * homeless}
    edits: dict[str, Any] = {}
    if len(kept_captions) != len(old_captions):
        edits["captions"] = kept_captions
    if len(kept_turns) != len(old_turns):
        edits["conversations"] = kept_turns if answered else []
    if not kept_captions and not answered:
        return True, {}
    return False, edits
