"""The order of samples: every one once per epoch whatever the ranks, and the same again from any position."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from visplice.train.data.order import Address, Order, permutation, sample_random

SHARDS = (17, 3, 29, 1, 11, 8, 23)  # samples of seven uneven shards
EVERY = Counter((shard, slot) for shard, count in enumerate(SHARDS) for slot in range(count))


def orders(world, counts=(SHARDS,), **options):
    options = {"batch_size": 4, "seed": 0, "shuffle_shards": 3} | options
    return [Order(counts, rank=rank, world=world, **options) for rank in range(world)]


def epoch(order, number=0):
    """Batches of one epoch."""
    return [order.batch(number * order.steps + step) for step in range(order.steps)]


def samples(batches):
    return Counter((a.shard, a.slot) for batch in batches for a in batch)


@pytest.mark.parametrize("seed", [0, 1, None])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_sample_comes_once_per_epoch_and_ranks_take_equal_steps(world, seed):
    for number in range(3):
        parts = [epoch(order, number) for order in orders(world, seed=seed)]
        assert sum((samples(part) for part in parts), Counter()) == EVERY
        assert len({len(part) for part in parts}) == 1
        sizes = [sum(map(len, part)) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert len(parts[0]) == -(-max(sizes) // 4)


def test_steps_are_those_of_the_longest_slice_and_the_last_batches_short_or_empty():
    parts = [epoch(order) for order in orders(3, counts=[[10]], batch_size=3)]  # slices of 3, 3 and 4
    assert [[len(batch) for batch in part] for part in parts] == [[3, 0], [3, 0], [3, 1]]
    parts = [epoch(order) for order in orders(4, counts=[[2]])]
    assert [[len(batch) for batch in part] for part in parts] == [[0], [1], [0], [1]]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_batch_is_the_same_when_it_is_asked_for_alone(world):
    for rank, order in enumerate(orders(world)):
        straight = [order.batch(position) for position in range(4 * order.steps)]
        for position in random.Random(rank).sample(range(len(straight)), 20):
            assert orders(world)[rank].batch(position) == straight[position]


def test_validation_keeps_the_order_of_the_shards():
    flat = [(a.shard, a.slot) for order in orders(3, seed=None) for batch in epoch(order) for a in batch]
    assert flat == sorted(EVERY)


def test_epochs_and_seeds_differ_and_a_seed_repeats():
    (order,), (again,), (other,) = orders(1), orders(1), orders(1, seed=1)
    first, second = epoch(order), epoch(order, 1)
    assert [[a[1:] for a in batch] for batch in first] != [[a[1:] for a in batch] for batch in second]
    assert first == epoch(again) != epoch(other)


def test_rank_opens_its_share_of_the_shards():
    world, counts = 8, [[100] * 80]
    for order in orders(world, counts=counts):
        touched = {a.shard for batch in epoch(order) for a in batch}
        assert len(touched) <= 80 / world + 1


def test_samples_of_a_window_are_shuffled_among_each_other_and_windows_follow_each_other():
    (order,) = orders(1, counts=[[50] * 12], shuffle_shards=4)
    flat = [a.shard for batch in epoch(order) for a in batch]
    windows = [flat[start : start + 200] for start in (0, 200, 400)]
    assert sorted(set(windows[0]) | set(windows[1]) | set(windows[2])) == list(range(12))
    for window in windows:
        assert Counter(window) == dict.fromkeys(set(window), 50) and len(set(window)) == 4
        changes = sum(one != other for one, other in pairwise(window))
        assert changes > 100  # of 150 expected; 3 if the shards stood one behind the other
    later = [a.shard for batch in epoch(order, 1) for a in batch]
    assert set(later[:200]) != set(windows[0])  # other shards come together in the next epoch


def test_four_hundred_million_samples_take_no_list_of_them(monkeypatch):
    longest = 0
    argsort = np.argsort

    def watched(keys, **options):
        nonlocal longest
        longest = max(longest, len(keys))
        return argsort(keys, **options)

    monkeypatch.setattr(np, "argsort", watched)
    order = Order([[10_000] * 40_000], batch_size=256, seed=0, rank=5, world=8)
    for position in (0, order.steps - 1, 7 * order.steps + 123_456):
        assert len(order.batch(position)) == (256 if position != order.steps - 1 else 50_000_000 % 256 or 256)
    assert longest == 16 * 10_000


# --- mixtures --------------------------------------------------------------------------------------------------------


def shown(weight, epochs, counts=SHARDS):
    """How often each sample of a set of that weight comes, over some epochs, and how many a single epoch shows."""
    (order,) = orders(1, counts=[counts], weights=[weight])
    seen, sizes = Counter(), []
    for number in range(epochs):
        part = samples(epoch(order, number))
        sizes.append(part.total())
        seen += part
    return [seen[sample] for sample in EVERY], sizes


@pytest.mark.parametrize(("weight", "epochs", "times"), [(2, 1, 2), (0.25, 4, 1), (1.5, 2, 3), (0.125, 8, 1)])
def test_weight_is_how_often_a_sample_comes_per_epoch(weight, epochs, times):
    times_seen, sizes = shown(weight, epochs, counts=[8 * count for count in SHARDS])
    counts = Counter(times_seen)
    assert counts == {times: len(times_seen)} and len(set(sizes)) == 1


@pytest.mark.parametrize("weight", [0.3, 0.01, 2.7])
def test_weight_that_does_not_divide_shows_samples_equally_often_as_near_as_can_be(weight):
    for epochs in (1, 3, 10, 37):
        times_seen, _ = shown(weight, epochs)
        assert max(times_seen) - min(times_seen) <= 1
        assert sum(times_seen) == pytest.approx(weight * epochs * len(times_seen), abs=0.5 * epochs)


def test_weights_of_one_are_the_sets_one_behind_the_other():
    counts = [SHARDS, (5, 0, 40), (1,)]
    for world in (1, 3):
        seen = Counter((a.source, a.shard, a.slot) for o in orders(world, counts) for batch in epoch(o) for a in batch)
        assert seen == {(i, j, k): 1 for i, sizes in enumerate(counts) for j, n in enumerate(sizes) for k in range(n)}


def test_sets_are_mixed_and_not_one_behind_the_other():
    (order,) = orders(1, counts=[[20] * 30, [20] * 30], weights=[1, 0.5], shuffle_shards=8)
    flat = [a.source for batch in epoch(order) for a in batch]
    for start in range(0, len(flat) - 320, 160):
        assert 0.1 < np.mean(flat[start : start + 320]) < 0.6  # a third on average


def test_copies_of_an_epoch_have_their_own_address():
    (order,) = orders(1, weights=[3])
    addresses = [a for batch in epoch(order) for a in batch]
    assert len(set(addresses)) == len(addresses) == 3 * sum(SHARDS)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match="each is a number above 0"):
        Order([[1]], batch_size=1, seed=0, weights=[weight])


def test_nothing_and_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="the data set holds no samples"):
        Order([[0, 0]], batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"data\.batch_size is 0; it is at least 1"):
        Order([[1]], batch_size=0, seed=0)
    with pytest.raises(ValueError, match=r"data\.shuffle_shards is 0"):
        Order([[1]], batch_size=1, seed=0, shuffle_shards=0)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_shuffles_and_draws_are_those_of_yesterday():
    """Written out: a checkpoint of today has to be resumable with the NumPy and Python of tomorrow."""
    assert permutation(8, "window", 0, 1).tolist() == [5, 7, 3, 0, 1, 6, 2, 4]
    assert sample_random(0, Address(1, 0, 0, 2, 3)).randrange(1000) == 244


def test_draws_differ_by_every_part_of_the_address():
    base = Address(epoch=1, source=0, copy=0, shard=2, slot=3)
    drawn = {sample_random(0, base).random(), sample_random(1, base).random()}
    for name in Address._fields:
        drawn.add(sample_random(0, base._replace(**{name: 7})).random())
    assert len(drawn) == 2 + len(Address._fields)
    assert sample_random(0, base).random() in drawn


@pytest.mark.parametrize("world", [1, 3])
def test_shards_ahead_are_those_of_this_window_and_the_next(world):
    for order in orders(world, counts=[[50] * 20]):
        for position in range(2 * order.steps):
            ahead = order.shards_ahead(position)
            assert len(set(ahead)) <= 6
            for step in (position, position + 1):
                assert {(a.source, a.shard) for a in order.batch(step)} <= set(ahead)
