"""Shards: WebDataset's own reader opens them, and what is not whole is refused."""

import hashlib
import io
import json
import tarfile

import pytest
import webdataset

from visplice.train.data.record import Fault, Sample
from visplice.train.data.shards import read_manifest, read_samples, write_shards

SOURCE = {"name": "by hand"}


def make(count):
    """Samples with a picture, every fourth of text alone."""
    for index in range(count):
        images = () if index % 4 == 3 else (("jpg", f"picture {index}".encode()),)
        yield Sample(key=f"s{index:03d}", images=images, record={"captions": [f"größe {index}"]})


@pytest.fixture
def folder(tmp_path):
    """Ten samples in three shards."""
    write_shards(make(10), tmp_path / "data", source=SOURCE, per_shard=4)
    return tmp_path / "data"


def files(folder):
    return [str(file) for file in sorted(folder.glob("*.tar"))]


def keys(folder):
    return [sample.key for sample in read_samples(files(folder))]


def edit_manifest(folder, change):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_plain_webdataset_reads_the_shards(folder):
    urls = files(folder)
    assert [url.rsplit("/", 1)[1] for url in urls] == [f"shard-{n:06d}.tar" for n in range(3)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"s{index:03d}" for index in range(10)]
    for index, sample in enumerate(read):
        assert json.loads(sample["json"]) == {
            "images": [] if index % 4 == 3 else ["jpg"],
            "captions": [f"größe {index}"],
        }
        assert sample.get("jpg") == (None if index % 4 == 3 else f"picture {index}".encode())


def test_same_samples_give_the_same_bytes(folder, tmp_path):
    write_shards(make(10), tmp_path / "again", source=SOURCE, per_shard=4)
    for name in ("manifest.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_manifest_counts_and_hashes_every_shard(folder):
    manifest = read_manifest(folder)
    assert (manifest["source"], manifest["samples"], manifest["images"]) == (SOURCE, 10, 8)
    assert [shard["samples"] for shard in manifest["shards"]] == [4, 4, 2]
    for shard in manifest["shards"]:
        content = (folder / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest["bytes"] == sum(shard["bytes"] for shard in manifest["shards"])


def test_writing_fewer_samples_again_leaves_no_stale_shard(folder):
    write_shards(make(3), folder, source=SOURCE, per_shard=4)
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "shard-000000.tar"]
    assert keys(folder) == ["s000", "s001", "s002"]


def test_crash_midway_leaves_no_manifest_and_no_half_shard(folder):
    def crashing():
        yield from make(6)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_shards(crashing(), folder, source=SOURCE, per_shard=4)  # over a whole data set
    assert [file.name for file in folder.iterdir()] == ["shard-000000.tar"]
    assert keys(folder) == ["s000", "s001", "s002", "s003"]
    with pytest.raises(ValueError, match=r"manifest\.json: no such file"):
        read_manifest(folder)


def test_crash_inside_a_shard_leaves_nothing_that_looks_like_one(tmp_path):
    samples = [*make(2), Sample(key="bad", record={"captions": {1, 2}})]  # a set is no JSON
    with pytest.raises(TypeError):
        write_shards(samples, tmp_path, source=SOURCE)
    assert files(tmp_path) == [] and not (tmp_path / "manifest.json").exists()


def test_key_with_a_dot_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sample key 'a/img\.1' holds a dot"):
        write_shards([Sample(key="a/img.1", images=(("jpg", b"x"),), record={})], tmp_path, source=SOURCE)


# --- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b'{"schema": 2, "sha', b"\xff\xfe", b""])
def test_broken_manifest_is_named(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON"):
        read_manifest(folder)


@pytest.mark.parametrize("field", ["source", "samples", "images", "bytes", "shards"])
def test_manifest_without_a_field_is_refused(folder, field):
    edit_manifest(folder, lambda manifest: manifest.pop(field))
    with pytest.raises(ValueError, match=r"manifest\.json: lacks"):
        read_manifest(folder)


def test_manifest_whose_shards_have_no_size_is_refused(folder):
    edit_manifest(folder, lambda manifest: manifest["shards"][1].pop("bytes"))
    with pytest.raises(ValueError, match=r"manifest\.json: lacks"):
        read_manifest(folder)


def test_other_schema_is_refused(folder):
    edit_manifest(folder, lambda manifest: manifest.update(schema=1))
    with pytest.raises(ValueError, match=r"manifest\.json: schema is 1; this version reads 2"):
        read_manifest(folder)
    (folder / "manifest.json").write_text("[1]")
    with pytest.raises(ValueError, match="schema is 'list'"):
        read_manifest(folder)


def test_missing_folder_and_a_file_in_its_place_are_named(folder):
    for path in (folder / "nowhere", folder / "shard-000000.tar"):
        with pytest.raises(ValueError, match=rf"{path.name}/manifest\.json: no such file"):
            read_manifest(path)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_samples_come_back_as_they_were_written(folder):
    assert list(read_samples(files(folder))) == [
        Sample(key=sample.key, images=sample.images, record={"images": [n for n, _ in sample.images], **sample.record})
        for sample in make(10)
    ]


def test_several_pictures_come_back_in_their_order(tmp_path):
    images = (("0.png", b"a"), ("1.jpg", b"b"), ("10.jpg", b"c"), ("2.jpg", b"d"))
    write_shards([Sample(key="many", images=images, record={"captions": ["x"]})], tmp_path, source=SOURCE)
    (sample,) = read_samples(files(tmp_path))
    assert sample.images == images


@pytest.mark.parametrize(
    ("members", "fault", "message"),
    [
        ({"bad.json": b'{"captions": ['}, "bad-json", "the record is not JSON"),
        ({"lonely.png": b"picture"}, "missing-record", r"lonely has neither lonely\.json nor lonely\.txt"),
    ],
)
def test_sample_that_cannot_be_read_is_a_fault_with_its_name(tmp_path, members, fault, message):
    write_tar(tmp_path / "x.tar", {"good.json": b'{"captions": ["a"]}'} | members)
    samples = read_samples(files(tmp_path))
    assert next(samples).key == "good"
    with pytest.raises(Fault, match=message) as caught:
        next(samples)
    assert caught.value.name == fault
