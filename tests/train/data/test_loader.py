"""Batches: the same whatever reads them, bad samples named and limited, and the position where it was left."""

import io
import os
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from visplice.train.data.loader import EvaluationLoader, ShardLoader
from visplice.train.data.module import ShardData
from visplice.train.data.prepare import AlignPreparer
from visplice.train.data.record import Sample
from visplice.train.data.samples import TooManySkipped
from visplice.train.data.shard_set import ShardSet
from visplice.train.data.shards import write_manifest, write_shard, write_shards
from visplice.vision.transform import Transform

SHARDS = (17, 3, 29, 1, 11, 8, 23)
KEYS = [f"s{index:03d}" for index in range(sum(SHARDS))]
CAPTIONS = ["a ring", "a red circle", "a blue star at the top"]


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Keys:
    """A preparer that keeps the key and draws a number."""

    def __call__(self, sample, rng):
        return {"key": sample.key, "drawn": rng.random()}

    def collate(self, rows):
        return {"keys": [row["key"] for row in rows], "drawn": [row["drawn"] for row in rows]}


def write(folder, bad=()):
    """Seven uneven shards; the pictures of `bad` samples are none."""
    folder.mkdir()
    keys, entries = iter(KEYS), []
    for number, count in enumerate(SHARDS):
        samples = []
        for _ in range(count):
            key = next(keys)
            picture = b"no picture" if key in bad else png()
            samples.append(Sample(key=key, images=(("png", picture),), record={"captions": CAPTIONS}))
        entries.append(write_shard(folder / f"shard-{number:06d}.tar", samples))
    write_manifest(folder, source={}, shards=entries)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "good")


