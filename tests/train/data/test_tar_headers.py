"""The quick parser of plain headers says what tarfile's says, or leaves it to tarfile."""

import tarfile

import pytest

from visplice.train.data.tar_members import _parse, _parse_plain

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def header(rng, name, form, **fields):
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = rng.randrange(1 << rng.randrange(1, 33)), rng.randrange(1 << 31), 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form, "utf-8", "surrogateescape")[-512:]  # behind those of long names


def theirs(block):
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return None
    return info.type, info.size, info.name


@pytest.mark.parametrize("form", FORMATS)
def test_headers_of_every_form_are_read_as_tarfile_reads_them(rng, form):
    quick = 0
    for _ in range(500):
        name = "".join(rng.choice("abc01_/.é") for _ in range(rng.randrange(1, 140)))
        kind = rng.choice([tarfile.REGTYPE] * 5 + [tarfile.DIRTYPE, tarfile.SYMTYPE])
        block = header(rng, name, form, type=kind)
        found = _parse(block)
        assert (found.type, found.size, found.name) == theirs(block)
        quick += _parse_plain(block) is not None
    assert quick > 100 or form == tarfile.GNU_FORMAT


def test_no_flipped_bit_gets_through(rng):
    block = header(rng, "s000001.jpg", tarfile.PAX_FORMAT)
    assert _parse_plain(block) is not None
    for byte in range(512):
        for bit in range(8):
            damaged = bytearray(block)
            damaged[byte] ^= 1 << bit
            assert _parse_plain(bytes(damaged)) is None, (byte, bit)
    assert _parse_plain(block[:-1]) is None and _parse_plain(b"") is None


def test_garbage_is_no_header(rng):
    for _ in range(2000):
        assert _parse(rng.randbytes(512)) is None
