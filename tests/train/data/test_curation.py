"""Overlays: what they say is what is read, and one that does not fit is refused."""

import hashlib
import json
import pickle

import pytest

from visplice.train.data.curation import (
    INDEX,
    Curation,
    fingerprint,
    load_curation,
    overlay_line,
    read_curation,
)
from visplice.train.data.record import Sample
from visplice.train.data.shards import read_manifest, write_shards

FIRST, SECOND = "shard-000000.tar", "shard-000001.tar"


def make(folder, text="caption"):
    samples = [Sample(key=f"s{index}", record={"captions": [f"{text} {index}"]}) for index in range(6)]
    write_shards(samples, folder, source={"name": "by hand"}, per_shard=3)
    return folder


def put(folder, *overlays):
    """Writes overlays (filter, lines) by hand, and the index that names them."""
    entries = []
    (folder / "curation").mkdir(exist_ok=True)
    for number, (name, lines) in enumerate(overlays, start=1):
        data = b"".join(lines)
        file = f"{number:02d}-{name}.jsonl"
        (folder / "curation" / file).write_bytes(data)
        counts = {
            "dropped": sum(len(json.loads(line)["dropped"]) for line in lines),
            "edited": sum(len(json.loads(line)["edits"]) for line in lines),
        }
        sha256 = hashlib.sha256(data).hexdigest()
        entries.append(
            {"file": file, "sha256": sha256, "filter": name, "options": {}, "counts": counts, "examples": {}}
        )
    index = {"schema": 1, "data": fingerprint(read_manifest(folder)), "applied": entries}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path):
    """Six samples in two shards, with two overlays."""
    made = make(tmp_path / "data")
    first = [
        overlay_line(FIRST, ["s1"], {"s0": {"captions": ["größe"], "url": "a"}}),
        overlay_line(SECOND, [], {"s3": {"captions": ["three"]}}),
    ]
    second = [overlay_line(FIRST, [], {"s0": {"captions": ["last"]}}), overlay_line(SECOND, ["s3", "s5"], {})]
    put(made, ("one", first), ("two", second))
    return made


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_no_overlay_is_no_curation(tmp_path):
    curation = load_curation(make(tmp_path))
    assert (curation.dropped(FIRST), curation.edits(FIRST)) == (frozenset(), {})
    assert (curation.describe(), curation.applied) == ([], [])


def test_overlays_add_up_and_the_later_edit_wins(folder):
    curation = load_curation(folder)
    assert curation.dropped(FIRST) == {"s1"}
    assert curation.edits(FIRST) == {"s0": {"captions": ["last"], "url": "a"}}
    # A dropped sample has no edits, and a shard that is not named has nothing.
    assert (curation.dropped(SECOND), curation.edits(SECOND)) == ({"s3", "s5"}, {})
    assert (curation.dropped("other"), curation.edits("other")) == (frozenset(), {})


def test_a_sample_is_given_its_edits_and_keeps_the_rest(folder):
    curation = load_curation(folder)
    sample = Sample(key="s0", images=(("jpg", b"x"),), record={"captions": ["old"], "id": 7})
    edited = curation.apply(FIRST, sample)
    assert edited == Sample(key="s0", images=(("jpg", b"x"),), record={"captions": ["last"], "id": 7, "url": "a"})
    assert sample.record["captions"] == ["old"]
    assert curation.apply(SECOND, sample) is sample


def test_many_more_shards_than_are_kept_parsed(tmp_path):
    lines = [overlay_line(f"shard-{index}.tar", [f"k{index}"], {}) for index in range(700)]
    data = b"".join(lines)
    entry = {"file": "01-x.jsonl", "sha256": hashlib.sha256(data).hexdigest(), "filter": "x"}
    curation = Curation([entry], [data])
    for _ in range(2):
        assert all(curation.dropped(f"shard-{index}.tar") == {f"k{index}"} for index in range(700))


def test_description_names_what_changes_the_data_and_nothing_else(folder):
    described = load_curation(folder).describe()
    assert [entry["filter"] for entry in described] == ["one", "two"]
    assert json.loads(json.dumps(described)) == described
    lines = [overlay_line(FIRST, ["s2"], {})]
    put(folder, ("idle", []), ("one", lines))
    assert [entry["filter"] for entry in load_curation(folder).describe()] == ["one"]
    assert load_curation(folder).describe() != described


def test_curation_crosses_process_borders(folder):
    curation = pickle.loads(pickle.dumps(load_curation(folder)))
    assert curation.dropped(SECOND) == {"s3", "s5"}


def test_it_is_read_through_whatever_gives_bytes(folder):
    asked = []

    def read(name):
        asked.append(name)
        return (folder / name).read_bytes()

    curation = read_curation(read, read_manifest(folder), "http://host/data")
    assert asked == ["curation/index.json", "curation/01-one.jsonl", "curation/02-two.jsonl"]
    assert curation.describe() == load_curation(folder).describe()


def test_data_made_again_refuses_the_old_overlays_by_name(folder):
    make(folder)  # the same content is the same data set
    assert load_curation(folder).dropped(FIRST) == {"s1"}
    make(folder, "another")
    with pytest.raises(ValueError, match=r"index\.json: one, two was applied to other shards.*--undo all"):
        load_curation(folder)


def test_changed_and_missing_overlays_are_refused(folder):
    file = folder / "curation" / "02-two.jsonl"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"02-two\.jsonl: not the file that the index names.*--undo two"):
        load_curation(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"02-two\.jsonl: missing, though two is applied"):
        load_curation(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"schema": 1, "appl', "not JSON"),
        ("[]", "schema is 'list'"),
        ('{"schema": 9}', "schema is 9"),
        ('{"schema": 1}', "lack fields"),
        ('{"schema": 1, "data": "x", "applied": [{}]}', "lack fields"),
        ('{"schema": 1, "data": "x", "applied": 3}', "lack fields"),
    ],
)
def test_broken_index_is_named(folder, text, message):
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=rf"curation/index\.json: .*{message}"):
        load_curation(folder)


def test_index_cannot_name_a_file_elsewhere(folder):
    change_index(folder, lambda index: index["applied"][0].update(file="../../01-one.jsonl"))
    with pytest.raises(ValueError, match="lack fields"):
        load_curation(folder)


def test_overlay_that_is_not_lines_of_shards_is_refused(folder):
    for lines in ([b"{}\n"], [b"\xff\n"], [b"[1]\n"]):
        data = b"".join(lines)
        (folder / "curation" / "01-one.jsonl").write_bytes(data)
        change_index(
            folder, lambda index, data=data: index["applied"][0].update(sha256=hashlib.sha256(data).hexdigest())
        )
        with pytest.raises(ValueError, match="line without a shard"):
            load_curation(folder)
