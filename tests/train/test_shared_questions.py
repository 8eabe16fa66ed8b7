"""Stage 2 with shared pictures, packed rows and checkpointing, against every question as a sample of its own."""

import random
from dataclasses import replace

import pytest
import torch

from visplice.lm.extension import EMBEDDED
from visplice.lm.prompt import IGNORE
from visplice.train.data.record import Sample
from visplice.train.data.shards import read_samples
from visplice.train.instruct import Instruct

ASKED = [
    ("What shape is red?", "circle"),
    ("How many shapes are there?", "4"),
    ("Is there a small blue square to the left of the ring?", "no"),
    ("Tell me about the picture.", "background white. a small red circle at the top left. a large green ring."),
    ("What shape is red?", "square"),  # once more, with another answer
    ("What color is the background?", "white"),
    ("Is there a red circle?", "yes, there is"),
    ("What color is the square?", "green"),
]
WAYS = {
    "shared": {"share": True},
    "packed": {"share": False, "pack": 400},
    "checkpointed": {"share": False, "checkpointing": True},
    "all three": {"share": True, "pack": 400, "checkpointing": True},
    "more questions than fit behind one picture": {"share": True, "max_length": 120},
}


@pytest.fixture(scope="module")
def pictures(scenes_folder):
    samples = list(read_samples([str(scenes_folder / "shard-000000.tar")]))[:3]
    return [sample.images for sample in samples]


def vqa(key, images, asked):
    """A sample as `visplice data convert` writes those of a VQA set."""
    turns = []
    for number, (question, answer) in enumerate(asked):
        mark = "<image>\n" if not number else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    questions = [{"question_id": i, "question": q, "answers": [a]} for i, (q, a) in enumerate(asked)]
    return Sample(key=key, images=images, record={"conversations": turns, "questions": questions})


@pytest.fixture(scope="module")
def module(encoder):
    module = Instruct(encoder, EMBEDDED, aligned=EMBEDDED)
    module.model.double()  # in float32 the sharp little LLaMA makes 1e-5 of rounding
    return module


def check_close(found, wanted):
    """Within 1e-6 of the gradient's length, over all parameters; each is there."""
    assert all(theirs.norm() > 1e-3 for theirs in wanted.values())
    ours, theirs = (torch.cat([side[name].flatten() for name in wanted]) for side in (found, wanted))
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def loss_and_gradients(module, samples, **options):
    """Mean loss of the supervised tokens, and the projector's gradients by name, under the stage's options."""
    preparer = replace(module.preparer, **{name: value for name, value in options.items() if name != "checkpointing"})
    batch = preparer.collate([preparer(sample, random.Random(0)) for sample in samples])
    module.model.lm.checkpointing = options.get("checkpointing", False)
    loss, _, count = module.answers(batch)
    weights = dict(module.model.projector.named_parameters())
    found = torch.autograd.grad(loss / count, list(weights.values()))
    return batch, loss.item() / count, dict(zip(weights, found, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", range(1, 9))
def test_loss_and_projector_gradients_are_those_of_separate_unpacked_plain_samples(module, pictures, number, way):
    first, second = pictures[:2]
    together = [vqa("a", first, ASKED[:number]), vqa("b", second, ASKED[::-1][: max(1, number - 2)])]
    words = vqa("words", (), [("How many shapes are there?", "2")])
    words.record["conversations"][0]["value"] = "How many shapes are there?"
    together.append(words)
    alone = [vqa(s.key, s.images, [pair]) for s in together[:2] for pair in pairs(s)] + [words]
    plain, expected, wanted = loss_and_gradients(module, alone, share=False)
    assert "packed" not in plain
    if not WAYS[way].get("share"):
        together = alone
    batch, loss, found = loss_and_gradients(module, together, **WAYS[way])
    assert (batch["labels"] != IGNORE).sum() == (plain["labels"] != IGNORE).sum()
    if WAYS[way].get("share") and number > 1:
        assert len(batch["pixels"]) == 2 and batch["positions"] < plain["positions"]
    if "pack" in WAYS[way]:
        assert batch["ids"].shape[1] == WAYS[way]["pack"]
    assert loss == pytest.approx(expected, rel=1e-6)
    check_close(found, wanted)


def pairs(sample):
    turns = [turn["value"].removeprefix("<image>\n") for turn in sample.record["conversations"]]
    return list(zip(turns[::2], turns[1::2], strict=True))


def test_questions_about_several_pictures_share_all_of_them(module, pictures):
    images = tuple((f"{index}.png", picture[0][1]) for index, picture in enumerate(pictures[:2]))
    together = vqa("two", images, ASKED[:4])
    alone = [vqa("two", images, [pair]) for pair in ASKED[:4]]
    for sample in (together, *alone):
        sample.record["conversations"][0]["value"] = "<image>" + sample.record["conversations"][0]["value"]
    batch, loss, found = loss_and_gradients(module, [together])
    _, expected, wanted = loss_and_gradients(module, alone)
    assert len(batch["ids"]) == 1 and batch["blocks"].tolist() == [0, 1] and len(batch["pixels"]) == 2
    assert loss == pytest.approx(expected, rel=1e-6)
    check_close(found, wanted)


def test_conversations_are_not_taken_apart(module, pictures):
    """Where a later question may mean an earlier answer, everything before it is seen."""
    sample = vqa("talk", pictures[0], ASKED[:3])
    del sample.record["questions"]
    batch, _, _ = loss_and_gradients(module, [sample])
    assert "packed" not in batch and len(batch["ids"]) == 1


def test_question_that_does_not_fit_is_dropped_and_counted(module, pictures):
    preparer = replace(module.preparer, max_length=100)
    row = preparer(vqa("a", pictures[0], ASKED[:4]), random.Random(0))
    long = preparer(vqa("a", pictures[0], [ASKED[0], ASKED[1], ASKED[2], ("Tell me " * 20, "no")]), random.Random(0))
    assert (row["dropped"], long["dropped"]) == (0, 1)