@pytest.fixture(scope="module")
def preparer(tokenizer):
    transform = Transform(image_size=4, resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return AlignPreparer(transform=transform, tokenizer=tokenizer)


def loader(folder, preparer=None, **options):
    options = {"batch_size": 4, "shuffle_shards": 3} | options
    return ShardLoader([ShardSet(folder)], preparer or Keys(), **options)


def keys(batches):
    return [key for batch in batches for key in batch["keys"]]


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_per_epoch_and_the_same_remaining_order_after_a_resume(folder, world, rng):
    straight = {rank: [*loader(folder, rank=rank, world=world)] for rank in range(world)}
    assert Counter(key for part in straight.values() for key in keys(part)) == Counter(KEYS)
    assert len({len(part) for part in straight.values()}) == 1
    for workers in (0, 1, 2):
        options = {"num_workers": workers, "context": "fork" if workers else None, "world": world}
        for rank in range(world):
            first = loader(folder, rank=rank, **options)
            stopped, batches = rng.randrange(len(first)), iter(first)
            assert [next(batches) for _ in range(stopped)] == straight[rank][:stopped]
            state = first.state_dict()
            first.close()
            resumed = loader(folder, rank=rank, **options)
            resumed.load_state_dict(state)
            assert list(resumed) == straight[rank][stopped:], (workers, rank, stopped)
            resumed.close()


def test_workers_as_they_are_started_for_users_give_the_same_batches(folder, preparer):
    alone, shared = loader(folder, preparer), loader(folder, preparer, num_workers=2)
    for _ in range(2):
        for one, other in zip(alone, shared, strict=True):
            assert one["keys"] == other["keys"]
            for name in ("pixels", "captions", "offsets"):
                assert torch.equal(one[name], other[name])
    shared.close()


def test_spawned_workers_do_too(folder, preparer):
    shared = loader(folder, preparer, num_workers=1, context="spawn")
    batches = iter(shared)
    assert [next(batches)["keys"] for _ in range(2)] == [batch["keys"] for batch in loader(folder)][:2]
    shared.close()


def test_iterations_follow_each_other_and_each_goes_to_the_end_of_its_epoch(folder):
    endless = loader(folder)
    epochs = [keys(endless) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [KEYS] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = loader(folder)
    part = iter(again)
    begun = [next(part)["keys"] for _ in range(5)]
    assert [key for batch in begun for key in batch] + keys(again) == epochs[0]
    assert keys(again) == epochs[1]
    iter(again)  # one that nobody asks for a batch changes nothing
    assert keys(again) == epochs[2]


def test_what_is_drawn_depends_on_the_sample_and_the_epoch_alone(folder):
    def drawn(batches):
        return {key: number for batch in batches for key, number in zip(batch["keys"], batch["drawn"], strict=True)}

    one, other = loader(folder), loader(folder, batch_size=7, shuffle_shards=2)
    first = drawn(one)
    assert first == drawn(other) and len(set(first.values())) == len(KEYS)
    assert drawn(one) != first


def test_peek_is_the_first_batch_and_leaves_the_place(folder):
    peeked = loader(folder)
    first = next(iter(loader(folder)))
    batches = iter(peeked)
    for _ in range(3):
        next(batches)
    assert peeked.peek() == first and peeked.position == 3
    parts = [loader(folder, rank=rank, world=3) for rank in range(3)]
    assert parts[0].peek() == parts[1].peek() == parts[2].peek() == next(iter(parts[0]))


def test_evaluation_takes_the_samples_in_their_order_every_time(folder):
    for workers in (0, 2):
        options = {"batch_size": 6, "world": 2, "num_workers": workers, "context": "fork" if workers else None}
        loaders = [EvaluationLoader([ShardSet(folder)], Keys(), rank=rank, **options) for rank in range(2)]
        assert len(loaders[0]) == len(loaders[1]) == 8
        first, second = ([list(part) for part in loaders] for _ in range(2))
        assert first == second and [len(part) for part in first] == [8, 8]
        assert keys(first[0]) + keys(first[1]) == KEYS
        next(iter(loaders[0]))  # a pass that is broken off, as the check before training is
        assert list(loaders[0]) == first[0]


# --- what cannot be used ---------------------------------------------------------------------------------------------

BAD = {"s002": "empty", "s018": "", "s077": "", "s090": ""}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "bad", BAD)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_named_and_left_out(damaged, preparer, capsys, workers):
    skipping = loader(damaged, preparer, num_workers=workers, max_skipped=8, context="fork" if workers else None)
    batches = list(skipping)
    assert sorted(keys(batches)) == [key for key in KEYS if key not in BAD]
    assert all(len(batch["pixels"]) == len(batch["offsets"]) == len(batch["keys"]) for batch in batches)
    assert skipping.skipped.counts == {"not-an-image": 4}
    lines = sorted(capsys.readouterr().err.splitlines())
    assert [line.split(": ")[:4] for line in lines] == [
        ["skipped", f"shard-00000{shard}.tar", key, "not-an-image"]
        for shard, key in zip((0, 1, 6, 6), BAD, strict=True)
    ]
    list(skipping)
    assert skipping.skipped.counts == {"not-an-image": 8}  # the budget is the run's
    with pytest.raises(
        TooManySkipped, match=r"^9 samples could not be used \(not-an-image 9\), more than data\.max_ski"
    ):
        list(skipping)
    skipping.close()


def test_run_stops_at_the_first_sample_beyond_the_budget_and_names_it(damaged, preparer, capsys):
    with pytest.raises(TooManySkipped, match=r"data\.max_skipped 0; the last one is shard-.*: s0\d\d: not-an-image: "):
        list(loader(damaged, preparer, max_skipped=0))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_batch_of_nothing_but_bad_samples_has_no_rows(tmp_path, preparer):
    folder = write(tmp_path / "bad", KEYS[:20])
    batches = list(loader(folder, preparer, batch_size=1, max_skipped=20))
    assert len(batches) == len(KEYS) and sum(not batch["keys"] for batch in batches) == 20
    assert all(batch["pixels"].shape == (len(batch["keys"]), 3, 4, 4) for batch in batches)


def test_faults_in_a_shard_are_skipped_like_those_in_a_picture(tmp_path, preparer):
    folder = write(tmp_path / "cut")
    shard = folder / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    skipping = loader(folder, preparer)
    found = keys(skipping)
    assert len(found) + skipping.skipped.counts["truncated-tar"] in (len(KEYS), len(KEYS) + 1)
    assert [key for key in KEYS if key not in found and not "s020" <= key <= "s048"] == []


def test_peek_passes_over_batches_without_a_row_and_counts_nothing(tmp_path, preparer):
    folder = write(tmp_path / "bad", KEYS[1:])
    peeked = loader(folder, preparer)
    assert peeked.peek()["keys"] == ["s000"] and not peeked.skipped.counts
    with pytest.raises(ValueError, match="no sample of the data can be used"):
        loader(write(tmp_path / "worse", KEYS), preparer).peek()


def test_evaluation_counts_a_bad_sample_once(damaged, preparer, capsys):
    evaluation = EvaluationLoader([ShardSet(damaged)], preparer, batch_size=4, max_skipped=4)
    for _ in range(3):
        assert keys(evaluation) == [key for key in KEYS if key not in BAD]
    assert evaluation.skipped.counts == {"not-an-image": 4}
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_counts_go_on_after_a_resume(damaged, preparer):
    first = loader(damaged, preparer, max_skipped=100)
    list(first)
    resumed = loader(damaged, preparer, max_skipped=5)
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(TooManySkipped, match=r"^6 samples"):
        list(resumed)


@pytest.mark.parametrize("workers", [0, 1])
def test_shard_that_vanishes_ends_the_run_in_one_line(tmp_path, preparer, workers):
    folder = write(tmp_path / "data")
    reading = loader(folder, preparer, num_workers=workers)
    for shard in folder.glob("*.tar"):
        shard.unlink()
    with pytest.raises(OSError, match=r"^\[Errno 2\] No such file or directory: '.*shard-00000\d\.tar'$"):
        next(iter(reading))
    reading.close()


class Deadly(Keys):
    """Ends the process that prepares a sample, as the kernel does when memory runs out."""

    def __call__(self, sample, rng):
        if sample.key == "s050":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(sample, rng)


def test_worker_that_is_killed_ends_the_run_and_does_not_hang(folder):
    reading = loader(folder, Deadly(), num_workers=2, context="fork")
    with pytest.raises(ChildProcessError, match=r"a process that reads data is gone .*data\.num_workers"):
        list(reading)
    reading.close()


def test_killed_worker_of_the_server_process_ends_the_run_too(folder, preparer):
    reading = loader(folder, preparer, num_workers=1, batch_size=1)
    batches = iter(reading)
    next(batches)
    os.kill(reading._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"a process that reads data is gone \("):
        list(batches)
    reading.close()


# --- position --------------------------------------------------------------------------------------------------------


def test_position_means_nothing_in_another_order(folder, tmp_path):
    state = loader(folder).state_dict()
    other = tmp_path / "other"
    write_shards([Sample(key="a", record={"captions": ["b"]})], other, source={})
    for options, theirs, ours in (
        ({"batch_size": 8}, "batch_size 4", "batch_size 8"),
        ({"seed": 3}, "seed 0", "seed 3"),
        ({"world": 2, "batch_size": 2}, "batch_size 4, ranks 1", "batch_size 2, ranks 2"),
        ({"shuffle_shards": 1}, "shuffle_shards 3", "shuffle_shards 1"),
        ({"weights": [2.0]}, r"data .*good \(92 samples, \w{8}, weight 1\)", r"data .* weight 2\)"),
    ):
        with pytest.raises(ValueError, match=f"written with {theirs}, but this run has {ours}; its place"):
            loader(folder, **options).load_state_dict(state)
    with pytest.raises(ValueError, match=r"this run has data .*other \(1 samples"):
        loader(other).load_state_dict(state)


def test_moved_data_is_the_same_data(folder, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(folder)
    state = loader(folder).state_dict() | {"position": 9}
    resumed = loader(moved)
    resumed.load_state_dict(state)
    assert resumed.position == 9


# --- the data module -------------------------------------------------------------------------------------------------


def test_data_module_says_what_is_wrong_before_any_model_is_loaded(folder, tmp_path):
    good, none = str(folder), str(tmp_path / "none")
    for options, message in (
        ({"path": none}, r"none/manifest\.json: no such file"),
        ({"path": good, "val_path": none}, r"none/manifest\.json: no such file"),
        ({"mixture": {good: 1, none: 2}}, r"none/manifest\.json: no such file"),
        ({"mixture": {good: 0}}, "gives .*good the weight 0; it is above 0"),
        ({}, r"data\.path, or several sets as data\.mixture; neither is given"),
        ({"path": good, "mixture": {good: 1}}, "both are given"),
        ({"path": good, "batch_size": 0}, r"data\.batch_size is 0; it is at least 1"),
        ({"path": good, "shuffle_shards": 0}, r"data\.shuffle_shards is 0"),
        ({"path": good, "decode": "draft"}, r"data\.decode is 'draft'; it is one of fast, exact"),
    ):
        with pytest.raises(ValueError, match=message):
            ShardData(**options)


def test_empty_data_set_is_refused(tmp_path):
    write_shards([], tmp_path, source={})
    with pytest.raises(ValueError, match="holds no samples"):
        ShardData(str(tmp_path))


def attached(data, preparer):
    """A data module with what it takes from a trainer."""
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(preparer=preparer),
        global_rank=0,
        world_size=1,
        num_devices=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def test_training_decodes_fast_and_validation_exactly(folder, preparer):
    for decode, dtype in (("fast", torch.uint8), ("exact", torch.float32)):
        data = attached(ShardData(str(folder), val_path=str(folder), decode=decode), preparer)
        assert next(iter(data.train_dataloader()))["pixels"].dtype == data.peek()["pixels"].dtype == dtype
        assert next(iter(data.val_dataloader()))["pixels"].dtype == torch.float32


def test_mixture_shows_each_set_by_its_weight(folder, tmp_path):
    write_shards((Sample(key=f"t{n}", record={"captions": ["b"]}) for n in range(10)), tmp_path / "b", source={})
    data = attached(ShardData(mixture={str(folder): 0.5, str(tmp_path / "b"): 3}), Keys())
    found = Counter(keys(data.train_dataloader()))
    assert len(data.sources()) == 2
    assert {found[f"t{n}"] for n in range(10)} == {3} and sum(found[key] for key in KEYS) == 46


def test_skipped_samples_are_said_again_at_the_end(damaged, preparer, capsys):
    data = attached(ShardData(str(damaged)), preparer)
    list(data.train_dataloader())
    capsys.readouterr()
    data.teardown("fit")
    assert capsys.readouterr().err == "samples that could not be used: not-an-image 4\n"
