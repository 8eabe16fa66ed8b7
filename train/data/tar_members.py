"""The members of a tar file with where their bytes lie, for files that may be cut, damaged or hostile.

Headers are read by tarfile's parser but not by its walk, which ends at the first damaged header as if the file did,
takes a missing end for the end, reads headers of any declared size into memory, and raises nearly anything at nonsense.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from visplice.train.data.record import Fault

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20  # bytes read at a time where nothing but zeros or garbage is
_ZEROS = bytes(_CHUNK)
_MAX_HEADER = 1 << 16  # bytes of a header that holds a long name; Linux takes paths of 4096
_MAGIC, _MAGIC_AT = b"ustar", 257
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NO_DATA = (*_LINKS, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


@dataclass(frozen=True, kw_only=True)
class Member:
    """A member of a tar file.

    Attributes:
        name: bytes that are not UTF-8 are lone surrogates, as tarfile has them.
        plain: whether it is an ordinary file, and no link, device or sparse file.
        offset, length: of its content, bytes.
        fault: why it cannot be read.
    """

    name: str
    plain: bool
    offset: int
    length: int
    fault: Fault | None = None


def tar_members(descriptor: int, file: Path) -> Iterator[Member | Fault]:
    """Members in their order, folders left out, and a Fault for each place where the file breaks off or is no tar.

    Behind garbage it goes on at the next header, and behind an end mark too, as of tars that were joined by `cat`.

    Raises:
        OSError: the file cannot be read.
    """
    size = os.fstat(descriptor).st_size
    at, ended = 0, False
    told: dict[bytes, bytes] = {}  # what headers before that of a member say of it
    problem = ""  # with one of those
    while at < size:
        block = os.pread(descriptor, _BLOCK, at)
        ended = not block.strip(b"\0")
        if ended:
            at = _behind_zeros(descriptor, at, size)
            continue
        header = _parse(block)
        if header is None:
            start, at = at, _next_header(descriptor, at, size)
            if size - start < _BLOCK and not (start == 0 and _compression(block)):
                break
            yield Fault("damaged-tar", _damage(file, block, start, at))
            told, problem, ended = {}, "", True  # where the garbage goes on to the end, that is said
            continue
        kind, start, at = header.type, at, at + _BLOCK
        if kind == tarfile.GNUTYPE_SPARSE:
            at = _behind_sparse_map(descriptor, block, at)
        elif kind in (*_PAX, tarfile.GNUTYPE_LONGNAME):
            content = os.pread(descriptor, min(header.size, _MAX_HEADER), at)
            at += _padded(header.size)
            if header.size > _MAX_HEADER and at <= size:
                problem = f"the header at byte {start} has {header.size} bytes, at most {_MAX_HEADER} are read"
            elif kind == tarfile.GNUTYPE_LONGNAME:
                told[b"path"] = content.partition(b"\0")[0]
            elif (records := _pax_records(content)) is not None:
                told |= records
            else:
                problem = f"the header at byte {start} is no list of pax records"
            continue
        elif kind in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            at += _padded(header.size)
            continue
        length = _length(header, told)
        path = told.get(b"GNU.sparse.name", told.get(b"path"))
        name = header.name if path is None else path.decode("utf-8", "surrogateescape")
        sparse = any(key.startswith(b"GNU.sparse.") for key in told)
        if length is None:
            problem, length = "its size in a pax header is no number", header.size
        cut = at + length > size
        if kind != tarfile.DIRTYPE:
            shown = name.encode("utf-8", "backslashreplace").decode()
            fault = Fault("truncated-tar", f"{file}: ends inside {shown}") if cut else None
            if problem:
                fault = Fault("damaged-tar", f"{file}: {shown} cannot be read: {problem}")
            yield Member(name=name, plain=kind in _PLAIN and not sparse, offset=at, length=length, fault=fault)
        if cut:
            return
        at += _padded(length)
        told, problem = {}, ""
    if not ended:
        what = f"ends at byte {size} without the mark that ends a tar file" if size else "is empty"
        yield Fault("truncated-tar", f"{file}: {what}; the copy or download may be cut off")


class _Header(NamedTuple):
    """What a header says of a plain file; of anything else, tarfile's own class says it."""

    type: bytes
    size: int
    name: str


