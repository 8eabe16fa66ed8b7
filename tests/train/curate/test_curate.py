"""Applying filters and taking them back, and what is read afterwards."""

import pytest

from visplice.train.curate import curate as job
from visplice.train.curate.curate import applied, curate, make_filter, undo
from visplice.train.data.curation import INDEX
from visplice.train.data.shard_set import ShardSet

MAIL = "write to joe@example.com"  # stands in the samples


# --- applying --------------------------------------------------------------------------------------------------------


def test_each_filter_sees_what_those_before_it_left(folder, put, captions):
    entry = put(folder, "duplicate-lines")
    assert entry["counts"]["removed"] == {"same-caption": 9 + 4}  # of ten and of five
    assert (entry["counts"]["dropped"], entry["counts"]["edited"]) == (0, 12)
    assert put(folder, "privacy")["counts"]["removed"] == {"email": 1}
    assert put(folder, "length", min_words=3)["counts"]["removed"] == {"too-few-words": 1 + 20}
    left = captions(folder)
    assert left["s00"] == ["caption number 0", "write to [email]"] and left["s01"] == ["caption number 1"]
    assert [entry["filter"] for entry in applied(folder)] == ["duplicate-lines", "privacy", "length"]
    # The other way round there are fewer lines to look at, and the same data at the end.
    undo(folder, "all")
    for name, options in (("length", {"min_words": 3}), ("privacy", {}), ("duplicate-lines", {})):
        entry = put(folder, name, **options)
    assert entry["counts"]["removed"] == {"same-caption": 4} and captions(folder) == left


def test_dropped_samples_are_neither_read_nor_counted(folder, read, put):
    entry = put(folder, "duplicate-urls")
    assert entry["counts"] == {
        "samples": 30, "dropped": 5, "edited": 0, "removed": {"same-url": 5}, "noted": {}, "unreadable": {},
    }  # fmt: skip
    assert entry["examples"]["same-url"][0] == {
        "shard": "shard-000003.tar", "key": "s25", "what": "x.org/0.jpg, as s00 of shard-000000.tar",
    }  # fmt: skip
    keys = [key for _, key, _ in read(folder)[0]]
    assert keys == [f"s{index:02d}" for index in range(25)]
    assert put(folder, "duplicate-pictures")["counts"]["samples"] == 25


def test_shards_and_manifest_are_never_written(folder, content, put):
    before = content(folder)
    for name in ("duplicate-lines", "duplicate-pictures", "privacy"):
        put(folder, name)
    after = content(folder)
    assert {name: data for name, data in after.items() if not name.startswith("curation/")} == before


def test_overlays_have_the_same_bytes_every_time_and_with_any_number_of_workers(folder, tmp_path, write, content, put):
    for name in ("duplicate-lines", "privacy", "near-lines"):
        put(folder, name)
    expected = content(folder)
    for copy, workers in (("again", 1), ("workers", 3)):
        write(tmp_path / copy)
        for name in ("duplicate-lines", "privacy", "near-lines"):
            curate(tmp_path / copy, make_filter(name, {}), workers=workers)
        assert content(tmp_path / copy) == expected, copy


def test_the_same_filter_again_does_nothing(folder, content, put):
    first = put(folder, "duplicate-lines", keep=2)
    before = content(folder)
    assert put(folder, "duplicate-lines", keep=2) == {**first, "again": True}
    assert content(folder) == before
    with pytest.raises(ValueError, match=r"applied with other options \(keep 2\); take it back first"):
        put(folder, "duplicate-lines", keep=3)
    assert content(folder) == before


def test_a_dry_run_reports_and_changes_nothing(folder, content, put):
    before = content(folder)
    report = curate(folder, make_filter("duplicate-lines", {}), dry_run=True)
    assert content(folder) == before
    assert put(folder, "duplicate-lines") == report


def test_what_cannot_be_read_is_counted_and_left(folder, put):
    shard = folder / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b'{"images"')
    data[at] = ord("(")
    shard.write_bytes(data)
    entry = put(folder, "duplicate-lines")
    assert entry["counts"]["unreadable"] == {"bad-json": 1} and entry["counts"]["samples"] == 30
    assert ShardSet(folder).describe()["samples"] == 30
    entry = put(folder, "picture-size", min_side=1)
    assert entry["counts"]["unreadable"] == {"bad-json": 1, "not-an-image": 29}


def test_a_filter_that_would_leave_nothing_is_refused(folder, content, put):
    before = content(folder)
    with pytest.raises(ValueError, match=r"length would leave no sample of .*; nothing was applied"):
        put(folder, "length", min_words=1000, fields=("captions", "conversations"))
    assert content(folder) == before


