"""Two processes train as one does: the same gradients and weights, whatever batch each of them has, and no waiting."""

import os
import socket
import time
import traceback
from itertools import chain

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp

from visplice.lm.extension import EMBEDDED
from visplice.train.align import Align
from visplice.train.data.record import Sample
from visplice.train.data.shards import read_samples
from visplice.train.instruct import Instruct
from visplice.train.optim import OptimConfig
from visplice.train.stopped import TrainingStopped
from visplice.train.trainer import ending_together, quiet_lightning

RATE = 1e-5  # Adam divides by the gradient, so that its rounding comes back in the weights, times this
LIMIT = 120.0  # seconds after which processes that wait for each other are ended
TALK = [{"from": "human", "value": "What is two and two?"}, {"from": "gpt", "value": "four, and nothing else"}]
TEXT = Sample(key="words", record={"conversations": TALK, "captions": ["four"]})


class Batches:
    """A loader; a list would be several."""

    def __init__(self, batches) -> None:
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Given(L.LightningDataModule):
    """Batches of given samples: for every step, those of each rank."""

    def __init__(self, steps, samples) -> None:
        super().__init__()
        self.steps, self.samples = steps, samples

    def sources(self):
        return []

    def batch(self, names):
        preparer = self.trainer.lightning_module.preparer
        return preparer.collate([preparer(self.samples[name], Same()) for name in names])

    def own(self):
        """Names of this rank's samples, step by step."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return [step[rank] if world > 1 else list(chain(*step)) for step in self.steps]

    def train_dataloader(self):
        return Batches(map(self.batch, self.own()))

    def peek(self):
        """Of all ranks together everything, so that all begin with one scale however the samples are spread."""
        return self.batch(chain(*self.own()))


class Same:
    """Draws the same for a sample wherever it is."""

    def choice(self, options):
        return options[0]

    def random(self):
        return 0.5


class Watching:
    """Keeps the gradient of every step."""

    def on_fit_start(self):
        super().on_fit_start()
        self.gradients = []

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        named = self.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


class WatchedInstruct(Watching, Instruct):
    pass


class WatchedAlign(Watching, Align):
    pass


def trained(module, data, out, *, ranks=1, accumulate=1):
    """Trains on every batch once; gradients of all steps and the weights after them."""
    quiet_lightning()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    with ending_together(trainer):
        trainer.fit(module, data)
    return module.gradients, module.kept()


def on_rank(rank, port, folder, build, data):
    """One of two processes; what it found, or how it ended, goes to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        found = trained(build(rank), data, folder, ranks=2)
    except TrainingStopped as error:
        found = str(error)
    except Exception:
        found = traceback.format_exc()
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture
def two(tmp_path):
    """Trains with two processes, which have to end; what each of them found."""

    def run(build, data):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # A fork has all modules in memory already; no thread of torch runs in this process with one thread a product.
        processes = mp.start_processes(
            on_rank, args=(port, tmp_path, build, data), nprocs=2, join=False, start_method="fork"
        )
        end = time.monotonic() + LIMIT
        while not processes.join(timeout=1.0):
            if time.monotonic() > end:
                for process in processes.processes:
                    process.kill()
                pytest.fail(f"two processes still wait for each other after {LIMIT:.0f} s")
        return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    return run


@pytest.fixture(scope="module")
def samples(scenes_folder):
    found = list(read_samples([str(scenes_folder / "shard-000000.tar")]))[:16]
    return {index: sample for index, sample in enumerate(found)} | {"text": TEXT}


@pytest.fixture(scope="module")
def aligned(encoder, scenes_folder, train, tmp_path_factory):
    out = tmp_path_factory.mktemp("aligned")
    torch.manual_seed(0)
    train(Align(encoder, EMBEDDED, hidden=32), scenes_folder, out, steps=2)
    return out


@pytest.fixture
def instruct(encoder, aligned):
    def build(rank=0, kind=WatchedInstruct):
        torch.manual_seed(0)
        return kind(encoder, EMBEDDED, aligned=str(aligned), optim=OptimConfig(lr=RATE, warmup=0.0))

    return build


def check_equal(found, expected):
    for ours, theirs in zip(found[0], expected[0], strict=True):  # gradients, step by step
        assert ours.keys() == theirs.keys()
        largest = max(float(value.abs().max()) for value in theirs.values())
        for name, value in theirs.items():
            assert (ours[name] - value).abs().max() <= 5e-5 * largest, (
                name
            )  # float32 on a LLaMA that magnifies rounding
    for name, value in expected[1].items():
        assert (found[1][name] - value).abs().max() <= 1e-6, name