def _parse(block: bytes) -> tarfile.TarInfo | _Header | None:
    """What a block says as a header; None where it is none."""
    plain = _parse_plain(block)
    if plain is not None:
        return plain
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    return header if header.size >= 0 else None


def _parse_plain(block: bytes) -> _Header | None:
    """A header as most are: of a plain file, in ustar's form, with a short name; in a tenth of tarfile's time.

    The sum that a header states takes its own eight bytes for spaces. Adler-32 holds that of all bytes, modulo 65521.
    """
    size, stated = block[124:135], block[148:154]
    if (
        len(block) != _BLOCK
        or block[156:157] != tarfile.REGTYPE
        or block[257:263] != b"ustar\0"
        or block[345:346] != b"\0"
    ):
        return None
    if not (size.isdigit() and stated.isdigit() and block[135:136] in b"\0 " and block[154:156] == b"\0 "):
        return None
    try:
        total = int(stated, 8) - 8 * ord(" ") + sum(block[148:156])
        header = _Header(tarfile.REGTYPE, int(size, 8), block[:100].partition(b"\0")[0].decode())
    except ValueError:  # digits of another base, or a name that is not UTF-8
        return None
    return header if zlib.adler32(block) & 0xFFFF == (total + 1) % 65521 else None


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _length(header: tarfile.TarInfo | _Header, told: dict[bytes, bytes]) -> int | None:
    """Bytes of a member's content in the file; None where a pax record makes nonsense of it."""
    if header.type in _NO_DATA:
        return 0
    stated = told.get(b"size")
    if stated is None:
        return header.size
    return int(stated) if stated.isdigit() and len(stated) < 20 else None


def _pax_records(content: bytes) -> dict[bytes, bytes] | None:
    """The records `LENGTH KEY=VALUE\\n` of an extended header; None where they are none."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(content):
        digits = content[at : at + 8].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = content[at + len(digits) + 1 : end - 1].partition(b"=")
        if end <= at or not equals or content[end - 1 : end] != b"\n":
            return None
        records[key] = value
        at = end
    return records


def _behind_zeros(descriptor: int, at: int, size: int) -> int:
    """The first block from `at` on that is not all zeros."""
    while at < size:
        chunk = os.pread(descriptor, _CHUNK, at)
        if not chunk:
            break
        if chunk == _ZEROS[: len(chunk)]:  # by far the quickest way to see it
            at += len(chunk)
            continue
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        return at + zeros // _BLOCK * _BLOCK
    return size


def _behind_sparse_map(descriptor: int, block: bytes, at: int) -> int:
    """Where the content of an old GNU sparse file begins: behind the blocks that say where its holes are."""
    more = block[482]
    while more:
        block = os.pread(descriptor, _BLOCK, at)
        at += _BLOCK
        more = block[504] if len(block) == _BLOCK else 0
    return at


def _next_header(descriptor: int, at: int, size: int) -> int:
    """The next block behind `at` that is a header, or the end of the file."""
    base = at + _BLOCK
    while base < size:
        chunk = os.pread(descriptor, _CHUNK, base)
        found = chunk.find(_MAGIC)
        while found >= 0:
            start = found - _MAGIC_AT
            if start >= 0 and start % _BLOCK == 0 and _parse(chunk[start : start + _BLOCK]) is not None:
                return base + start
            found = chunk.find(_MAGIC, found + 1)
        if len(chunk) < _CHUNK:
            break
        base += len(chunk)
    return size


def _compression(block: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSED.items() if block.startswith(magic)), None)


def _damage(file: Path, block: bytes, start: int, end: int) -> str:
    if start:
        return f"{file}: {end - start} bytes from {start} on are no part of a tar file"
    if name := _compression(block):
        return f"{file}: compressed with {name}; unpack it, so that samples can be read in any order"
    return f"{file}: no tar file, or its first {end} bytes are overwritten"
