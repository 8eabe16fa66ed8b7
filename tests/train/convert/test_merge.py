"""Parts that several machines convert, and their merge: the same bytes as one machine makes."""

import json
import os

import pytest
from PIL import Image

from visplice.app.cli import main
from visplice.train.convert import merge as merging
from visplice.train.convert.convert import convert
from visplice.train.convert.journal import open_journal
from visplice.train.convert.llava import llava_source
from visplice.train.convert.merge import merge
from visplice.train.data.shards import read_manifest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty items in seven shards, of which every fourth has no picture and one is turned."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    exif = Image.Exif()
    for index in range(20):
        exif[0x0112] = 6 if index == 5 else 1
        if index % 4:
            Image.effect_noise((8, 8), 50).save(folder / "images" / f"{index}.jpg", exif=exif)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    items = [{"id": str(index), "image": f"{index}.jpg", "conversations": turns} for index in range(20)]
    (folder / "items.json").write_text(json.dumps(items))
    return folder


@pytest.fixture(scope="module")
def final(data):
    """Every file of a run without parts."""
    start(data, data / "final")
    return content(data / "final")


def start(data, out, **options):
    source = llava_source(data / "items.json")
    return convert(source, out, images=data / "images", **{"per_shard": 3, **options})


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("parts", [1, 3, 7, 9])
def test_parts_in_one_folder_give_the_folder_of_one_run(data, final, tmp_path, parts):
    out = tmp_path / "out"
    for number in reversed(range(1, parts + 1)):
        start(data, out, part=(number, parts))
    if parts > 1:
        assert sorted(out.glob("*.json")) == [out / f"part-{number}-of-{parts}.json" for number in range(1, parts + 1)]
        assert merge([out], out)["samples"] == 15
    assert content(out) == final
    assert read_manifest(out)["samples"] == 15


def test_parts_in_folders_of_their_own_keep_theirs(data, final, tmp_path):
    folders = [tmp_path / f"part{number}" for number in (1, 2, 3)]
    for number, folder in enumerate(folders, 1):
        start(data, folder, part=(number, 3))
    before = [content(folder) for folder in folders]
    report = merge(folders, tmp_path / "out")
    assert (report["samples"], report["complete"]) == (15, False)
    assert content(tmp_path / "out") == final
    assert [content(folder) for folder in folders] == before
    assert os.path.samefile(tmp_path / "out" / "shard-000000.tar", folders[0] / "shard-000000.tar")  # no second copy
    assert merge(folders, tmp_path / "out")["complete"]
    merge(folders, folders[1])  # into one of them
    assert content(folders[1]) == final


def test_shards_are_copied_where_links_do_not_reach(data, final, tmp_path, monkeypatch):
    for number in (1, 2):
        start(data, tmp_path / str(number), part=(number, 2))

    def across(*names):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    assert content(tmp_path / "out") == final
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_nlink == 1


def test_merge_that_was_broken_off_goes_on(data, final, tmp_path, monkeypatch):
    folders = [tmp_path / str(number) for number in (1, 2)]
    for number, folder in enumerate(folders, 1):
        start(data, folder, part=(number, 2))
    real, left = merging._bring, iter(range(3))

    def broken(*words):
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(*words)

    monkeypatch.setattr(merging, "_bring", broken)
    with pytest.raises(KeyboardInterrupt):
        merge(folders, tmp_path / "out")
    assert "manifest.json" not in content(tmp_path / "out")
    monkeypatch.undo()
    merge(folders, tmp_path / "out")
    assert content(tmp_path / "out") == final


def test_finished_part_and_merged_folder_are_left_alone(data, final, tmp_path):
    out = tmp_path / "out"
    for number in (1, 2):
        start(data, out, part=(number, 2))
        assert start(data, out, part=(number, 2))["complete"]
    merge([out], out)
    assert start(data, out, part=(2, 2))["complete"]
    assert merge([out], out)["complete"]
    assert content(out) == final


def test_missing_and_unfinished_parts_are_named(data, tmp_path):
    out = tmp_path / "out"
    start(data, out, part=(2, 4))
    identity = json.loads((out / "part-2-of-4.json").read_text())["source"]
    open_journal(out, identity, (3, 4)).close()  # begun, and then its machine was lost
    with pytest.raises(ValueError, match=r"of 4 parts these are missing: 1, 3 \(begun, not finished\), 4; convert"):
        merge([out], out)
    with pytest.raises(ValueError, match=r"no part-i-of-n\.json there"):
        merge([data], out)
    with pytest.raises(ValueError, match="there is no such folder"):
        merge([tmp_path / "none"], out)


def test_parts_of_other_options_are_refused(data, tmp_path):
    out = tmp_path / "out"
    start(data, out, part=(1, 2))
    with pytest.raises(ValueError, match="2 parts there, 3 now"):
        start(data, out, part=(2, 3))
    with pytest.raises(ValueError, match="2 parts there, 1 now"):
        start(data, out)
    start(data, tmp_path / "strict", part=(2, 2), strict=True)
    with pytest.raises(
        ValueError, match=r"part-2-of-2\.json does not belong to .*options\.strict is False there, True"
    ):
        merge([out, tmp_path / "strict"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_part_that_lost_a_shard_is_refused(data, tmp_path):
    out = tmp_path / "out"
    for number in (1, 2):
        start(data, out, part=(number, 2))
    (out / "shard-000003.tar").unlink()
    with pytest.raises(ValueError, match=r"part-2-of-2\.json lists shard-000003\.tar, which is missing"):
        merge([out], out)


def test_foreign_shard_in_the_output_is_not_written_over(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-000001.tar").write_bytes(b"precious")
    start(data, tmp_path / "part", part=(1, 1 + 1))
    start(data, tmp_path / "part", part=(2, 2))
    with pytest.raises(ValueError, match="no manifest and no journal knows"):
        merge([tmp_path / "part"], out)
    assert content(out) == {"shard-000001.tar": b"precious"}


def test_parts_of_which_nothing_is_usable_are_named_at_the_merge(data, tmp_path):
    (tmp_path / "empty").mkdir()
    source, out = llava_source(data / "items.json"), tmp_path / "out"
    for number in (1, 2):
        convert(source, out, images=tmp_path / "empty", part=(number, 2))
    with pytest.raises(ValueError, match="no usable sample: 20 missing-image"):
        merge([out], out)


def test_commands(data, final, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["llava", "--json", f"{data}/items.json", "--images", f"{data}/images", "--per-shard", "3", "--out", out]
    for part in ("1/2", "2/2"):
        assert main(["data", "convert", *words, "--workers", "1", "--part", part]) == 0
    told = capsys.readouterr().out
    assert f"{out} (part 2 of 2): 7 samples with 7 pictures in 3 shards" in told
    assert f"when all 2 parts are there: visplice data merge {out} --out DIR" in told
    assert main(["data", "merge", out, "--out", out]) == 0
    assert f"{out}: 15 samples with 15 pictures in 7 shards" in capsys.readouterr().out
    assert content(tmp_path / "out") == final
