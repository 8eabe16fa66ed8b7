"""Near-duplicates: pictures saved again, resized or a little cropped, and captions that differ in a few letters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from visplice.train.curate.duplicates import SaidBefore, picture_digest, things_said
from visplice.train.curate.verdict import (
    Filter,
    Located,
    Removal,
    Verdict,
    caption_lines,
    normalised,
    shown,
    without_captions,
)
from visplice.train.data.near_pictures import LIMIT, MAX_DISTANCE, near_groups, picture_hash
from visplice.train.data.record import Sample
from visplice.vision.image import open_image

SHINGLE = 5  # letters; a caption is the set of its runs of so many
PERMUTATIONS = 128  # of MinHash


@dataclass(frozen=True, kw_only=True)
class NearPictures(Filter):
    """Drops samples whose pictures are nearly those of a sample before, if nothing new is said of them."""

    name: ClassVar[str] = "near-pictures"
    max_distance: int = MAX_DISTANCE  # bits of 64 in which perceptual hashes may differ
    answers_are_captions: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= LIMIT:
            raise ValueError(f"--max-distance is {self.max_distance} bits; it is 0 to {LIMIT}")

    def reads_pictures(self, record: Mapping[str, Any]) -> bool:
        return True

    def measure(self, sample: Sample) -> tuple[list[bytes], bytes, frozenset[bytes]] | None:
        """A hash per picture, a digest of all of them, and what is said; None for text alone."""
        if not sample.images:
            return None
        hashes = [picture_hash(open_image(data)) for _, data in sample.images]
        return hashes, picture_digest(sample), things_said(sample.record, answers=self.answers_are_captions)

    def verdicts(self, measured: Iterable[Located]) -> Iterator[tuple[str, str, Verdict]]:
        hashes: list[bytes] = []
        rows: list[tuple[str, str, int, bytes, frozenset[bytes]]] = []
        for shard, key, found in measured:
            if found is None:
                yield shard, key, Verdict(noted=("no picture",))
                continue
            rows.append((shard, key, len(found[0]), *found[1:]))
            hashes += found[0]
        leader: dict[int, int] = {}
        for group in near_groups(hashes, max_distance=self.max_distance):
            leader.update(dict.fromkeys(group, group[0]))
        before, at = SaidBefore(), 0
        for shard, key, count, exact, said in rows:
            own, at = range(at, at + count), at + count
            # Pictures in no group are near to none; those of one colour, say, can still be the same file.
            near = any(index in leader for index in own)
            first = before.first(tuple(leader.get(index, index) for index in own) if near else exact, shard, key, said)
            if first is not None:
                yield shard, key, Verdict(drop=True, removed=(Removal("near-picture", f"as {first}"),))


def shingles(text: str) -> frozenset[str]:
    """The runs of 5 letters of a text without case, punctuation and repeated spaces; a shorter text is its own."""
    words = " ".join(re.findall(r"\w+", normalised(text)))
    return frozenset(words[at : at + SHINGLE] for at in range(max(1, len(words) - SHINGLE + 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """What two sets share, as a part of both together."""
    return len(first & second) / len(first | second)


@dataclass(frozen=True, kw_only=True)
class NearLines(Filter):
    """Removes captions that are nearly one that was read before, with any picture.

    MinHash with locality-sensitive hashing (datasketch) finds candidates, and the sets of 5-letter runs themselves
    decide, so nothing is removed by chance. Captions that differ in a number are not near, however long they are: "two
    dogs" is no "three dogs", but only digits are seen as numbers.
    """

    name: ClassVar[str] = "near-lines"
    threshold: float = 0.9  # shared runs of 5 letters, from 0 (none) to 1 (all)
    keep: int = 1  # near-same captions that are kept
    answers_are_captions: bool = False

    def __post_init__(self) -> None:
        if not 0.5 <= self.threshold <= 1:
            raise ValueError(f"--threshold is {self.threshold}; it is 0.5 to 1, the part that two captions share")
        if self.keep < 1:
            raise ValueError(f"--keep is {self.keep}; at least 1 of near-same lines is kept")

    def measure(self, sample: Sample) -> tuple[Mapping[str, Any], list[Any]]:
        """The record, and per caption its MinHash."""
        minhash = _datasketch().MinHash
        lines = caption_lines(sample.record, answers=self.answers_are_captions)
        sets = [[run.encode("utf-8", "surrogatepass") for run in sorted(shingles(line))] for line in lines]
        return sample.record, list(minhash.generator(sets, num_perm=PERMUTATIONS))

    def verdicts(self, measured: Iterable[Located]) -> Iterator[tuple[str, str, Verdict]]:
        # A missed pair cannot be had back, a false one is seen by the sets; so the bands lean to finding.
        index = _datasketch().MinHashLSH(threshold=self.threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        kept: list[str] = []
        counts: list[int] = []
        for shard, key, (record, hashes) in measured:
            lines = caption_lines(record, answers=self.answers_are_captions)
            near: dict[int, str] = {}
            for number, (line, hashed) in enumerate(zip(lines, hashes, strict=True)):
                runs = shingles(line)
                found = next(
                    (at for at in sorted(index.query(hashed)) if self._near(runs, line, kept[at])),
                    None,
                )
                if found is None:
                    index.insert(len(kept), hashed, check_duplication=False)
                    kept.append(line)
                    counts.append(1)
                    continue
                counts[found] += 1
                if counts[found] > self.keep:
                    near[number] = kept[found]
            if near:
                drop, edits = without_captions(record, near)
                removed = tuple(
                    Removal("near-caption", f"{shown(lines[number])}, as {shown(first)}")
                    for number, first in near.items()
                )
                yield shard, key, Verdict(drop=drop, edits=edits, removed=removed)

    def _near(self, runs: frozenset[str], line: str, other: str) -> bool:
        return jaccard(runs, shingles(other)) >= self.threshold and re.findall(r"\d+", line) == re.findall(
            r"\d+", other
        )


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise ValueError("near-lines needs the package datasketch: pip install 'visplice[data]'") from None
    return datasketch
