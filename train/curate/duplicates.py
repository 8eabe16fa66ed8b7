"""Exact duplicates over URL, picture and text line. Of the same, the first in the order of the shards is kept.

A picture that comes again is a duplicate only when all that is said of it was said before: captions count as one
thing, since any of them describes the picture, while every question with its answer counts by itself. So a set of
captions is left with each picture once, and a set of conversations loses no question.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from visplice.train.curate.verdict import (
    Filter,
    Located,
    Removal,
    Verdict,
    caption_lines,
    digest,
    normalised,
    question_answers,
    shown,
    without,
)
from visplice.train.data.record import Sample

# What advertising and mail systems append to an address, and no picture depends on.
_TRACKING = frozenset(
    "fbclid gclid gclsrc dclid gbraid wbraid msclkid yclid twclid ttclid igshid igsh mc_cid mc_eid mkt_tok vero_id "
    "oly_anon_id oly_enc_id s_cid wickedid _ga _gl _hsenc _hsmi".split()
)
_PORTS = {"http": 80, "https": 443}


def normalised_url(url: str) -> str:
    """An address as it is compared.

    Without scheme http or https, the scheme's own port, fragment, slash at the end and tracking parameters (utm_*,
    gclid, ...); host in lower case; other parameters sorted. Paths keep their case, for servers do.
    """
    text = url.strip()
    try:
        parts = urlsplit(text if "://" in text or text.startswith("data:") else f"http://{text}")
        port = parts.port
    except ValueError:  # an address that cannot be parsed is still the same as itself
        return text
    scheme = parts.scheme.lower()
    if scheme not in _PORTS:
        return text
    host = (parts.hostname or "").rstrip(".") + (f":{port}" if port not in (None, _PORTS[scheme]) else "")
    query = sorted(
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if name.lower() not in _TRACKING and not name.lower().startswith("utm_")
    )
    return f"{host}{parts.path.rstrip('/')}" + (f"?{urlencode(query)}" if query else "")


def picture_digest(sample: Sample) -> bytes:
    """Stands for the bytes of all pictures of a sample, in their order."""
    return digest(*(data for _, data in sample.images))


def things_said(record: Mapping[str, Any], *, answers: bool) -> frozenset[bytes]:
    """What a record says of its picture: that it has captions, each question with its answer, each one of a VQA set."""
    captions = caption_lines(record, answers=answers)
    said = {b"captions"} if captions else set()
    if record.get("captions") or not captions:
        said |= {digest(normalised(question), normalised(answer)) for question, answer in question_answers(record)}
    asked = record.get("questions") or []
    return frozenset(said | {digest(json.dumps(question, sort_keys=True)) for question in asked})


class SaidBefore:
    """Which things were said of which picture, and where first."""

    def __init__(self) -> None:
        self._said: dict[Any, tuple[str, str, set[bytes]]] = {}

    def first(self, picture: Any, shard: str, key: str, said: frozenset[bytes]) -> str | None:
        """Where the picture stood first, if nothing new is said of it; else None, and it is remembered."""
        known = self._said.get(picture)
        if known is None:
            self._said[picture] = shard, key, set(said)
            return None
        if said <= known[2]:
            return known[1] if known[0] == shard else f"{known[1]} of {known[0]}"
        known[2].update(said)
        return None


@dataclass(frozen=True, kw_only=True)
class DuplicateUrls(Filter):
    """Drops samples whose picture came from an address that a sample before came from."""

    name: ClassVar[str] = "duplicate-urls"
    answers_are_captions: bool = False

    def measure(self, sample: Sample) -> tuple[bytes, str, frozenset[bytes]] | None:
        """Digest of the address, the address as shown, and what is said; None without an address."""
        url = sample.record.get("url")
        if not isinstance(url, str) or not url.strip():
            return None
        said = things_said(sample.record, answers=self.answers_are_captions)
        address = normalised_url(url)
        return digest(address), shown(address.partition("?")[0]), said  # parameters may hold a key

    def verdicts(self, measured: Iterable[Located]) -> Iterator[tuple[str, str, Verdict]]:
        before = SaidBefore()
        for shard, key, found in measured:
            if found is None:
                yield shard, key, Verdict(noted=("no url",))
                continue
            url, text, said = found
            first = before.first(url, shard, key, said)
            if first is not None:
                yield shard, key, Verdict(drop=True, removed=(Removal("same-url", f"{text}, as {first}"),))


@dataclass(frozen=True, kw_only=True)
class DuplicatePictures(Filter):
    """Drops samples whose pictures are, byte by byte, those of a sample before."""

    name: ClassVar[str] = "duplicate-pictures"
    answers_are_captions: bool = False

    def reads_pictures(self, record: Mapping[str, Any]) -> bool:
        return True

    def measure(self, sample: Sample) -> tuple[bytes, frozenset[bytes]] | None:
        """Digest of the pictures and what is said; None for text alone."""
        if not sample.images:
            return None
        return picture_digest(sample), things_said(sample.record, answers=self.answers_are_captions)

    def verdicts(self, measured: Iterable[Located]) -> Iterator[tuple[str, str, Verdict]]:
        before = SaidBefore()
        for shard, key, found in measured:
            if found is None:
                yield shard, key, Verdict(noted=("no picture",))
                continue
            first = before.first(found[0], shard, key, found[1])
            if first is not None:
                yield shard, key, Verdict(drop=True, removed=(Removal("same-picture", f"as {first}"),))


@dataclass(frozen=True, kw_only=True)
class DuplicateLines(Filter):
    """Removes captions that were read before, with any picture, and pairs of turns said before of the same picture.

    The same question about another picture is no duplicate, and neither is another answer to it.
    """

    name: ClassVar[str] = "duplicate-lines"
    keep: int = 1  # samples that may have the same caption
    answers_are_captions: bool = False

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"--keep is {self.keep}; at least 1 of the same lines is kept")

    def reads_pictures(self, record: Mapping[str, Any]) -> bool:
        # Only pairs of turns are compared per picture.
        return bool(record.get("conversations"))

    def measure(self, sample: Sample) -> tuple[Mapping[str, Any], list[bytes], list[bytes]]:
        """The record, a digest per caption, and a digest per pair of turns that stands for its picture too."""
        record = sample.record
        captions = caption_lines(record, answers=self.answers_are_captions)
        lines = [digest(normalised(caption)) for caption in captions]
        if captions and not record.get("captions"):
            return record, lines, []
        picture = picture_digest(sample) if record.get("conversations") else b""
        pairs = [digest(picture, normalised(q), normalised(a)) for q, a in question_answers(record)]
        return record, lines, pairs

    def verdicts(self, measured: Iterable[Located]) -> Iterator[tuple[str, str, Verdict]]:
        counts: dict[bytes, int] = {}
        said: set[bytes] = set()
        for shard, key, (record, lines, pairs) in measured:
            again = {index for index, line in enumerate(lines) if line in lines[:index]}
            for index, line in enumerate(lines):
                if index not in again:
                    counts[line] = counts.get(line, 0) + 1
                    if counts[line] > self.keep:
                        again.add(index)
            repeated = {index for index, pair in enumerate(pairs) if pair in said or pair in pairs[:index]}
            said.update(pairs)
            if not again and not repeated:
                continue
            texts = caption_lines(record, answers=self.answers_are_captions)
            removed = [Removal("same-caption", shown(texts[index])) for index in sorted(again)]
            spoken = question_answers(record)
            removed += [Removal("same-answer", shown(" ".join(spoken[index]))) for index in sorted(repeated)]
            if record.get("captions"):
                drop, edits = without(record, captions=again, pairs=repeated)
            else:
                drop, edits = without(record, pairs=again | repeated)
            yield shard, key, Verdict(drop=drop, edits=edits, removed=tuple(removed))
