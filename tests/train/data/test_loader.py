"""Batches: the same whatever reads them, and from where they were left."""

from collections import Counter

import pytest
import torch

from visplice.train.data.loader import EvaluationLoader, ShardLoader
from visplice.train.data.record import Sample
from visplice.train.data.shard_set import ShardSet
from visplice.train.data.shards import write_shards

KEYS = [f"s{index:03d}" for index in range(92)]


class Keys:
    """A preparer that keeps the key and draws a number."""

    def __call__(self, sample, rng):
        return {"key": sample.key, "drawn": rng.random()}

    def collate(self, rows):
        return {"keys": [row["key"] for row in rows], "drawn": [row["drawn"] for row in rows]}


def loader(folder, preparer=None, **options):
    options = {"batch_size": 4, "shuffle_shards": 3} | options
    return ShardLoader([ShardSet(folder)], preparer or Keys(), **options)


def keys(batches):
    return [key for batch in batches for key in batch["keys"]]


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_per_epoch_and_the_same_remaining_order_after_a_resume(uneven, world, rng):
    straight = {rank: [*loader(uneven, rank=rank, world=world)] for rank in range(world)}
    assert Counter(key for part in straight.values() for key in keys(part)) == Counter(KEYS)
    assert len({len(part) for part in straight.values()}) == 1
    for workers in (0, 1, 2):
        options = {"num_workers": workers, "context": "fork" if workers else None, "world": world}
        for rank in range(world):
            first = loader(uneven, rank=rank, **options)
            stopped, batches = rng.randrange(len(first)), iter(first)
            assert [next(batches) for _ in range(stopped)] == straight[rank][:stopped]
            state = first.state_dict()
            first.close()
            resumed = loader(uneven, rank=rank, **options)
            resumed.load_state_dict(state)
            assert list(resumed) == straight[rank][stopped:], (workers, rank, stopped)
            resumed.close()


def test_workers_as_they_are_started_for_users_give_the_same_batches(uneven, preparer):
    alone, shared = loader(uneven, preparer), loader(uneven, preparer, num_workers=2)
    for _ in range(2):
        for one, other in zip(alone, shared, strict=True):
            assert one["keys"] == other["keys"]
            for name in ("pixels", "captions", "offsets"):
                assert torch.equal(one[name], other[name])
    shared.close()


def test_spawned_workers_do_too(uneven, preparer):
    shared = loader(uneven, preparer, num_workers=1, context="spawn")
    batches = iter(shared)
    assert [next(batches)["keys"] for _ in range(2)] == [batch["keys"] for batch in loader(uneven)][:2]
    shared.close()


def test_iterations_follow_each_other_and_each_goes_to_the_end_of_its_epoch(uneven):
    endless = loader(uneven)
    epochs = [keys(endless) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [KEYS] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = loader(uneven)
    part = iter(again)
    begun = [next(part)["keys"] for _ in range(5)]
    assert [key for batch in begun for key in batch] + keys(again) == epochs[0]
    assert keys(again) == epochs[1]
    iter(again)  # one that nobody asks for a batch changes nothing
    assert keys(again) == epochs[2]


def test_what_is_drawn_depends_on_the_sample_and_the_epoch_alone(uneven):
    def drawn(batches):
        return {key: number for batch in batches for key, number in zip(batch["keys"], batch["drawn"], strict=True)}

    one, other = loader(uneven), loader(uneven, batch_size=7, shuffle_shards=2)
    first = drawn(one)
    assert first == drawn(other) and len(set(first.values())) == len(KEYS)
    assert drawn(one) != first


def test_peek_is_the_first_batch_and_leaves_the_place(uneven):
    peeked = loader(uneven)
    first = next(iter(loader(uneven)))
    batches = iter(peeked)
    for _ in range(3):
        next(batches)
    assert peeked.peek() == first and peeked.position == 3
    parts = [loader(uneven, rank=rank, world=3) for rank in range(3)]
    assert parts[0].peek() == parts[1].peek() == parts[2].peek() == next(iter(parts[0]))


def test_evaluation_takes_the_samples_in_their_order_every_time(uneven):
    for workers in (0, 2):
        options = {"batch_size": 6, "world": 2, "num_workers": workers, "context": "fork" if workers else None}
        loaders = [EvaluationLoader([ShardSet(uneven)], Keys(), rank=rank, **options) for rank in range(2)]
        assert len(loaders[0]) == len(loaders[1]) == 8
        first, second = ([list(part) for part in loaders] for _ in range(2))
        assert first == second and [len(part) for part in first] == [8, 8]
        assert keys(first[0]) + keys(first[1]) == KEYS
        next(iter(loaders[0]))  # a pass that is broken off, as the check before training is
        assert list(loaders[0]) == first[0]


# --- position --------------------------------------------------------------------------------------------------------


def test_position_means_nothing_in_another_order(uneven, tmp_path):
    state = loader(uneven).state_dict()
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
            loader(uneven, **options).load_state_dict(state)
    with pytest.raises(ValueError, match=r"this run has data .*other \(1 samples"):
        loader(other).load_state_dict(state)


def test_moved_data_is_the_same_data(uneven, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(uneven)
    state = loader(uneven).state_dict() | {"position": 9}
    resumed = loader(moved)
    resumed.load_state_dict(state)
    assert resumed.position == 9