# Of unequal length, a short last one, a rank with text alone, and one with nothing.
STEPS = [[[0, 1, 2, 3, 4], [5, 6]], [[7, 8], ["text"]], [[9], []]]


def test_two_ranks_take_the_steps_of_one_in_stage_2(two, instruct, samples, tmp_path):
    data = Given(STEPS, samples)
    found = two(instruct, data)
    expected = trained(instruct(), data, tmp_path)
    for rank in found:
        check_equal(rank, expected)
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


@pytest.mark.parametrize("options", [{}, {"loss": "sigmoid"}, {"caption_weight": 0.5}, {"loss": "caption"}])
def test_two_ranks_take_the_steps_of_one_in_stage_1(two, encoder, samples, tmp_path, options):
    """Negatives are those of all ranks."""

    def build(rank=0):
        torch.manual_seed(0)
        return WatchedAlign(encoder, EMBEDDED, hidden=32, optim=OptimConfig(lr=RATE, warmup=0.0), **options)

    data = Given([[[0, 1, 2, 3, 4], [5, 6]], [[7, 8], [10]], [[9, 11], []]], samples)
    found = two(build, data)
    expected = trained(build(), data, tmp_path)
    for rank in found:
        check_equal(rank, expected)


def test_fresh_projector_begins_alike_on_every_rank(two, encoder, samples):
    def build(rank=0):
        torch.manual_seed(rank)
        return WatchedInstruct(encoder, EMBEDDED, hidden=16)

    one, other = two(build, Given([[[0, 1], [2, 3]]], samples))
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize("stop_on", [0, 1])
@pytest.mark.parametrize("what", ["loss", "gradient", "labels"])
def test_what_is_wrong_on_one_rank_ends_both(two, instruct, samples, tmp_path, what, stop_on):
    class Poisoned(WatchedInstruct):
        def training_step(self, batch, index):
            if index == 1 and self.global_rank == stop_on:
                if what == "labels":
                    batch["labels"].fill_(-100)
                loss = super().training_step(batch, index)
                if what == "loss":
                    self.check_finite(loss * float("nan"))
                return loss * float("inf") if what == "gradient" else loss
            return super().training_step(batch, index)

    steps = [[[0], [1]], [[2], [3]], [[4], [5]]]
    first, second = two(lambda rank: instruct(rank, Poisoned), Given(steps, samples))
    key = samples[2 + stop_on].key
    assert second == "" and first.startswith("step 2: ") and first.count("\n") == 0
    said = {"loss": "the loss is nan", "gradient": "the gradient has norm", "labels": "there is no supervised token"}
    assert f"rank {stop_on}: {said[what]}" in first and f"in the batch of samples {key}; " in first
    file = tmp_path / f"stopped_batch-rank{stop_on}.pt"
    assert str(file) in first
    assert torch.load(file, weights_only=True)["batch"]["keys"] == [key]


def test_accumulated_batches_count_by_their_tokens(instruct, samples, tmp_path):
    steps = [[[0, 1, 2, 3], ["text", 5, 6, 7]], [[8, "text", 9], [10, 11]]]
    expected = trained(instruct(), Given(steps, samples), tmp_path)
    halves = [[half] for step in steps for half in step]
    found = trained(instruct(), Given(halves, samples), tmp_path, accumulate=2)
    assert len(found[0]) == 2
    check_equal(found, expected)


def test_accumulated_captions_count_by_their_tokens(encoder, samples, tmp_path):
    def build():
        torch.manual_seed(0)
        optim = OptimConfig(lr=RATE, warmup=0.0)
        return WatchedAlign(encoder, EMBEDDED, hidden=32, loss="caption", optim=optim)

    steps = [[[0, 1, 2], [3]], [[4], [5, 6]]]
    expected = trained(build(), Given(steps, samples), tmp_path)
    halves = Given([[half] for step in steps for half in step], samples)
    found = trained(build(), halves, tmp_path, accumulate=2)
    assert len(found[0]) == 2
    check_equal(found, expected)


def test_rank_that_dies_ends_the_other(two, instruct, samples, tmp_path):
    class Dying(WatchedInstruct):
        def training_step(self, batch, index):
            if index == 1 and self.global_rank == 1:
                raise OSError("the data is gone")
            return super().training_step(batch, index)

    found = two(lambda rank: instruct(rank, Dying), Given([[[0], [1]], [[2], [3]]], samples))
    assert found[0] == "another rank has ended, and this one with it"
    assert "OSError: the data is gone" in found[1]


def test_fresh_projector_begins_with_text_alone(two, encoder, samples):
    def build(rank=0):
        torch.manual_seed(0)
        return WatchedInstruct(encoder, EMBEDDED, hidden=16)

    one, other = two(build, Given([[["text"], ["text"]]], samples))
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())