def test_what_changes_nothing_changes_no_description(folder, read, put):
    before = read(folder)
    put(folder, "length", min_words=1)
    assert read(folder) == before and [entry["filter"] for entry in applied(folder)] == ["length"]


def test_two_processes_do_not_curate_at_once(folder, put):
    put(folder, "privacy")
    with job._locked(folder), pytest.raises(BlockingIOError, match=r"another process curates .*data"):
        put(folder, "duplicate-lines")
    put(folder, "duplicate-lines")


# --- taking back -----------------------------------------------------------------------------------------------------


def test_taking_back_restores_the_identical_reading(folder, read, content, put):
    states, files = [read(folder)], [content(folder)]
    filters = {"duplicate-lines": {}, "duplicate-urls": {}, "privacy": {}, "length": {"min_words": 3}}
    for name, options in filters.items():
        put(folder, name, **options)
        states.append(read(folder))
        files.append(content(folder))
    assert len({str(state) for state in states}) == 5
    for name in reversed(filters):
        assert read(folder) == states.pop() and content(folder) == files.pop()
        assert undo(folder, name) == [name]
    assert read(folder) == states.pop() and content(folder) == files.pop()
    assert not (folder / "curation").exists()


def test_taking_back_all_restores_the_identical_reading(folder, read, content, put):
    before = read(folder), content(folder)
    for name in ("duplicate-lines", "privacy"):
        put(folder, name)
    assert undo(folder, "all") == ["duplicate-lines", "privacy"]
    assert (read(folder), content(folder)) == before
    assert undo(folder, "all") == []


def test_a_filter_under_others_is_not_taken_back_alone(folder, content, put):
    for name in ("duplicate-lines", "privacy", "length"):
        put(folder, name, **({"min_words": 3} if name == "length" else {}))
    before = content(folder)
    with pytest.raises(ValueError, match=r"privacy, length was applied after duplicate-lines.*--later undo.*redo"):
        undo(folder, "duplicate-lines")
    assert content(folder) == before
    assert undo(folder, "privacy", later="undo") == ["privacy", "length"]
    assert [entry["filter"] for entry in applied(folder)] == ["duplicate-lines"]


@pytest.mark.parametrize("workers", [1, 2])
def test_redone_filters_leave_what_they_would_have_left_alone(folder, tmp_path, workers, write, read, put):
    for name in ("duplicate-lines", "privacy", "duplicate-urls"):
        put(folder, name)
    # A caption that comes back has never been scrubbed; keeping the later overlays as they were would let it through.
    assert undo(folder, "duplicate-lines", later="redo", workers=workers) == ["duplicate-lines"]
    alone = tmp_path / "alone"
    write(alone)
    for name in ("privacy", "duplicate-urls"):
        put(alone, name)
    (found, description, curation), expected = read(folder), read(alone)
    assert (found, curation) == (expected[0], expected[2]) and description["digest"] == expected[1]["digest"]
    assert not any(MAIL in record for _, _, record in found)
    assert len(list((folder / "curation").glob("*.jsonl"))) == 2


def test_filters_that_are_not_applied_cannot_be_taken_back(folder, tmp_path, put):
    with pytest.raises(ValueError, match=r"privacy is not applied; nothing is"):
        undo(folder, "privacy")
    put(folder, "duplicate-lines")
    with pytest.raises(ValueError, match=r"privacy is not applied; applied is duplicate-lines"):
        undo(folder, "privacy")
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        undo(tmp_path / "nowhere", "all")
    assert not (tmp_path / "nowhere").exists()


def test_stale_and_broken_overlays_can_only_be_taken_back(folder, write, put):
    put(folder, "duplicate-lines")
    put(folder, "privacy")
    write(folder, count=29)
    for use in (lambda: ShardSet(folder), lambda: put(folder, "length", min_words=1)):
        with pytest.raises(ValueError, match=r"duplicate-lines, privacy was applied to other shards"):
            use()
    with pytest.raises(ValueError, match=r"applied to other shards"):
        undo(folder, "duplicate-lines", later="redo")
    assert undo(folder, "all") == ["duplicate-lines", "privacy"]
    assert ShardSet(folder).describe()["samples"] == 29
    put(folder, "privacy")
    (folder / INDEX).write_text("broken")
    with pytest.raises(ValueError, match="not JSON"):
        ShardSet(folder)
    undo(folder, "all")
    assert ShardSet(folder).curation.describe() == []
