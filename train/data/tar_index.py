"""Where the members of a WebDataset shard lie, so that any sample is read without those before it.

The grouping is WebDataset's: members whose names agree up to the first dot behind the last slash are one sample, if
they follow each other. What is wrong with a shard becomes a slot that cannot be read, so that its neighbours still can.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visplice.train.data.record import Fault, Sample, check_marks, check_record, has_text, load_json
from visplice.train.data.tar_members import Member, tar_members
from visplice.vision.image_facts import IMAGE_SUFFIXES

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key, suffix
MAX_TEXT = 1 << 26  # bytes of a record or caption that are read
MAX_PICTURE = 1 << 30  # bytes of a picture that are read


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One sample of a shard: where its members lie, or why it cannot be read.

    A fault without members is no sample, but a place where the file is broken.
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # suffix to offset and length, bytes
    fault: Fault | None = None


def scan_shard(file: str | Path) -> list[Slot]:
    """The samples of a tar file in their order; those that cannot be read hold the Fault.

    Raises:
        OSError: the file cannot be opened or read.
    """
    file = Path(file)
    with open(file, "rb") as stream:
        builder = _Builder(file, stream.fileno())
        for member in tar_members(stream.fileno(), file):
            if isinstance(member, Fault):
                builder.add_break(member)
            else:
                builder.add(member)
        return builder.finished()


class _Builder:
    """Members grouped to samples. A break in the file costs the sample that it cuts, and no other."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file, self._descriptor = file, descriptor
        self._slots: list[Slot] = []
        self._breaks: list[int] = []  # slots that hold no sample, but the fault of a place between members
        self._seen: set[str] = set()
        self._last = ""

    def add(self, member: Member) -> None:
        shown = member.name.encode("utf-8", "backslashreplace").decode()
        match = _NAME.fullmatch(shown)
        fault = member.fault or self._name_fault(member, shown, known=match is not None)
        if fault is None and (match is None or (shown.startswith("__") and shown.endswith("__"))):
            return  # as WebDataset does
        key, suffix = match.groups() if match else os.path.splitext(shown)
        suffix = suffix.lower()
        self._last = shown
        current = self._current(key)
        if current is not None and suffix not in current.members:
            current.members[suffix] = member.offset, member.length
            if current.fault is None and fault is not None:
                self._slots[-1] = replace(current, fault=fault)
            return
        if fault is None and key in self._seen:
            fault = Fault("duplicate-key", f"{self._file}: key {key} stood in this shard before; the first is kept")
        self._seen.add(key)
        self._slots.append(Slot(key=key, members={suffix: (member.offset, member.length)}, fault=fault))

    def add_break(self, fault: Fault) -> None:
        where = f"behind {self._last}" if self._last else "at its beginning"
        self._breaks.append(len(self._slots))
        self._slots.append(Slot(key=f"{self._file.name} {where}", fault=fault))

    def _current(self, key: str) -> Slot | None:
        """The sample that a member of this key goes on with."""
        if self._breaks and self._breaks[-1] == len(self._slots) - 1 and len(self._slots) > 1:
            before, gap = self._slots[-2:]
            if before.key == key:
                self._breaks.pop()
                self._slots[-2:] = [before if before.fault else replace(before, fault=gap.fault)]
        return self._slots[-1] if self._slots and self._slots[-1].key == key else None

    def _name_fault(self, member: Member, shown: str, *, known: bool) -> Fault | None:
        if shown.startswith("/") or "\0" in shown or (".." in shown and ".." in re.split(r"[/\\]", shown)):
            return Fault("unsafe-name", f"{self._file}: member {shown} leads out of the folder")
        if shown != member.name:
            return Fault("not-utf8", f"{self._file}: member name {shown} is not UTF-8")
        if known and not member.plain:
            return Fault("unsafe-name", f"{self._file}: member {shown} is a link, a device or sparse, not a plain file")
        return None

    def finished(self) -> list[Slot]:
        """The slots; what a break has cut from the sample before or behind it is counted once, under the break."""
        for index in reversed(self._breaks):
            fault = self._slots[index].fault
            for neighbour in (index - 1, index + 1):
                if 0 <= neighbour < len(self._slots) and self._lacks_member(self._slots[neighbour]):
                    self._slots[neighbour] = replace(self._slots[neighbour], fault=fault)
                    del self._slots[index]
                    break
        return self._slots

    def _lacks_member(self, slot: Slot) -> bool:
        if slot.fault is not None:
            return False
        try:
            sample = read_slot(self._descriptor, slot, images=False)
        except Fault as fault:
            return fault.name in ("missing-image", "missing-record")
        return not sample.images and "images" not in sample.record  # a caption whose picture may have been lost


def read_slot(descriptor: int, slot: Slot, *, images: bool = True) -> Sample:
    """Reads one sample through an open file descriptor, at no cost to others that read through it too.

    Args:
        images: whether picture bytes are read; without, every picture is empty bytes.
    Raises:
        Fault: the slot holds one, or its record or members do not fit the schema.
        OSError: the file cannot be read.
    """
    if slot.fault is not None:
        raise Fault(slot.fault.name, str(slot.fault))  # a new one: each raise would lengthen the traceback of the same
    record = _record(descriptor, slot)
    named = record.get("images")
    if named is None:
        named = [suffix for suffix in slot.members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    for suffix in named:
        if suffix not in slot.members:
            raise Fault("missing-image", f"the record names {slot.key}.{suffix}, which is not in the shard")
    check_marks(record, len(named))
    # A picture that is named twice is read once.
    data = {suffix: _read(descriptor, slot, suffix, MAX_PICTURE) if images else b"" for suffix in named}
    return Sample(key=slot.key, images=tuple((suffix, data[suffix]) for suffix in named), record=record)


def _record(descriptor: int, slot: Slot) -> dict[str, Any]:
    """The record of a slot; `key.txt` is its caption where `key.json` has no text, as img2dataset writes them."""
    record: Any = load_json(_read(descriptor, slot, "json", MAX_TEXT)) if "json" in slot.members else None
    if "txt" in slot.members and (record is None or (isinstance(record, dict) and not has_text(record))):
        try:
            text = _read(descriptor, slot, "txt", MAX_TEXT).decode().strip()
        except UnicodeDecodeError as error:
            raise Fault("not-utf8", f"{slot.key}.txt is not UTF-8 ({error})") from None
        record = {**(record or {}), "captions": [text]}
    if record is None:
        raise Fault("missing-record", f"{slot.key} has neither {slot.key}.json nor {slot.key}.txt")
    check_record(record)
    return record


def _read(descriptor: int, slot: Slot, suffix: str, limit: int) -> bytes:
    offset, length = slot.members[suffix]
    if length > limit:
        raise Fault("too-large", f"{slot.key}.{suffix} has {length} bytes; at most {limit} are read")
    parts: list[bytes] = []
    while length:
        part = os.pread(descriptor, length, offset)  # a signal or a network file system may give less
        if not part:
            raise Fault("truncated-tar", f"the shard ends inside {slot.key}.{suffix}")
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)
