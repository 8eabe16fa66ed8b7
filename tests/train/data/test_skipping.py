"""What cannot be read or used: counted, named and left out, up to a budget; and processes that are ended."""

import os
import signal

import pytest

from visplice.train.data.loader import EvaluationLoader, ShardLoader
from visplice.train.data.samples import TooManySkipped
from visplice.train.data.shard_set import ShardSet

KEYS = [f"s{index:03d}" for index in range(92)]


def loader(folder, preparer, **options):
    options = {"batch_size": 4, "shuffle_shards": 3} | options
    return ShardLoader([ShardSet(folder)], preparer, **options)


def keys(batches):
    return [key for batch in batches for key in batch["keys"]]


BAD = ("s002", "s018", "s077", "s090")


@pytest.fixture(scope="module")
def damaged(write_uneven, tmp_path_factory):
    return write_uneven(tmp_path_factory.mktemp("data") / "bad", BAD)


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


def test_batch_of_nothing_but_bad_samples_has_no_rows(write_uneven, tmp_path, preparer):
    folder = write_uneven(tmp_path / "bad", KEYS[:20])
    batches = list(loader(folder, preparer, batch_size=1, max_skipped=20))
    assert len(batches) == len(KEYS) and sum(not batch["keys"] for batch in batches) == 20
    assert all(batch["pixels"].shape == (len(batch["keys"]), 3, 4, 4) for batch in batches)


def test_faults_in_a_shard_are_skipped_like_those_in_a_picture(write_uneven, tmp_path, preparer):
    folder = write_uneven(tmp_path / "cut")
    shard = folder / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    skipping = loader(folder, preparer)
    found = keys(skipping)
    assert len(found) + skipping.skipped.counts["truncated-tar"] in (len(KEYS), len(KEYS) + 1)
    assert [key for key in KEYS if key not in found and not "s020" <= key <= "s048"] == []


def test_peek_passes_over_batches_without_a_row_and_counts_nothing(write_uneven, tmp_path, preparer):
    folder = write_uneven(tmp_path / "bad", KEYS[1:])
    peeked = loader(folder, preparer)
    assert peeked.peek()["keys"] == ["s000"] and not peeked.skipped.counts
    with pytest.raises(ValueError, match="no sample of the data can be used"):
        loader(write_uneven(tmp_path / "worse", KEYS), preparer).peek()


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
def test_shard_that_vanishes_ends_the_run_in_one_line(write_uneven, tmp_path, preparer, workers):
    folder = write_uneven(tmp_path / "data")
    reading = loader(folder, preparer, num_workers=workers)
    for shard in folder.glob("*.tar"):
        shard.unlink()
    with pytest.raises(OSError, match=r"^\[Errno 2\] No such file or directory: '.*shard-00000\d\.tar'$"):
        next(iter(reading))
    reading.close()


class Deadly:
    """Ends the process that prepares a sample, as the kernel does when memory runs out."""

    def __call__(self, sample, rng):
        if sample.key == "s050":
            os.kill(os.getpid(), signal.SIGKILL)
        return sample.key

    def collate(self, rows):
        return {"keys": rows}


def test_worker_that_is_killed_ends_the_run_and_does_not_hang(uneven):
    reading = loader(uneven, Deadly(), num_workers=2, context="fork")
    with pytest.raises(ChildProcessError, match=r"a process that reads data is gone .*data\.num_workers"):
        list(reading)
    reading.close()


def test_killed_worker_of_the_server_process_ends_the_run_too(uneven, preparer):
    reading = loader(uneven, preparer, num_workers=1, batch_size=1)
    batches = iter(reading)
    next(batches)
    os.kill(reading._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"a process that reads data is gone \("):
        list(batches)
    reading.close()
