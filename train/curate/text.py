"""Filters by language and by length."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from visplice.train.curate.verdict import (
    Filter,
    Removal,
    Verdict,
    caption_lines,
    question_answers,
    shown,
    without,
    without_captions,
)
from visplice.train.data.record import Sample

TEXTS = ("captions", "conversations")  # what is judged: every caption by itself, a conversation as a whole


def _check_fields(fields: tuple[str, ...]) -> None:
    if not fields or any(name not in TEXTS for name in fields):
        raise ValueError(f"--fields is {','.join(fields) or 'empty'}; it is some of {','.join(TEXTS)}")


def judged(record: Mapping[str, Any], fields: tuple[str, ...], *, answers: bool) -> Iterator[tuple[str, int, str]]:
    """Field, index and text of all that is judged. Turns rest on each other, so a conversation is one text."""
    captions = caption_lines(record, answers=answers)
    if "captions" in fields:
        yield from (("captions", index, caption) for index, caption in enumerate(captions))
    if "conversations" in fields and record.get("conversations") and (record.get("captions") or not captions):
        yield "conversations", 0, "\n".join(f"{question}\n{answer}" for question, answer in question_answers(record))


def verdict_of(record: Mapping[str, Any], bad: list[tuple[str, int, str, str]], noted: list[str]) -> Verdict:
    """The verdict where these texts (field, index, reason, example) are removed."""
    if not bad:
        return Verdict(noted=tuple(noted))
    captions = {index for field, index, _, _ in bad if field == "captions"}
    removed = tuple(Removal(reason, shown(example)) for _, _, reason, example in bad)
    if not any(field == "conversations" for field, _, _, _ in bad):
        drop, edits = without_captions(record, captions)
    else:
        drop, edits = without(record, captions=captions, pairs=range(len(record["conversations"])))
    return Verdict(drop=drop, edits=edits, removed=removed, noted=tuple(noted))


@dataclass(frozen=True, kw_only=True)
class Language(Filter):
    """Keeps captions and conversations in the given languages (py3langid).

    A text is removed when the languages to keep have less than `min_probability` together. Of captions in English,
    with names of places and goods in them, few fall below 0.02, and nearly all in other languages do, so it is low. A
    text of fewer letters cannot be judged, and stays.
    """

    name: ClassVar[str] = "language"
    keep: tuple[str, ...]  # ISO 639-1 codes
    min_probability: float = 0.02
    min_letters: int = 20  # Latin letters; one of another script counts as the bytes it has in UTF-8
    fields: tuple[str, ...] = TEXTS
    answers_are_captions: bool = False

    def __post_init__(self) -> None:
        _check_fields(self.fields)
        if not 0 < self.min_probability < 1:
            raise ValueError(f"--min-probability is {self.min_probability}; it lies between 0 and 1")
        known = set(_identifier().labels)
        unknown = [code for code in self.keep if code not in known]
        if unknown or not self.keep:
            raise ValueError(
                f"--keep {','.join(self.keep)}: {', '.join(unknown) or 'no language'} is none that is known; codes are "
                "such as en,de,fr (ISO 639-1)"
            )

    def measure(self, sample: Sample) -> Verdict:
        bad, noted = [], []
        for field, index, text in judged(sample.record, self.fields, answers=self.answers_are_captions):
            letters = "".join(letter for letter in text if letter.isalpha())
            if len(letters.encode("utf-8", "surrogatepass")) < self.min_letters:
                noted.append("too short to judge")
                continue
            ranked = _identifier().rank(text)
            if sum(probability for code, probability in ranked if code in self.keep) < self.min_probability:
                bad.append((field, index, f"language-{ranked[0][0]}", text))
        return verdict_of(sample.record, bad, noted)


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError("language needs the package py3langid: pip install 'visplice[data]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@dataclass(frozen=True, kw_only=True)
class Length(Filter):
    """Removes captions and conversations that are too short or too long, in words, characters or tokens."""

    name: ClassVar[str] = "length"
    min_words: int | None = None  # words stand between spaces; for Chinese, say, count characters
    max_words: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    tokenizer: str | None = None  # folder or file of the LLaMA's tokenizer, or 'embedded'
    fields: tuple[str, ...] = ("captions",)
    answers_are_captions: bool = False

    def __post_init__(self) -> None:
        _check_fields(self.fields)
        bounds = {unit: (getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")) for unit in _UNITS}
        if all(bound is None for pair in bounds.values() for bound in pair):
            raise ValueError("length without a bound removes nothing; give --min-words, --max-tokens or the like")
        for unit, (low, high) in bounds.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"--min-{unit} {low} is more than --max-{unit} {high}; nothing would be left")
        if bounds["tokens"] != (None, None):
            if self.tokenizer is None:
                raise ValueError("--min-tokens and --max-tokens need --tokenizer, the folder of the LLaMA")
            _tokenizer(self.tokenizer)

    def measure(self, sample: Sample) -> Verdict:
        bad = []
        for field, index, text in judged(sample.record, self.fields, answers=self.answers_are_captions):
            for unit in _UNITS:
                low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
                if low is None and high is None:
                    continue
                count = self._count(unit, text)
                if (low is not None and count < low) or (high is not None and count > high):
                    reason = f"too-few-{unit}" if low is not None and count < low else f"too-many-{unit}"
                    bad.append((field, index, reason, f"{count}: {text}"))
                    break
        return verdict_of(sample.record, bad, [])

    def _count(self, unit: str, text: str) -> int:
        if unit == "tokens":
            assert self.tokenizer is not None
            return len(_tokenizer(self.tokenizer).encode(text))
        return len(text.split()) if unit == "words" else len(text.strip())


_UNITS = ("words", "characters", "tokens")


@functools.cache
def _tokenizer(path: str) -> Any:
    from visplice.lm.extension import EMBEDDED, embedded_folder
    from visplice.lm.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(embedded_folder("lm") if path == EMBEDDED else path)
