"""Where the members of a WebDataset shard lie, so that any sample is read without those before it.

The grouping is WebDataset's: members whose names agree up to the first dot behind the last slash are one sample, if they
follow each other. What is wrong with a shard becomes a slot that cannot be read, so that its neighbours still can.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visplice.train.data.record import Fault, Sample, check_marks, check_record, has_text, load_json
from visplice.vision.image_facts import IMAGE_SUFFIXES

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # key, suffix


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One sample of a shard: where its members lie, or why it cannot be read."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # suffix to offset and length, bytes
    fault: Fault | None = None


def scan_shard(file: str | Path) -> list[Slot]:
    """The samples of a tar file in their order; those that cannot be read hold the Fault.

    Raises:
        OSError: the file cannot be opened.
    """
    slots: list[Slot] = []
    seen: set[str] = set()
    for key, suffix, member, fault in _members(Path(file)):
        last = slots[-1] if slots else None
        if last is not None and last.key == key and suffix not in last.members:
            if fault is None and last.fault is None:
                last.members[suffix] = (member.offset_data, member.size)
            elif last.fault is None:
                slots[-1] = Slot(key=key, fault=fault)
            continue
        if fault is None and key in seen:
            fault = Fault("duplicate-key", f"{file}: key {key} stood in this shard before; the first is kept")
        seen.add(key)
        slots.append(Slot(key=key, members={suffix: (member.offset_data, member.size)}, fault=fault))
    return slots


def _members(file: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, Fault | None]]:
    """Key, suffix and place of every member that belongs to a sample, with what is wrong with it."""
    size = file.stat().st_size
    last = ("", "")
    try:
        with tarfile.open(file, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                name = member.name
                match = _NAME.fullmatch(name)
                if member.isdir() or match is None or name.startswith("__") and name.endswith("__"):
                    continue
                last = (match[1], match[2].lower())
                yield *last, member, _member_fault(file, member, size)
    except tarfile.ReadError as error:
        key, suffix = last
        where = f"behind {key}.{suffix}" if key else "at its beginning"
        fault = Fault("truncated-tar", f"{file}: no tar member can be read {where} ({error})")
        yield f"{file.name} {where}", "", tarfile.TarInfo(), fault


def _member_fault(file: Path, member: tarfile.TarInfo, size: int) -> Fault | None:
    shown = member.name.encode("utf-8", "backslashreplace").decode()
    if any("\udc80" <= character <= "\udcff" for character in member.name):
        return Fault("not-utf8", f"{file}: member name {shown} is not UTF-8")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return Fault("unsafe-name", f"{file}: member {shown} leads out of the folder")
    if not member.isfile():
        return Fault("unsafe-name", f"{file}: member {shown} is a link or a device, not a plain file")
    if member.offset_data + member.size > size:
        return Fault("truncated-tar", f"{file}: ends inside {shown}")
    return None


def read_slot(descriptor: int, slot: Slot, *, images: bool = True) -> Sample:
    """Reads one sample through an open file descriptor, at no cost to others that read through it too.

    Args:
        images: whether picture bytes are read; without, every picture is empty bytes.
    Raises:
        Fault: the slot holds one, or its record or members do not fit the schema.
    """
    if slot.fault is not None:
        raise slot.fault
    record = _record(descriptor, slot)
    named = record.get("images")
    if named is None:
        named = [suffix for suffix in slot.members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    for suffix in named:
        if suffix not in slot.members:
            raise Fault("missing-image", f"the record names {slot.key}.{suffix}, which is not in the shard")
    check_marks(record, len(named))
    pictures = tuple((suffix, _read(descriptor, slot, suffix) if images else b"") for suffix in named)
    return Sample(key=slot.key, images=pictures, record=record)


def _record(descriptor: int, slot: Slot) -> dict[str, Any]:
    """The record of a slot; `key.txt` is its caption where `key.json` has no text, as img2dataset writes them."""
    record: Any = load_json(_read(descriptor, slot, "json")) if "json" in slot.members else None
    if "txt" in slot.members and (record is None or isinstance(record, dict) and not has_text(record)):
        try:
            text = _read(descriptor, slot, "txt").decode().strip()
        except UnicodeDecodeError as error:
            raise Fault("not-utf8", f"{slot.key}.txt is not UTF-8 ({error})") from None
        record = {**(record or {}), "captions": [text]}
    if record is None:
        raise Fault("missing-record", f"{slot.key} has neither {slot.key}.json nor {slot.key}.txt")
    check_record(record)
    return record


def _read(descriptor: int, slot: Slot, suffix: str) -> bytes:
    offset, length = slot.members[suffix]
    parts: list[bytes] = []
    while length:
        part = os.pread(descriptor, length, offset)  # at most 2 GiB a call
        if not part:
            raise Fault("truncated-tar", f"the shard ends inside {slot.key}.{suffix}")
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)
