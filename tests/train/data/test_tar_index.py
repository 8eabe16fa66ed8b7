"""The index of a shard: WebDataset's grouping, and what is damaged costs no more than what it damages."""

import bz2
import gzip
import io
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
import webdataset

from visplice.train.data.record import FAULTS, Fault
from visplice.train.data.tar_index import read_slot, scan_shard

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def record(caption, images=("jpg",)):
    return json.dumps({"images": list(images), "captions": [caption]}).encode()


def tar(members, form=tarfile.GNU_FORMAT, **options):
    """Bytes of a tar of (name or TarInfo, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape", **options) as file:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = info.size or len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def samples(count, folder="", size=700):
    rng = random.Random(1)
    for index in range(count):
        yield f"{folder}s{index:02d}.jpg", rng.randbytes(rng.randrange(1, size))
        yield f"{folder}s{index:02d}.json", record(f"caption {index}")


@pytest.fixture
def read(tmp_path):
    """Reads a shard from its bytes: samples by key, and names of faults by key."""

    def run(data):
        file = tmp_path / "x.tar"
        file.write_bytes(data)
        good, bad = {}, []
        slots = scan_shard(file)
        with open(file, "rb") as stream:
            for slot in slots:
                slot.key.encode()  # it can be written
                try:
                    good[slot.key] = read_slot(stream.fileno(), slot)
                except Fault as fault:
                    bad.append((slot.key, fault.name))
                    assert fault.name in FAULTS and str(fault).isprintable()
        assert len(good) + len(bad) == len(slots)
        return good, bad

    return run


# --- whole shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("folder", ["", "a/b.c/", "./", "größe/" + "long" * 15 + "/"])
def test_samples_are_found_in_every_format(read, form, folder):
    members = list(samples(5, folder))
    good, bad = read(tar(members, FORMATS[form]))
    assert bad == [] and list(good) == [f"{folder}s{index:02d}" for index in range(5)]
    assert [sample.images for sample in good.values()] == [(("jpg", data),) for _, data in members[::2]]
    assert good[f"{folder}s03"].record["captions"] == ["caption 3"]


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_names_longer_than_a_header_are_whole(read, form):
    key = "ü" * 90 + "/" + "k" * 300
    good, bad = read(tar([(f"{key}.jpg", b"picture"), (f"{key}.json", record("x"))], FORMATS[form]))
    assert bad == [] and list(good) == [key]


def test_grouping_is_that_of_webdataset(read, tmp_path):
    rng = random.Random(3)
    for _ in range(60):
        names = []
        for index in range(12):
            folder = rng.choice(["", "a/", "a.b/", "./"])
            suffixes = rng.sample(
                ["jpg", "JPG", "json", "txt", "0.png", "1.png", "cls", "seg.png"], rng.randrange(1, 4)
            )
            if len({suffix.lower() for suffix in suffixes}) == len(suffixes):
                names += [f"{folder}k{index}{rng.choice(['', '_x', ' y'])}.{suffix}" for suffix in suffixes]
            # Of a hidden file in a folder, "a/.b", WebDataset makes a sample "a/"; here it is none.
            names += rng.choices(["README", ".hidden", "__meta__.json", "noext/"], k=rng.randrange(2))
        data = tar([(name, name.encode()) for name in names])
        read(data)
        theirs = [
            (sample["__key__"], {name: content for name, content in sample.items() if not name.startswith("__")})
            for sample in webdataset.WebDataset([str(tmp_path / "x.tar")], shardshuffle=False)
        ]
        ours = [
            (slot.key, {suffix: data[at : at + length] for suffix, (at, length) in slot.members.items()})
            for slot in scan_shard(tmp_path / "x.tar")
        ]
        # WebDataset counts members of the same key but in another folder as others, and so do we.
        assert ours == [(key, {name.lower(): content for name, content in members.items()}) for key, members in theirs]


def test_several_pictures_come_in_the_order_of_the_record(read):
    members = [("k.0.jpg", b"first"), ("k.1.png", b"second"), ("k.json", record("x", ["1.png", "0.jpg", "1.png"]))]
    good, _ = read(tar(members))
    assert good["k"].images == (("1.png", b"second"), ("0.jpg", b"first"), ("1.png", b"second"))


def test_picture_and_text_are_a_sample_as_img2dataset_writes_it(read):
    meta = json.dumps({"url": "http://x/y.jpg", "caption": "z", "width": 3}).encode()
    good, bad = read(
        tar([("k.jpg", b"picture"), ("k.json", meta), ("k.txt", " größer\n".encode()), ("m.txt", b"alone")])
    )
    assert bad == [] and good["k"].record["captions"] == ["größer"] and good["k"].record["url"] == "http://x/y.jpg"
    assert good["k"].images == (("jpg", b"picture"),) and good["m"].images == ()


def test_pictures_are_left_out_where_nobody_wants_them(read, tmp_path):
    read(tar(samples(1)))
    (slot,) = scan_shard(tmp_path / "x.tar")
    with open(tmp_path / "x.tar", "rb") as stream:
        assert read_slot(stream.fileno(), slot, images=False).images == (("jpg", b""),)


def test_joined_tars_are_read_to_their_end(read):
    first, second = tar(samples(3)), tar(samples(2, "other/"))
    good, bad = read(first + second)
    assert len(good) == 5 and bad == []


# --- one sample is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "name"),
    [
        ([("k.jpg", b"p")], "missing-record"),
        ([("k.json", record("x"))], "missing-image"),
        ([("k.png", b"p"), ("k.json", record("x"))], "missing-image"),
        ([("k.jpg", b"p"), ("k.json", b"{")], "bad-json"),
        ([("k.jpg", b"p"), ("k.json", b"")], "bad-json"),
        ([("k.jpg", b"p"), ("k.txt", b"")], "no-text"),
        ([("k.jpg", b"p"), ("k.txt", b"gr\xf6\xdfer")], "not-utf8"),
        ([("k.jpg", b"p"), ("k.json", b"gr\xf6\xdfer")], "not-utf8"),
        ([("gr\udcf6\udcdfer.jpg", b"p"), ("gr\udcf6\udcdfer.json", record("x"))], "not-utf8"),
        ([("k.jpg", b"p"), ("k.json", b"[1]")], "wrong-type"),
        ([("../k.jpg", b"p"), ("../k.json", record("x"))], "unsafe-name"),
        ([("/k.jpg", b"p"), ("/k.json", record("x"))], "unsafe-name"),
        ([("a/../../k.jpg", b"p"), ("a/../../k.json", record("x"))], "unsafe-name"),
        ([("..\\k.jpg", b"p"), ("..\\k.json", record("x"))], "unsafe-name"),
        ([("../k", b"p")], "unsafe-name"),
        (
            [(special("k.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""), ("k.json", record("x"))],
            "unsafe-name",
        ),
        ([(special("k.jpg", type=tarfile.LNKTYPE, linkname="s00.jpg"), b""), ("k.json", record("x"))], "unsafe-name"),
        ([(special("k.jpg", type=tarfile.FIFOTYPE), b""), ("k.json", record("x"))], "unsafe-name"),
        ([(special("k.jpg", type=tarfile.CHRTYPE), b""), ("k.json", record("x"))], "unsafe-name"),
        ([(special("k.jpg", type=b"Q"), b"p"), ("k.json", record("x"))], "unsafe-name"),
        ([("s00.jpg", b"p"), ("s00.json", record("x"))], "duplicate-key"),
        ([("s01.jpg", b"p"), ("s01.json", record("x"))], "duplicate-key"),
        ([("s01.png", b"p"), ("s01.json", record("x"))], "duplicate-key"),
    ],
)
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_bad_sample_is_one_fault_and_its_neighbours_are_whole(read, members, name, form):
    around = list(samples(4))
    whole, _ = read(tar(around))
    good, bad = read(tar([*around[:4], *((m, c) for m, c in members), *around[4:]], FORMATS[form]))
    assert [fault for _, fault in bad] == [name]
    assert good == whole


def test_member_of_more_than_a_gigabyte_is_not_read(read, monkeypatch):
    monkeypatch.setattr("visplice.train.data.tar_index.MAX_PICTURE", 600)
    monkeypatch.setattr("visplice.train.data.tar_index.MAX_TEXT", 300)
    members = [("a.jpg", bytes(601)), ("a.json", record("x")), ("b.jpg", bytes(600)), ("b.json", record("x" * 300))]
    good, bad = read(tar([*members, *samples(1)]))
    assert bad == [("a", "too-large"), ("b", "too-large")] and list(good) == ["s00"]


def test_raising_the_same_fault_again_keeps_no_frames(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar([("../k.jpg", b"p")]))
    (slot,) = scan_shard(tmp_path / "x.tar")
    for _ in range(3):
        with pytest.raises(Fault) as caught:
            read_slot(0, slot)
        assert len(caught.traceback) == 2
    assert slot.fault.__traceback__ is None


# --- the file is damaged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_file_cut_at_any_byte_loses_one_sample_and_what_follows(read, form):
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
def test_damaged_header_costs_one_sample(read, form):
    data = tar(samples(5), FORMATS[form])
    whole, _ = read(data)
    for at in range(0, len(data), 512):
        if data[at + 257 : at + 262] != b"ustar":
            continue
        good, bad = read(data[:at] + b"\xaa" + data[at + 1 :])
        assert [name for _, name in bad] == ["damaged-tar"], at
        assert len(good) == 4 and good.items() <= whole.items()


def test_garbage_between_samples_costs_none(read):
    first, second = tar(samples(3)).rstrip(b"\0"), tar(samples(2, "b/"))
    first += bytes(-len(first) % 512)
    good, bad = read(first + os.urandom(512 * 9) + second)
    assert len(good) == 5 and [name for _, name in bad] == ["damaged-tar"]
    good, bad = read(first + os.urandom(512 * 9 + 77))  # up to the end
    assert len(good) == 3 and [name for _, name in bad] == ["damaged-tar"]


def test_several_damages_are_several_faults(read):
    data = bytearray(tar(samples(9)))
    whole, _ = read(bytes(data))
    for key in ("s01.jpg", "s04.json", "s08.jpg"):
        data[data.index(key.encode())] = 0xFF
    good, bad = read(bytes(data))
    assert bad == [("s01", "damaged-tar"), ("s04", "damaged-tar"), ("s08", "damaged-tar")]
    assert good.items() <= whole.items() and len(good) == 6


@pytest.mark.parametrize("lost", ["0.jpg", "1.jpg", "json"])
def test_sample_around_a_break_is_counted_once(read, lost):
    sample = [("k.0.jpg", b"p"), ("k.1.jpg", b"q"), ("k.json", record("x", ["0.jpg", "1.jpg"]))]
    members = list(samples(4))
    data = tar([*members[:4], *sample, *members[4:]])
    at = data.index(f"k.{lost}".encode())
    good, bad = read(data[:at] + b"\0" + data[at + 1 :])
    assert bad == [("k", "damaged-tar")] and len(good) == 4


def test_caption_beside_a_break_is_not_taken_for_a_text_alone(read):
    members = [(f"k{index}.{suffix}", b"text") for index in range(3) for suffix in ("jpg", "txt")]
    data = tar(members)
    good, bad = read(data.replace(b"k1.jpg", b"\xffxxxxx", 1))
    assert bad == [("k1", "damaged-tar")] and list(good) == ["k0", "k2"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shard_is_one_fault_that_says_so(tmp_path, pack):
    (tmp_path / "x.tar").write_bytes(pack(tar(samples(3))))
    (slot,) = scan_shard(tmp_path / "x.tar")
    assert slot.fault.name == "damaged-tar"
    name = {"gzip": "gzip", "bz2": "bzip2", "lzma": "xz"}[pack.__module__]
    assert f"compressed with {name}; unpack it" in str(slot.fault)


def test_other_files_are_one_fault(read, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("k.jpg", "p")
    for content in ((tmp_path / "x.zip").read_bytes(), b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, b"text" * 500):
        good, bad = read(content)
        assert not good and [name for _, name in bad] == ["damaged-tar"]
    for content in (b"", b"short", tar(samples(1))[:512]):
        good, bad = read(content)
        assert not good and [name for _, name in bad] == ["truncated-tar"]


def test_empty_tar_holds_nothing_wrong(read):
    assert read(tar([])) == ({}, [])


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        scan_shard(tmp_path / "none.tar")


# --- hostile headers -------------------------------------------------------------------------------------------------


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
def test_size_that_is_a_lie_costs_no_memory(read, field, name):
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
def test_nonsense_in_an_extended_header_is_one_fault(read, records, name):
    whole = tar(samples(4))
    cut = whole.index(b"s02.jpg")
    sample = tar([("k.jpg", b"p")], tarfile.USTAR_FORMAT)[:1024]
    good, bad = read(whole[:cut] + pax(records) + sample + whole[cut:])
    assert [fault for _, fault in bad] == [name]
    assert list(good) == (["s00", "s01"] if name == "truncated-tar" else ["s00", "s01", "s02", "s03"])


def test_endless_extended_headers_end(read):
    data = pax(b"9 path=x\n") * 5_000 + pax(b"11 comment=\n" * 2, b"g") * 5_000 + tar(samples(1))
    started = time.monotonic()
    good, bad = read(data)
    assert time.monotonic() - started < 5 and len(good) + len(bad) == 1


@pytest.mark.parametrize("kind", [b"x", b"L", b"K", b"g"])
def test_huge_extended_header_costs_no_memory(read, tmp_path, kind):
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


def test_disk_full_of_zeros_is_passed_quickly(tmp_path):
    file = tmp_path / "x.tar"
    with open(file, "wb") as stream:
        stream.write(tar(samples(2)))
        stream.truncate(1 << 27)
    started = time.monotonic()
    assert len(scan_shard(file)) == 2
    assert time.monotonic() - started < 5


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs a tar program")
@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7", "oldgnu", "posix"])
def test_shards_of_the_tar_program_are_read(tmp_path, read, form):
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
def test_sparse_files_of_the_tar_program_are_faults(tmp_path, read, options):
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


# --- chance ----------------------------------------------------------------------------------------------------------


def test_mutated_shards_give_faults_and_good_samples_and_nothing_else(read):
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
