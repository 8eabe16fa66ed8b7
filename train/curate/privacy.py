"""Replaces e-mail addresses, telephone numbers, postal addresses and IP addresses in text by what they are.

Names of people are left: nothing that runs offline at this speed finds them without taking half the world's places for
people. Telephone numbers are those that libphonenumber takes for valid in one of the regions, if they are written as
such: with +, brackets, dashes or dots, or with spaces and a 0 in front. Digits in a row, and 12 345 678 or the like,
are more often something else, and count only behind a word such as "call".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, ClassVar

from visplice.train.curate.verdict import FIELDS, Filter, Removal, Verdict
from visplice.train.data.record import Sample

KINDS = ("email", "ip", "address", "phone")  # in the order in which they are looked for

_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+%'-]+(?:@|\s?[\[({]\s?at\s?[\])}]\s?)"
    r"(?:[\w-]+(?:\.|\s?[\[({]\s?dot\s?[\])}]\s?))+[^\W\d_]{2,}",
    re.IGNORECASE,
)
_IP = re.compile(
    r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}|[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){3,7})(?![\w:]|\.\d)", re.IGNORECASE
)
_VERSION = re.compile(r"\b(?:v|ver|version|firmware|release)\W{0,2}$", re.IGNORECASE)
_PHONE_WORD = (
    r"\b(?:call|tel|telephone|phone|ph|mobile|cell|fax|whatsapp|hotline|sms|telefon|téléphone|teléfono|telefono)\b"
    r"\W{0,3}(?:(?:number|no|nr|us|me|now|today|is|at|on|toll.free)\b\W{0,3}){0,2}"
)
_BEHIND_WORD = re.compile(_PHONE_WORD + r"(?P<number>[(+]{0,2}\d[\d\s().\-/]{5,18}\d)(?!\d)", re.IGNORECASE)
_ANY_NUMBER = re.compile(r"\d+|[1-9][\d\s]*|0\s[\d\s]*")
_WORD_BEFORE = re.compile(_PHONE_WORD + r"[(+]{0,2}$", re.IGNORECASE)
# What pyap does not know: any house with town, state and ZIP code; a box at the post office; streets on the Continent,
# where the number stands before or behind and the code before the town.
_STREET = (
    r"(?:\w+(?:straße|strasse|str\.|gasse|weg|platz|allee|straat|laan|gracht|plein|kade|vej|gatan|gata|veien)"
    r"|damrak|rokin"
    r"|(?:rue|avenue|boulevard|place|quai|impasse|chemin|calle|avenida|plaza|paseo|carrer|via|viale|piazza|corso|rua"
    r"|travessa|largo)\b(?:\s[\w'’.-]+){1,5}?)"
)
_TOWN = r"(?:[A-Z]{1,2}-)?\d{4,5}(?:\s?[A-Z]{2})?\s+[^\W\d_][\w'’-]+(?:\s[A-ZÄÖÜ][\w'’-]+){0,2}"
_ADDRESSES = (
    re.compile(r"\b\d{1,6}[A-Za-z]?\s[\w .'#-]{3,40},\s?[\w .'-]{2,30},?\s[A-Z]{2}\.?\s\d{5}(?:-\d{4})?\b"),
    re.compile(r"\bP\.?\s?O\.?\s?Box\s\d+(?:,\s?[\w .'-]{2,30},\s?[A-Z]{2}\s\d{5}(?:-\d{4})?)?", re.IGNORECASE),
    re.compile(rf"\b{_STREET},?\s\d{{1,4}}\s?[a-z]?,?\s+{_TOWN}", re.IGNORECASE),
    re.compile(rf"\b\d{{1,4}}\s?(?:bis|ter)?,?\s{_STREET},?\s+{_TOWN}", re.IGNORECASE),
)


@dataclass(frozen=True, kw_only=True)
class Privacy(Filter):
    """Puts `[email]`, `[phone]`, `[address]` and `[ip]` in the place of what they name; drops nothing."""

    name: ClassVar[str] = "privacy"
    kinds: tuple[str, ...] = KINDS
    regions: tuple[str, ...] = (
        "US",
        "GB",
        "DE",
        "FR",
        "ES",
        "IT",
        "IN",
        "JP",
        "BR",
    )  # whose national numbers are known
    fields: tuple[str, ...] = FIELDS

    def __post_init__(self) -> None:
        for option, given, known in (("kinds", self.kinds, KINDS), ("fields", self.fields, FIELDS)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise ValueError(f"--{option} is {','.join(given) or 'empty'}; it is some of {','.join(known)}")
        if "phone" in self.kinds:
            supported = _phonenumbers().SUPPORTED_REGIONS
            unknown = [region for region in self.regions if region not in supported]
            if unknown:
                raise ValueError(
                    f"--regions: {', '.join(unknown)} is no region with telephone numbers, such as US,GB,DE"
                )

    def measure(self, sample: Sample) -> Verdict:
        found: list[Removal] = []

        def scrub(text: str) -> str:
            return self.scrub(text, found)

        record = sample.record
        new = {name: _texts(record[name], scrub) for name in self.fields if record.get(name)}
        edits = {name: value for name, value in new.items() if value != record[name]}
        return Verdict(edits=edits, removed=tuple(found))

    def scrub(self, text: str, found: list[Removal]) -> str:
        """Text without private data; what was replaced is appended to `found`, masked."""
        for kind in KINDS:
            if kind not in self.kinds:
                continue
            for start, end in reversed(_merged(self._spans(kind, text))):
                found.append(Removal(kind, mask(kind, text[start:end])))
                text = f"{text[:start]}[{kind}]{text[end:]}"
        return text

    def _spans(self, kind: str, text: str) -> Iterator[tuple[int, int]]:
        # Most texts have no digit and no @; the libraries would search them for milliseconds.
        digits = sum(letter.isdigit() for letter in text)
        if kind == "email" and ("@" in text or "at" in text):
            yield from (match.span() for match in _EMAIL.finditer(text))
        elif kind == "ip" and (digits >= 4 or text.count(":") >= 3):
            yield from (match.span() for match in _IP.finditer(text) if _is_ip(match))
        elif kind == "address" and digits and len(text) >= 10:
            yield from _addresses(text)
        elif kind == "phone" and digits >= 7:
            yield from self._phones(text)

    def _phones(self, text: str) -> Iterator[tuple[int, int]]:
        phonenumbers = _phonenumbers()
        strict = phonenumbers.Leniency.STRICT_GROUPING
        for region in self.regions:
            for match in phonenumbers.PhoneNumberMatcher(text, region, leniency=strict):
                if not _ANY_NUMBER.fullmatch(match.raw_string) or _WORD_BEFORE.search(text[: match.start]):
                    yield match.start, match.end
        for match in _BEHIND_WORD.finditer(text):
            if 7 <= sum(letter.isdigit() for letter in match["number"]) <= 15:
                yield match.span("number")


def mask(kind: str, secret: str) -> str:
    """What may be printed of private data: enough to judge a mistake by, too little to use."""
    if kind == "email":
        name, _, domain = secret.partition("@")
        return f"{name[:1]}***@{domain[:1]}***.{domain.rpartition('.')[2]}" if domain else f"{name[:1]}***"
    if kind == "phone":
        last = max(index for index, letter in enumerate(secret) if letter.isdigit())
        return "".join("*" if letter.isdigit() and index < last - 1 else letter for index, letter in enumerate(secret))
    if kind == "ip":
        return re.sub(r"[0-9a-f]+", "*", secret, flags=re.IGNORECASE)
    return re.sub(r"\w+", lambda word: "***" if word[0][0].isdigit() else f"{word[0][0]}***", secret)


def _texts(value: Any, scrub: Callable[[str], str]) -> Any:
    """The value of one of FIELDS with every text of it scrubbed: captions, values of turns, questions and answers."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, list):
        return [_texts(item, scrub) for item in value]
    if isinstance(value, Mapping):
        spoken = ("value", "question", "answers", "answer")
        return {name: _texts(item, scrub) if name in spoken else item for name, item in value.items()}
    return value


def _is_ip(match: re.Match[str]) -> bool:
    try:
        ip_address(match[0])
    except ValueError:
        return False
    return not _VERSION.search(match.string[: match.start()])


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    try:
        import pyap
    except ImportError:
        raise ValueError("privacy needs the package pyap: pip install 'visplice[data]'") from None
    for country in ("US", "GB", "CA"):
        for found in pyap.parse(text, country=country):
            start, end = found.match_start, found.match_end
            start += len(text[start:end]) - len(text[start:end].lstrip(" ,"))
            before, behind = text[:start][-1:], text[end : end + 1]
            # British postcodes alone are found inside serial numbers, too.
            if not (before.isalnum() or behind.isalnum()) and len(text[start:end].split()) >= 3:
                yield start, end
    for pattern in _ADDRESSES:
        yield from (match.span() for match in pattern.finditer(text))


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that overlap as one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _phonenumbers() -> Any:
    try:
        import phonenumbers
    except ImportError:
        raise ValueError("privacy needs the package phonenumbers: pip install 'visplice[data]'") from None
    return phonenumbers
