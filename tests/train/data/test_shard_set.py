"""A folder of shards: any sample of any shard, and what is wrong with the folder costs no more than it has to."""

import io
import json
import pickle
import random
import tarfile

import pytest

from visplice.train.data.curation import fingerprint, overlay_line
from visplice.train.data.record import Fault, Sample
from visplice.train.data.shard_set import ShardSet
from visplice.train.data.shards import read_samples, write_json, write_shards


def make(count):
    for index in range(count):
        images = () if index % 4 == 3 else (("jpg", f"picture {index}".encode() * 40),)
        yield Sample(key=f"s{index:03d}", images=images, record={"captions": [f"größe {index}"]})


@pytest.fixture
def folder(tmp_path):
    """Fourteen samples in shards of five, five and four."""
    write_shards(make(14), tmp_path / "data", source={}, per_shard=5)
    return tmp_path / "data"


def read_all(source):
    """Keys of what can be read, and names of faults."""
    keys, faults = [], []
    for shard, count in enumerate(source.counts):
        for slot in range(count):
            try:
                keys.append(source.read(shard, slot).key)
            except Fault as fault:
                faults.append(fault.name)
    return keys, faults


def shorten(file, size):
    file.write_bytes(file.read_bytes()[:size])


# --- reading ---------------------------------------------------------------------------------------------------------


def test_samples_are_those_that_were_written_in_whatever_order_they_are_read(folder):
    source = ShardSet(folder, keep=1)
    assert (source.names, source.counts) == ([f"shard-{n:06d}.tar" for n in range(3)], [5, 5, 4])
    expected = list(read_samples(sorted(folder.glob("*.tar"))))
    places = [(shard, slot) for shard, count in enumerate(source.counts) for slot in range(count)]
    for place in random.Random(0).sample(places, len(places)):
        assert source.read(*place) == expected[places.index(place)]


def test_pictures_are_left_out_where_only_the_record_is_wanted(folder):
    sample = ShardSet(folder).read(0, 0, images=False)
    assert sample.images == (("jpg", b""),) and sample.record["captions"] == ["größe 0"]


def test_no_more_shards_stay_open_than_asked_for(folder):
    source = ShardSet(folder, keep=2)
    read_all(source)
    assert len(source._open) == 2


def test_it_can_be_sent_to_another_process_while_it_is_open(folder):
    source = ShardSet(folder)
    before = read_all(source)
    sent = pickle.loads(pickle.dumps(source))
    assert not sent._open and read_all(sent) == before


def test_description_names_the_content_and_not_the_place(folder, tmp_path):
    described = ShardSet(folder).describe()
    assert (described["path"], described["samples"]) == (str(folder), 14)
    folder.rename(tmp_path / "elsewhere")
    moved = ShardSet(tmp_path / "elsewhere").describe()
    assert moved["digest"] == described["digest"] and moved["path"] != described["path"]
    write_shards(make(13), folder, source={}, per_shard=5)
    assert ShardSet(folder).describe()["digest"] != described["digest"]


# --- what is not as it was written -----------------------------------------------------------------------------------


def test_cut_shard_keeps_its_whole_samples_and_counts_the_others(folder):
    file = folder / "shard-000001.tar"
    lengths = range(0, file.stat().st_size, 512)
    content = file.read_bytes()
    for length in lengths:
        file.write_bytes(content[:length])
        source = ShardSet(folder)
        keys, faults = read_all(source)
        whole = [key for key in keys if "s005" <= key <= "s009"]
        assert [key for key in keys if key not in whole] == [f"s{n:03d}" for n in (*range(5), *range(10, 14))]
        assert whole == [f"s{n:03d}" for n in range(5, 5 + len(whole))]
        assert len(whole) + len(faults) in (5, 6) and set(faults) <= {"truncated-tar"}, length
    assert len(whole) == 5  # only the end mark is cut


def test_damage_in_a_shard_of_the_right_size_costs_one_sample(folder):
    file = folder / "shard-000000.tar"
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        for member in tar:
            damaged = content.copy()
            damaged[member.offset + 150] ^= 0x10  # in its checksum
            file.write_bytes(damaged)
            source = ShardSet(folder)
            keys, faults = read_all(source)
            assert source.counts == [5, 5, 4]
            assert len(keys) == 13 and len(faults) == 1, member.name
            assert member.name.split(".")[0] not in keys


def test_missing_shard_is_named_at_once(folder):
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001\.tar: no such file, but the manifest names it"):
        ShardSet(folder)


def test_shard_that_grew_is_read_whole(folder):
    other = folder.parent / "other"
    write_shards(make(9), other, source={}, per_shard=9)
    (other / "shard-000000.tar").replace(folder / "shard-000002.tar")
    source = ShardSet(folder)
    assert source.counts == [5, 5, 9] and len(read_all(source)[0]) == 19


