"""The data module: wrong paths at once, mixtures, and how each part decodes."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from visplice.train.data.module import ShardData
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_shards

KEYS = [f"s{index:03d}" for index in range(92)]


class Keys:
    """A preparer that keeps the key."""

    def __call__(self, sample, rng):
        return sample.key

    def collate(self, rows):
        return {"keys": rows}


def test_data_module_says_what_is_wrong_before_any_model_is_loaded(uneven, tmp_path):
    good, none = str(uneven), str(tmp_path / "none")
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


def test_training_decodes_fast_and_validation_exactly(uneven, preparer):
    for decode, dtype in (("fast", torch.uint8), ("exact", torch.float32)):
        data = attached(ShardData(str(uneven), val_path=str(uneven), decode=decode), preparer)
        assert next(iter(data.train_dataloader()))["pixels"].dtype == data.peek()["pixels"].dtype == dtype
        assert next(iter(data.val_dataloader()))["pixels"].dtype == torch.float32


def test_mixture_shows_each_set_by_its_weight(uneven, tmp_path):
    write_shards((Sample(key=f"t{n}", record={"captions": ["b"]}) for n in range(10)), tmp_path / "b", source={})
    data = attached(ShardData(mixture={str(uneven): 0.5, str(tmp_path / "b"): 3}), Keys())
    found = Counter(key for batch in data.train_dataloader() for key in batch["keys"])
    assert len(data.sources()) == 2
    assert {found[f"t{n}"] for n in range(10)} == {3} and sum(found[key] for key in KEYS) == 46


def test_skipped_samples_are_said_again_at_the_end(write_uneven, tmp_path, preparer, capsys):
    data = attached(ShardData(str(write_uneven(tmp_path / "bad", KEYS[4:8]))), preparer)
    list(data.train_dataloader())
    capsys.readouterr()
    data.teardown("fit")
    assert capsys.readouterr().err == "samples that could not be used: not-an-image 4\n"
