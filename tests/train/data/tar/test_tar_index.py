"""The index of a shard: WebDataset's grouping, and one bad sample costs no other."""

import json
import random
import tarfile

import pytest
import webdataset

from visplice.train.data.record import Fault
from visplice.train.data.tar_index import read_slot, scan_shard

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
RECORD = json.dumps({"images": ["jpg"], "captions": ["x"]}).encode()


def special(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


# --- whole shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("folder", ["", "a/b.c/", "./", "größe/" + "long" * 15 + "/"])
def test_samples_are_found_in_every_format(read, form, folder, tar, samples):
    members = list(samples(5, folder))
    good, bad = read(tar(members, FORMATS[form]))
    assert bad == [] and list(good) == [f"{folder}s{index:02d}" for index in range(5)]
    assert [sample.images for sample in good.values()] == [(("jpg", data),) for _, data in members[::2]]
    assert good[f"{folder}s03"].record["captions"] == ["caption 3"]


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_names_longer_than_a_header_are_whole(read, form, tar, record):
    key = "ü" * 90 + "/" + "k" * 300
    good, bad = read(tar([(f"{key}.jpg", b"picture"), (f"{key}.json", record("x"))], FORMATS[form]))
    assert bad == [] and list(good) == [key]


def test_grouping_is_that_of_webdataset(read, tmp_path, tar):
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


def test_several_pictures_come_in_the_order_of_the_record(read, tar, record):
    members = [("k.0.jpg", b"first"), ("k.1.png", b"second"), ("k.json", record("x", ["1.png", "0.jpg", "1.png"]))]
    good, _ = read(tar(members))
    assert good["k"].images == (("1.png", b"second"), ("0.jpg", b"first"), ("1.png", b"second"))


def test_picture_and_text_are_a_sample_as_img2dataset_writes_it(read, tar):
    meta = json.dumps({"url": "http://x/y.jpg", "caption": "z", "width": 3}).encode()
    good, bad = read(
        tar([("k.jpg", b"picture"), ("k.json", meta), ("k.txt", " größer\n".encode()), ("m.txt", b"alone")])
    )
    assert bad == [] and good["k"].record["captions"] == ["größer"] and good["k"].record["url"] == "http://x/y.jpg"
    assert good["k"].images == (("jpg", b"picture"),) and good["m"].images == ()


def test_pictures_are_left_out_where_nobody_wants_them(read, tmp_path, tar, samples):
    read(tar(samples(1)))
    (slot,) = scan_shard(tmp_path / "x.tar")
    with open(tmp_path / "x.tar", "rb") as stream:
        assert read_slot(stream.fileno(), slot, images=False).images == (("jpg", b""),)


def test_joined_tars_are_read_to_their_end(read, tar, samples):
    first, second = tar(samples(3)), tar(samples(2, "other/"))
    good, bad = read(first + second)
    assert len(good) == 5 and bad == []


# --- one sample is wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "name"),
    [
        ([("k.jpg", b"p")], "missing-record"),
        ([("k.json", RECORD)], "missing-image"),
        ([("k.png", b"p"), ("k.json", RECORD)], "missing-image"),
        ([("k.jpg", b"p"), ("k.json", b"{")], "bad-json"),
        ([("k.jpg", b"p"), ("k.json", b"")], "bad-json"),
        ([("k.jpg", b"p"), ("k.txt", b"")], "no-text"),
        ([("k.jpg", b"p"), ("k.txt", b"gr\xf6\xdfer")], "not-utf8"),
        ([("k.jpg", b"p"), ("k.json", b"gr\xf6\xdfer")], "not-utf8"),
        ([("gr\udcf6\udcdfer.jpg", b"p"), ("gr\udcf6\udcdfer.json", RECORD)], "not-utf8"),
        ([("k.jpg", b"p"), ("k.json", b"[1]")], "wrong-type"),
        ([("../k.jpg", b"p"), ("../k.json", RECORD)], "unsafe-name"),
        ([("/k.jpg", b"p"), ("/k.json", RECORD)], "unsafe-name"),
        ([("a/../../k.jpg", b"p"), ("a/../../k.json", RECORD)], "unsafe-name"),
        ([("..\\k.jpg", b"p"), ("..\\k.json", RECORD)], "unsafe-name"),
        ([("../k", b"p")], "unsafe-name"),
        (
            [(special("k.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""), ("k.json", RECORD)],
            "unsafe-name",
        ),
        ([(special("k.jpg", type=tarfile.LNKTYPE, linkname="s00.jpg"), b""), ("k.json", RECORD)], "unsafe-name"),
        ([(special("k.jpg", type=tarfile.FIFOTYPE), b""), ("k.json", RECORD)], "unsafe-name"),
        ([(special("k.jpg", type=tarfile.CHRTYPE), b""), ("k.json", RECORD)], "unsafe-name"),
        ([(special("k.jpg", type=b"Q"), b"p"), ("k.json", RECORD)], "unsafe-name"),
        ([("s00.jpg", b"p"), ("s00.json", RECORD)], "duplicate-key"),
        ([("s01.jpg", b"p"), ("s01.json", RECORD)], "duplicate-key"),
        ([("s01.png", b"p"), ("s01.json", RECORD)], "duplicate-key"),
    ],
)
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_bad_sample_is_one_fault_and_its_neighbours_are_whole(read, members, name, form, tar, samples):
    around = list(samples(4))
    whole, _ = read(tar(around))
    good, bad = read(tar([*around[:4], *((m, c) for m, c in members), *around[4:]], FORMATS[form]))
    assert [fault for _, fault in bad] == [name]
    assert good == whole


def test_member_of_more_than_a_gigabyte_is_not_read(read, monkeypatch, tar, samples, record):
    monkeypatch.setattr("visplice.train.data.tar_index.MAX_PICTURE", 600)
    monkeypatch.setattr("visplice.train.data.tar_index.MAX_TEXT", 300)
    members = [("a.jpg", bytes(601)), ("a.json", record("x")), ("b.jpg", bytes(600)), ("b.json", record("x" * 300))]
    good, bad = read(tar([*members, *samples(1)]))
    assert bad == [("a", "too-large"), ("b", "too-large")] and list(good) == ["s00"]


def test_raising_the_same_fault_again_keeps_no_frames(tmp_path, tar):
    (tmp_path / "x.tar").write_bytes(tar([("../k.jpg", b"p")]))
    (slot,) = scan_shard(tmp_path / "x.tar")
    for _ in range(3):
        with pytest.raises(Fault) as caught:
            read_slot(0, slot)
        assert len(caught.traceback) == 2
    assert slot.fault.__traceback__ is None