def test_shard_that_changes_while_it_is_open_is_an_error(folder):
    source = ShardSet(folder)
    other = folder.parent / "other"
    write_shards(make(9), other, source={}, per_shard=9)
    (other / "shard-000000.tar").replace(folder / "shard-000002.tar")
    with pytest.raises(OSError, match=r"shard-000002\.tar: 9 samples, but 4 were counted"):
        source.read(2, 0)


def test_manifest_whose_shards_lie_elsewhere_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"name": "../x.tar"}, r"shard '\.\./x\.tar' leads out of the folder"),
        ({"name": "/etc/passwd"}, "leads out of the folder"),
        ({"sha256": "../../x"}, "has sha256 '../../x'; it is 64 hexadecimal digits"),
    ):
        shards = [manifest["shards"][0] | change, *manifest["shards"][1:]]
        write_json(folder / "manifest.json", manifest | {"shards": shards})
        with pytest.raises(ValueError, match=message):
            ShardSet(folder)


# --- folders of others -----------------------------------------------------------------------------------------------


def test_tar_files_without_a_manifest_are_read_as_they_are(tmp_path, capsys):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            for index in range(3):
                for name, content in ((f"{number}{index}.jpg", b"x"), (f"{number}{index}.txt", b"a caption")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    source = ShardSet(tmp_path)
    assert read_all(source) == (["00", "01", "02", "10", "11", "12"], [])
    assert source.read(1, 2).record["captions"] == ["a caption"]
    assert "no manifest.json, so its files are read as they are, 6 samples in 2 tar files" in capsys.readouterr().err
    shorten(tmp_path / "00001.tar", 1024 + 1024 + 512)
    assert read_all(ShardSet(tmp_path)) == (["00", "01", "02", "10"], ["truncated-tar"])


@pytest.mark.parametrize("left", [".convert-1-of-1.jsonl", "part-1-of-2.json", "shard-000003.tar.partial"])
def test_data_set_that_is_not_finished_is_refused(folder, left):
    (folder / "manifest.json").unlink()
    (folder / left).touch()
    with pytest.raises(ValueError, match="the data set is not finished"):
        ShardSet(folder)


def test_folder_without_data_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"manifest\.json: no such file"):
            ShardSet(path)


# --- curation --------------------------------------------------------------------------------------------------------


def curate(folder, lines):
    """One overlay, as `visplice data curate` leaves it."""
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    data = b"".join(overlay_line(*line) for line in lines)
    (folder / "curation").mkdir(exist_ok=True)
    (folder / "curation/01-x.jsonl").write_bytes(data)
    entry = {
        "file": "01-x.jsonl", "sha256": hashlib.sha256(data).hexdigest(), "filter": "x", "options": {},
        "counts": {"dropped": 3, "edited": 1}, "examples": {},
    }  # fmt: skip
    index = {"schema": 1, "data": fingerprint(manifest), "applied": [entry]}
    write_json(folder / "curation/index.json", index)


def test_curation_drops_and_changes_samples_until_it_is_taken_back(folder):
    plain = ShardSet(folder)
    edits = {"s007": {"captions": ["scrubbed"]}}
    curate(folder, [("shard-000000.tar", ["s001", "s004"], {}), ("shard-000001.tar", ["s005"], edits)])
    source = ShardSet(folder)
    assert source.counts == [3, 4, 4] and [len(source.slots(shard)) for shard in range(3)] == [3, 4, 4]
    keys, faults = read_all(source)
    assert keys == [f"s{n:03d}" for n in range(14) if n not in (1, 4, 5)] and not faults
    assert source.read(1, 1).record["captions"] == ["scrubbed"]
    assert source.describe()["digest"] != plain.describe()["digest"]
    (folder / "curation/index.json").unlink()
    assert read_all(ShardSet(folder)) == read_all(plain)
    assert ShardSet(folder).describe() == plain.describe()


def test_record_that_curation_emptied_is_a_fault(folder):
    curate(folder, [("shard-000000.tar", [], {"s000": {"captions": [""]}})])
    with pytest.raises(Fault, match="a caption is empty"):
        ShardSet(folder).read(0, 0)


def test_cut_shard_is_curated_too(folder):
    curate(folder, [("shard-000000.tar", ["s001"], {})])
    with tarfile.open(folder / "shard-000000.tar") as tar:
        end = tar.getmember("s003.json").offset
    shorten(folder / "shard-000000.tar", end)
    keys, faults = read_all(ShardSet(folder))
    assert keys[:2] == ["s000", "s002"] and faults == ["truncated-tar"] * 2
