"""Runs of convert: broken off and begun again, side by side, and what people get wrong."""

import json
import os

import pytest
from PIL import Image

from visplice.app.cli import main
from visplice.train.convert import journal
from visplice.train.convert.convert import convert
from visplice.train.convert.llava import llava_source


def make(folder, count=24, side=8):
    """Items of which every fifth has no picture, in shards of three: eight shards."""
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        if index % 5:
            image = Image.effect_noise((side, side), 50).convert("RGB")
            image.save(folder / "images" / f"{index}.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    items = [{"id": str(index), "image": f"{index}.jpg", "conversations": turns} for index in range(count)]
    (folder / "items.json").write_text(json.dumps(items))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def final(data):
    """Every file of an undisturbed run."""
    start(data, data / "final")
    return content(data / "final")


def start(data, out, **options):
    source = llava_source(data / "items.json")
    return convert(source, out, images=data / "images", **{"per_shard": 3, **options})


def words(data, out, *more):
    return ["--json", f"{data}/items.json", "--images", f"{data}/images", "--per-shard", "3", "--out", str(out), *more]


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Stop(Exception):
    pass


def start_and_stop(data, out, *, after):
    """A run that ends in an exception when so many shards are finished."""
    calls = iter(range(after))

    def stop(entries):
        if next(calls, None) is None:
            raise Stop

    with pytest.raises(Stop):
        start(data, out, progress=stop)


# --- the same result -------------------------------------------------------------------------------------------------


def test_workers_do_not_show_in_the_result(data, final, tmp_path):
    done = []
    start(data, tmp_path / "out", workers=3, progress=done.append)
    assert content(tmp_path / "out") == final
    assert sum(done) == 24


@pytest.mark.parametrize("after", [0, 1, 5, 7])
def test_run_that_was_broken_off_goes_on_behind_what_is_finished(data, final, tmp_path, after):
    out = tmp_path / "out"
    start_and_stop(data, out, after=after)
    assert "manifest.json" not in content(out)
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    assert len(before) == after + 1
    report = start(data, out)
    assert content(out) == final
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert (report["samples"], report["complete"]) == (19, False)


def test_run_that_ends_at_any_sync_to_disk_goes_on(data, final, tmp_path, monkeypatch):
    real, syncs = os.fsync, 0

    def stop(descriptor):
        nonlocal left
        if left == 0:
            raise Stop
        left -= 1
        real(descriptor)

    while True:
        out = tmp_path / str(syncs)
        left = syncs
        monkeypatch.setattr(os, "fsync", stop)
        try:
            start(data, out)
            break
        except Stop:
            monkeypatch.undo()
        start(data, out)
        assert content(out) == final, f"sync {syncs}"
        syncs += 1
    assert syncs == 1 + 2 * 8 + 5  # the journal's first line; each shard and its line; lists, manifest, folder


def test_what_a_kill_or_a_power_failure_leaves_is_set_right(data, final, tmp_path):
    out = tmp_path / "out"
    start_and_stop(data, out, after=4)
    with open(out / ".convert-1-of-1.jsonl", "ab") as file:
        file.write(b'{"shard": 5, "entr')  # killed while writing the line
    (out / "shard-000005.tar").write_bytes(b"of a run that did not come to write the line")
    (out / "shard-000006.tar.partial").write_bytes(b"half a shard")
    (out / "shard-000001.tar").unlink()
    (out / "shard-000002.tar").write_bytes(final["shard-000002.tar"][:512])
    start(data, out)
    assert content(out) == final


def test_complete_folder_is_left_alone(data, final, tmp_path):
    out = tmp_path / "out"
    start(data, out)
    assert start(data, out)["complete"]
    (out / ".convert-1-of-1.jsonl").touch()  # killed between the manifest and the end
    assert start(data, out)["complete"]
    assert content(out) == final
    (out / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"manifest\.json lists shard-000001\.tar, which is 0 bytes long"):
        start(data, out)


def test_full_disk_ends_in_one_line_and_the_next_run_goes_on(data, final, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    real, left = os.fsync, iter(range(5))

    def full(descriptor):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert main(["data", "convert", "llava", *words(data, out, "--workers", "1")]) == 2
    monkeypatch.undo()
    stderr = capsys.readouterr().err
    assert f"visplice: no space left in {out}; make room and run the same command again" in stderr
    assert list(out.glob("*.partial")) == [] and list(out.glob("*.tar")) != []
    assert main(["data", "convert", "llava", *words(data, out, "--workers", "1")]) == 0
    assert content(out) == final


# --- refusals --------------------------------------------------------------------------------------------------------


def test_folder_of_other_options_or_files_is_refused_with_both_sides(data, tmp_path):
    out = tmp_path / "out"
    start_and_stop(data, out, after=2)
    before = content(out)
    with pytest.raises(ValueError, match=r"begun with other .*: options\.per_shard is 3 there, 4 now; give the same"):
        start(data, out, per_shard=4)
    with pytest.raises(ValueError, match=r"options\.strict is False there, True now"):
        start(data, out, strict=True)
    with pytest.raises(ValueError, match="1 parts there, 2 now"):
        start(data, out, part=(1, 2))
    other = make(tmp_path / "other", 5)
    with pytest.raises(ValueError, match=r"files\[0\]\.bytes is \d+ there, \d+ now; files\[0\]\.sha256 is '"):
        start(other, out)
    assert content(out) == before
    start(data, out)
    with pytest.raises(ValueError, match=r"options\.per_shard is 3 there, 4 now"):
        start(data, out, per_shard=4)


def test_shards_of_unknown_origin_are_not_written_over(data, tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds shards that no manifest and no journal knows"):
        start(data, tmp_path)
    assert content(tmp_path) == {"shard-000000.tar": b"precious"}


def test_second_run_at_the_same_time_is_refused(data, final, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_PATIENCE", 0.1)
    out = tmp_path / "out"
    refused = []

    def second(entries):
        if not refused:
            with pytest.raises(BlockingIOError, match="another process is converting into") as error:
                start(data, out)
            refused.append(error)

    start(data, out, progress=second)
    assert refused and content(out) == final


def test_nothing_usable_names_the_commonest_faults_and_leaves_nothing(data, tmp_path):
    (tmp_path / "empty").mkdir()
    source = llava_source(data / "items.json")
    with pytest.raises(ValueError, match=r"no usable sample: 24 missing-image \(0\.jpg: No such file.*right --images"):
        convert(source, tmp_path / "out", images=tmp_path / "empty")
    assert content(tmp_path / "out") == {}
    convert(source, tmp_path / "out", images=data / "images")  # and now with the right one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llava", "--out", "{t}/o"], "llava needs --json: llava --json F [--images DIR] [--captions]"),
        (["vqav2", "--questions", "q", "--out", "o"], "vqav2 needs --annotations and --images: vqav2, okvqa"),
        (
            ["textvqa", "--questions", "q", "--annotations", "a", "--images", "i", "--out", "o"],
            "no use for --annotations",
        ),
        (["coco-captions", "--json", "j", "--images", "i", "--suffix", "x", "--out", "o"], "no use for --suffix"),
        (["pairs", "--out", "o"], "pairs needs --table or --images: pairs --table F.csv|.tsv|.parquet"),
        (["pairs", "--images", "i", "--image-column", "x", "--out", "o"], "are of a --table; none was given"),
        (["llava", "--json", "{t}/none.json", "--out", "{t}/o"], "No such file or directory: '"),
        (["llava", "--json", "{t}", "--out", "{t}/o"], "Is a directory: '"),
        (["llava", "--json", "{d}/items.json", "--out", "{t}/o"], "names pictures ('0.jpg' first); give their folder"),
        (["llava", "--json", "{t}/empty.json", "--out", "{t}/o"], "empty.json has no conversations"),
        (
            ["llava", "--json", "{d}/items.json", "--images", "{d}/images", "--out", "{t}/empty.json"],
            "is a file; it has",
        ),
        (
            ["llava", "--json", "{d}/items.json", "--images", "{d}/images", "--out", "/proc/x"],
            "No such file or directory",
        ),
        (["pairs", "--images", "{t}/none", "--out", "{t}/o"], "none: there is no such folder"),
    ],
)
def test_what_people_get_wrong_ends_in_one_line(data, tmp_path, capsys, arguments, message):
    (tmp_path / "empty.json").write_text("[]")
    given = [word.format(t=tmp_path, d=data) for word in arguments]
    assert main(["data", "convert", *given]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "-1/2"])
def test_part_that_is_none_is_refused(part, capsys):
    with pytest.raises(SystemExit):
        main(["data", "convert", "pairs", "--images", "i", "--out", "o", "--part", part])
    assert "i/n" in capsys.readouterr().err


def test_summary_counts_by_name(data, tmp_path, capsys):
    assert main(["data", "convert", "llava", *words(data, tmp_path / "out", "--workers", "1")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/out: 19 samples with 19 pictures in 8 shards, 0.1 MB")
    assert lines[1:4] == [
        "conversations: 24 read, 19 written, 5 skipped",
        "skipped:",
        "          5 missing-image      a picture that the record names is not there",
    ]
