"""Shards that are cut, damaged, compressed, hostile or no shards: what is damaged costs no more than itself."""

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
import subprocess
import tarfile
import time
import tracemalloc
import zipfile

import pytest

from visplice.train.data.tar_index import scan_shard

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


# --- the file is damaged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_file_cut_at_any_byte_loses_one_sample_and_what_follows(read, form, tar, samples):
    data = tar(samples(4), FORMATS[form])
    whole, _ = read(data)
    ends = [
        data.index(json.dumps(sample.record).encode()) + len(json.dumps(sample.record)) for sample in whole.values()
    ]
    for cut in sorted({*range(0, ends[-1] + 600, 23), *(end + step for end in ends for step in (-1, 0, 1))}):
        good, bad = read(data[:cut])
        left = sum(end <= cut for end in ends)
        assert list(good.values()) == list(whole.values())[:left], cut
        ended = cut > -(-ends[-1] // 512) * 512  # some of the mark at the end is there
        assert [name for _, name in bad] == ([] if ended else ["truncated-tar"]), cut


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_header_costs_one_sample(read, form, tar, samples):
    data = tar(samples(5), FORMATS[form])
    whole, _ = read(data)
    for at in range(0, len(data), 512):
        if data[at + 257 : at + 262] != b"ustar":
            continue
        good, bad = read(data[:at] + b"\xaa" + data[at + 1 :])
        assert [name for _, name in bad] == ["damaged-tar"], at
        assert len(good) == 4 and good.items() <= whole.items()


def test_garbage_between_samples_costs_none(read, tar, samples):
    first, second = tar(samples(3)).rstrip(b"\0"), tar(samples(2, "b/"))
    first += bytes(-len(first) % 512)
    good, bad = read(first + os.urandom(512 * 9) + second)
    assert len(good) == 5 and [name for _, name in bad] == ["damaged-tar"]
    good, bad = read(first + os.urandom(512 * 9 + 77))  # up to the end
    assert len(good) == 3 and [name for _, name in bad] == ["damaged-tar"]


def test_several_damages_are_several_faults(read, tar, samples):
    data = bytearray(tar(samples(9)))
    whole, _ = read(bytes(data))
    for key in ("s01.jpg", "s04.json", "s08.jpg"):
        data[data.index(key.encode())] = 0xFF
    good, bad = read(bytes(data))
    assert bad == [("s01", "damaged-tar"), ("s04", "damaged-tar"), ("s08", "damaged-tar")]
    assert good.items() <= whole.items() and len(good) == 6


@pytest.mark.parametrize("lost", ["0.jpg", "1.jpg", "json"])
def test_sample_around_a_break_is_counted_once(read, lost, tar, samples, record):
    sample = [("k.0.jpg", b"p"), ("k.1.jpg", b"q"), ("k.json", record("x", ["0.jpg", "1.jpg"]))]
    members = list(samples(4))
    data = tar([*members[:4], *sample, *members[4:]])
    at = data.index(f"k.{lost}".encode())
    good, bad = read(data[:at] + b"\0" + data[at + 1 :])
    assert bad == [("k", "damaged-tar")] and len(good) == 4


def test_caption_beside_a_break_is_not_taken_for_a_text_alone(read, tar):
    members = [(f"k{index}.{suffix}", b"text") for index in range(3) for suffix in ("jpg", "txt")]
    data = tar(members)
    good, bad = read(data.replace(b"k1.jpg", b"\xffxxxxx", 1))
    assert bad == [("k1", "damaged-tar")] and list(good) == ["k0", "k2"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shard_is_one_fault_that_says_so(tmp_path, pack, tar, samples):
    (tmp_path / "x.tar").write_bytes(pack(tar(samples(3))))
    (slot,) = scan_shard(tmp_path / "x.tar")
    assert slot.fault.name == "damaged-tar"
    name = {"gzip": "gzip", "bz2": "bzip2", "lzma": "xz"}[pack.__module__]
    assert f"compressed with {name}; unpack it" in str(slot.fault)


def test_other_files_are_one_fault(read, tmp_path, tar, samples):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("k.jpg", "p")
    for content in ((tmp_path / "x.zip").read_bytes(), b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, b"text" * 500):
        good, bad = read(content)
        assert not good and [name for _, name in bad] == ["damaged-tar"]
    for content in (b"", b"short", tar(samples(1))[:512]):
        good, bad = read(content)
        assert not good and [name for _, name in bad] == ["truncated-tar"]


def test_empty_tar_holds_nothing_wrong(read, tar):
    assert read(tar([])) == ({}, [])


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        scan_shard(tmp_path / "none.tar")


# --- hostile headers --------------------------------------------------------------------------------------------------


def checked(block):
    """A header whose sum is right again."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def size_field(data, name, field):
    at = data.index(name.encode())
    return data[:at] + checked(data[at : at + 124] + field + data[at + 136 : at + 512]) + data[at + 512 :]


@pytest.mark.parametrize(
    ("field", "name"),
    [
        (b"77777777777\0", "truncated-tar"),  # 8 GiB
        (b"\x80" + b"\xff" * 11, "truncated-tar"),  # 2 ** 88 - 1
        (b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, "truncated-tar"),
        (b"\xff" * 12, "damaged-tar"),  # -1
        (b"\xff" + bytes(11), "damaged-tar"),
        (b"not a number", "damaged-tar"),
    ],
)
def test_size_that_is_a_lie_costs_no_memory(read, field, name, tar, samples):
    data = size_field(tar(samples(4)), "s02.jpg", field)
    tracemalloc.start()
    good, bad = read(data)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert [fault for _, fault in bad] == [name]
    assert list(good) == (["s00", "s01"] if name == "truncated-tar" else ["s00", "s01", "s03"])


def pax(records, kind=b"x"):
    """An extended header of these bytes."""
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = kind, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    ("records", "name"),
    [
        (b"nonsense", "damaged-tar"),
        (b"0 path=x\n", "damaged-tar"),
        (b"99999999 path=x\n", "damaged-tar"),
        (b"-5 path=x\n", "damaged-tar"),
        (b"9 path=x\n" * 3 + b"5 a=b", "damaged-tar"),
        (b"\0" * 512, "damaged-tar"),
        (b"11 size=-9\n", "damaged-tar"),
        (b"14 size=ninet\n", "damaged-tar"),
        (b"29 size=99999999999999999999\n", "damaged-tar"),
        (b"22 size=9999999999999\n", "truncated-tar"),
        (b"22 GNU.sparse.major=1\n", "unsafe-name"),
        (b"17 path=../k.jpg\n", "unsafe-name"),
        (b"16 path=gr\xf6.jpg\n", "not-utf8"),
        (b"15 path=k\0.jpg\n", "unsafe-name"),
    ],
)
def test_nonsense_in_an_extended_header_is_one_fault(read, records, name, tar, samples):
    whole = tar(samples(4))
    cut = whole.index(b"s02.jpg")
    sample = tar([("k.jpg", b"p")], tarfile.USTAR_FORMAT)[:1024]
    good, bad = read(whole[:cut] + pax(records) + sample + whole[cut:])
    assert [fault for _, fault in bad] == [name]
    assert list(good) == (["s00", "s01"] if name == "truncated-tar" else ["s00", "s01", "s02", "s03"])


def test_endless_extended_headers_end(read, tar, samples):
    data = pax(b"9 path=x\n") * 5_000 + pax(b"11 comment=\n" * 2, b"g") * 5_000 + tar(samples(1))
    started = time.monotonic()
    good, bad = read(data)
    assert time.monotonic() - started < 5 and len(good) + len(bad) == 1


@pytest.mark.parametrize("kind", [b"x", b"L", b"K", b"g"])
def test_huge_extended_header_costs_no_memory(read, tmp_path, kind, tar, samples):
    size = 200_000_000
    info = tarfile.TarInfo("h")
    info.type, info.size = kind, size
    head, tail = info.tobuf(tarfile.GNU_FORMAT), tar(samples(2))
    file = tmp_path / "x.tar"
    with open(file, "wb") as stream:  # a hole on the disk
        stream.write(head)
        stream.seek(size + -size % 512, 1)
        stream.write(tail)
    tracemalloc.start()
    slots = scan_shard(file)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert [slot.key for slot in slots] == ["s00", "s01"]
    # A name that cannot be read makes its member useless; what a link leads to, or a comment, does not.
    assert [slot.fault is None for slot in slots] == [kind in b"Kg", True]


def test_disk_full_of_zeros_is_passed_quickly(tmp_path, tar, samples):
    file = tmp_path / "x.tar"
    with open(file, "wb") as stream:
        stream.write(tar(samples(2)))
        stream.truncate(1 << 27)
    started = time.monotonic()
    assert len(scan_shard(file)) == 2
    assert time.monotonic() - started < 5


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs a tar program")
@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7", "oldgnu", "posix"])
def test_shards_of_the_tar_program_are_read(tmp_path, read, form, samples, record):
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    for name, content in samples(3):
        (folder / "deep" / name).write_bytes(content)
    os.link(folder / "deep/s00.jpg", folder / "deep/s00b.jpg")
    (folder / "deep/s00b.json").write_bytes(record("a hard link"))
    order = [f"deep/{name}" for name in sorted(os.listdir(folder / "deep"))]
    subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / "t.tar", "deep", *order], cwd=folder, check=True)
    # The folder brings its files in the order of the disk; then they come by name.
    subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / "t.tar", *order], cwd=folder, check=True)
    good, bad = read((tmp_path / "t.tar").read_bytes())
    assert bad == [("deep/s00b", "unsafe-name")] and list(good) == ["deep/s00", "deep/s01", "deep/s02"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs a tar program")
@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=posix"], ["--format=posix", "--sparse-version=0.1"]])
def test_sparse_files_of_the_tar_program_are_faults(tmp_path, read, options, samples, record):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in samples(2):
        (folder / name).write_bytes(content)
    with open(folder / "s00x.jpg", "wb") as stream:
        for _ in range(30):  # more holes than fit into one header
            stream.write(b"data" * 1024)
            stream.seek(1 << 16, 1)
        stream.truncate(stream.tell())
    (folder / "s00x.json").write_bytes(record("holes"))
    names = sorted(os.listdir(folder))
    subprocess.run(["tar", *options, "--sparse", "-cf", tmp_path / "t.tar", *names], cwd=folder, check=True)
    good, bad = read((tmp_path / "t.tar").read_bytes())
    if bad or b"GNU.sparse" in (tmp_path / "t.tar").read_bytes():  # unless the disk knows no holes
        assert bad == [("s00x", "unsafe-name")]
    assert good.keys() >= {"s00", "s01"}


# --- chance -----------------------------------------------------------------------------------------------------------


def test_mutated_shards_give_faults_and_good_samples_and_nothing_else(read, tar, samples):
    rng = random.Random(0)
    bases = [tar(samples(6, folder), form) for form in FORMATS.values() for folder in ("", "d/")]
    bases += [tar(samples(6, "ü" * 60 + "/" + "a" * 99), form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    slowest = 0.0
    tracemalloc.start()
    for _ in range(800):
        data = bytearray(rng.choice(bases))
        kind = rng.randrange(4)
        if kind == 0:
            for _ in range(rng.randrange(1, 30)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1:
            del data[rng.randrange(len(data) + 1) :]
        elif kind == 2:  # headers whose sum is right
            at = rng.choice([at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"])
            data[at + rng.randrange(512)] = rng.randrange(256)
            data[at : at + 512] = checked(bytes(data[at : at + 512]))
        else:
            at, length = rng.randrange(len(data)), rng.randrange(3000)
            data[at : at + rng.choice((0, length))] = rng.randbytes(rng.choice((0, length)))
        started = time.monotonic()
        read(bytes(data))
        slowest = max(slowest, time.monotonic() - started)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert slowest < 2 and peak < 20_000_000
