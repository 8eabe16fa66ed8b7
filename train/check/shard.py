"""What one shard holds: every sample read and every picture decoded whole, in a worker process."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from visplice.lm.prompt import PromptBuilder, VisualTokens
from visplice.lm.templates import template_for
from visplice.lm.tokenizer import Tokenizer
from visplice.train.check.leakage import Facts, picture_names, things_said
from visplice.train.curate.verdict import digest
from visplice.train.data.curation import Curation
from visplice.train.data.near_pictures import picture_hash
from visplice.train.data.prepare import llava_messages
from visplice.train.data.record import Fault, Sample
from visplice.train.data.tar_index import Slot, read_slot, scan_shard
from visplice.vision.image import ImageError
from visplice.vision.image_facts import examine

LONGER = "cut-turns"  # the note for a conversation of which training drops turns


class Finding(NamedTuple):
    """Something wrong or odd: a name, where it is, and what it is."""

    name: str
    shard: str
    key: str
    message: str


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard, and what its manifest says of it."""

    file: Path
    stated: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class ShardFacts:
    """What was found in a shard."""

    name: str
    slots: int = 0  # samples, with those that cannot be used
    breaks: int = 0  # places that are no sample, but damage
    dropped: int = 0  # by curation
    images: int = 0
    text_alone: int = 0
    size: int = 0  # bytes
    keys: list[str] = field(default_factory=list)
    samples: list[Facts] = field(default_factory=list)  # that can be read
    unfit: int = 0  # of those, which training cannot use all the same
    contents: list[bytes] = field(default_factory=list)  # for each of those, pictures and text in one digest
    findings: list[Finding] = field(default_factory=list)
    caption_tokens: Counter[int] = field(default_factory=Counter)
    conversation_positions: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class TokenCounter:
    """Lengths as training has them; an object that worker processes can be sent."""

    tokenizer: Path
    template: str | None
    visual_tokens: int
    max_length: int | None

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_pretrained(self.tokenizer)

    @cached_property
    def _prompts(self) -> PromptBuilder:
        visual = VisualTokens(vocab_size=self._tokenizer.vocab_size, count=self.visual_tokens)
        return PromptBuilder(self._tokenizer, template_for(self._tokenizer, self.template), visual)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def check(self) -> None:
        """Raises ValueError where there is no such tokenizer or template, before anything is read."""
        _ = self._prompts

    def caption(self, text: str) -> int:
        """Tokens of a caption.

        Raises:
            Fault: `no-tokens`.
        """
        length = len(self._tokenizer.encode(text))
        if not length:
            raise Fault("no-tokens", "a caption of which the tokenizer leaves nothing")
        return length

    def conversation(self, sample: Sample) -> tuple[int, int]:
        """Positions of a conversation with its pictures, and of its first turn alone.

        Raises:
            Fault: `turn-order`, the template writes no such conversation.
        """
        messages = llava_messages(sample)
        length = self._length(messages)
        fits = self.max_length is None or length <= self.max_length or len(messages) <= 2
        return length, length if fits else self._length(messages[:2])

    def _length(self, messages: list[dict[str, Any]]) -> int:
        try:
            return len(self._prompts.build(messages).ids)
        except ValueError as error:
            raise Fault("turn-order", str(error)) from error


@dataclass(frozen=True, kw_only=True)
class ShardChecker:
    """Checks one shard; an object that worker processes can be sent."""

    counter: TokenCounter | None  # without, nothing is said of lengths
    curation: Curation
    hashes: bool  # whether pictures are hashed to find near-same ones
    test: bool = False  # whether these are test data, to which every answer is right

    def __call__(self, task: ShardTask) -> ShardFacts:
        """Reads the shard.

        Raises:
            OSError: it cannot be read, and not because it is missing.
        """
        facts = ShardFacts(name=task.file.name)
        try:
            slots = scan_shard(task.file)
        except (FileNotFoundError, IsADirectoryError):
            facts.findings.append(Finding("missing-shard", facts.name, "", f"{task.file} is not there"))
            return facts
        facts.size = task.file.stat().st_size
        dropped = self.curation.dropped(facts.name)
        with open(task.file, "rb") as file:
            for slot in slots:
                facts.slots += bool(slot.members)
                facts.breaks += not slot.members
                if slot.fault is None and slot.key in dropped:
                    facts.dropped += 1
                else:
                    self._check(file.fileno(), slot, facts, task)
        if task.stated is not None:
            _compare(task, facts)
        return facts

    def _check(self, descriptor: int, slot: Slot, facts: ShardFacts, task: ShardTask) -> None:
        if slot.members:
            facts.keys.append(slot.key)
        try:
            sample = self.curation.apply(facts.name, read_slot(descriptor, slot))
            found = self._facts(sample, facts, task.source)
        except Fault as fault:
            message = str(fault).removeprefix(f"{task.file}: ")  # the shard is named already
            facts.findings.append(Finding(fault.name, facts.name, slot.key, message))
        else:
            facts.samples.append(found)
            facts.contents.append(_content(sample))

    def _facts(self, sample: Sample, facts: ShardFacts, source: dict[str, Any]) -> Facts:
        """What the sample is recognised by, once all of it is found to be usable."""
        hashes, odd = [], []
        for suffix, data in sample.images:
            try:
                picture, image = examine(data, suffix.rpartition(".")[2])
            except ImageError as error:
                raise Fault(error.kind, f"{sample.key}.{suffix}: {error}") from None
            odd += [(name, f"{suffix}, {picture.width} x {picture.height} pixels") for name in picture.oddities]
            if self.hashes:
                hashes.append(picture_hash(image))
        if self.counter is not None:
            odd += _count_tokens(sample, facts, self.counter)
            facts.unfit += any(name == "too-long" for name, _ in odd)
        facts.images += len(sample.images)
        facts.text_alone += not sample.images
        facts.findings += [Finding(name, facts.name, sample.key, message) for name, message in odd]
        kind, options = source.get("kind"), source.get("options")
        appended = options.get("suffix") if isinstance(options, dict) else None
        return Facts(
            shard=facts.name,
            key=sample.key,
            pictures=tuple(hashlib.sha256(data).digest()[:16] for _, data in sample.images),
            hashes=tuple(hashes),
            names=picture_names(sample.record, kind if isinstance(kind, str) else ""),
            said=things_said(
                sample.record, suffix=appended if isinstance(appended, str) else "", all_answers=self.test
            ),
        )


def _count_tokens(sample: Sample, facts: ShardFacts, counter: TokenCounter) -> Iterator[tuple[str, str]]:
    """Adds the lengths of a sample, and names what training cannot use of it."""
    captions = [counter.caption(text) for text in sample.record.get("captions") or ()]
    if sample.record.get("conversations"):
        positions, of_first = counter.conversation(sample)
        facts.conversation_positions[positions] += 1
        if counter.max_length is not None and of_first > counter.max_length:
            yield "too-long", f"{of_first} positions for its first turn, more than {counter.max_length}"
        elif counter.max_length is not None and positions > counter.max_length:
            yield LONGER, f"{positions} positions, more than {counter.max_length}; training drops the last turns"
    facts.caption_tokens.update(captions)


def _content(sample: Sample) -> bytes:
    record = sample.record
    text = json.dumps([record.get("captions"), record.get("conversations")], ensure_ascii=True)
    return digest(text, *(data for _, data in sample.images))


def _compare(task: ShardTask, facts: ShardFacts) -> None:
    """The shard against its manifest. Samples that are gone are faults, as many as training will count."""
    stated, found = task.stated or {}, facts.findings
    if facts.size != stated["bytes"]:
        message = f"{facts.size:,} bytes, {stated['bytes']:,} in the manifest"
        found.append(Finding("shard-size", facts.name, "", message))
    elif isinstance(stated.get("sha256"), str):
        with open(task.file, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != stated["sha256"]:
            message = f"SHA-256 {actual[:16]}..., {stated['sha256'][:16]}... in the manifest; same size, other bytes"
            found.append(Finding("shard-hash", facts.name, "", message))
    if facts.slots != stated["samples"]:
        message = f"{facts.slots:,} samples, {stated['samples']:,} in the manifest"
        found.append(Finding("shard-count", facts.name, "", message))
    elif not facts.dropped and len(facts.samples) == facts.slots and facts.images != stated["images"]:
        message = f"{facts.images:,} pictures, {stated['images']:,} in the manifest"
        found.append(Finding("shard-count", facts.name, "", message))
    for number in range(facts.slots + facts.breaks, stated["samples"]):
        message = f"{facts.slots:,} of {stated['samples']:,} samples are found"
        found.append(Finding("truncated-tar", facts.name, f"sample {number}", message))
