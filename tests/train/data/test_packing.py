"""Shared pictures and packed rows against every question as a sample of its own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from visplice.lm.extension import load_extension
from visplice.lm.prompt import IGNORE
from visplice.lm.vision_llama import VisionLlama
from visplice.train.data.packing import Piece, Rows, lay_out, share, single
from visplice.train.losses import answer_loss

QUESTIONS = [
    ("What shape is red?", "circle"),
    ("How many shapes are there?", "4"),
    ("Is there a blue square?", "no"),
    ("Tell me about the picture.", "background white. a small red circle at the top left."),
    ("What shape is red?", "square"),  # the same question once more, with another answer
    ("What color is the background?", "white"),
    ("Is there a red circle?", "yes"),
    ("What color is the square?", "green"),
]


@pytest.fixture(scope="module")
def model() -> VisionLlama:
    return load_extension("embedded").double()  # in float32 the sharp little LLaMA makes 1e-5 of rounding


@pytest.fixture(scope="module")
def features(model) -> Tensor:
    """Of four pictures."""
    pictures = sorted((Path(__file__).parents[3] / "app/assets").glob("example_*.png"))[:4]
    return model.features(model.pixels(pictures))


def prompts(model: VisionLlama, number: int, *, image: bool = True):
    mark = "<image>" if image else ""
    return [
        model.prompts.build([{"role": "user", "content": mark + q}, {"role": "assistant", "content": a}])
        for q, a in QUESTIONS[:number]
    ]


def loss_and_gradients(model: VisionLlama, rows: Rows, features: Tensor) -> tuple[Tensor, list[Tensor]]:
    embeddings = model.embed(rows.ids, features[rows.images])
    total, _, count = answer_loss(model.lm, model.lm.hidden(embeddings, mask=rows.packed), rows.labels)
    weights = list(model.projector.parameters())
    return total / count, list(torch.autograd.grad(total / count, weights))


def check_equal(model: VisionLlama, ours: Rows, pieces: list[Piece], first: list[int], features: Tensor) -> None:
    expected, wanted = loss_and_gradients(model, lay_out(pieces, first), features)
    loss, gradients = loss_and_gradients(model, ours, features)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, target in zip(gradients, wanted, strict=True):
        assert (found - target).abs().max() <= 1e-6 * max(1.0, target.abs().max())


@pytest.mark.parametrize("number", range(1, 9))
def test_questions_behind_one_picture_train_as_samples_of_their_own(model, features, number) -> None:
    asked = prompts(model, number)
    shared = share(asked, model.visual, max_length=1024)
    assert len(shared) == 1
    assert shared[0].ids.count(model.visual.start) == 1
    assert len(shared[0]) == len(asked[0].ids) + sum(
        len(prompt.ids) - shared[0].branches.count(0) for prompt in asked[1:]
    )
    rows = lay_out(shared, [0])
    check_equal(model, rows, [single(prompt) for prompt in asked], [0] * number, features)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_train_as_unpacked_ones(model, features, checkpointing) -> None:
    shared, alone, first_shared, first_alone = [], [], [], []
    for image, number in enumerate((3, 1, 5)):
        pieces = share(prompts(model, number), model.visual, max_length=1024)
        shared += pieces
        first_shared += [image] * len(pieces)
        alone += [single(prompt) for prompt in prompts(model, number)]
        first_alone += [image] * number
    text = single(prompts(model, 2, image=False)[1])  # a text among the pictures
    rows = lay_out([*shared, text], [*first_shared, 3], length=200)
    assert rows.packed is not None
    assert 1 < len(rows.ids) < len(alone)
    assert (rows.packed.owners == -1).any()
    model.lm.checkpointing = checkpointing
    try:
        check_equal(model, rows, [*alone, text], [*first_alone, 3], features)
    finally:
        model.lm.checkpointing = False


def test_what_does_not_fit_stands_behind_the_picture_once_more(model, features) -> None:
    asked = prompts(model, 8)
    limit = len(asked[0].ids) + 40
    pieces = share(asked, model.visual, max_length=limit)
    assert len(pieces) > 1
    assert all(len(piece) <= limit for piece in pieces)
    rows = lay_out(pieces, [0] * len(pieces))
    check_equal(model, rows, [single(prompt) for prompt in asked], [0] * 8, features)


def test_text_in_front_of_the_picture_is_not_shared(model) -> None:
    asked = [
        model.prompts.build([{"role": "user", "content": q + "<image>"}, {"role": "assistant", "content": a}])
        for q, a in QUESTIONS[:2]
    ]
    assert share(asked, model.visual, max_length=1024) == [single(prompt) for prompt in asked]


def test_one_unbranched_piece_a_row_needs_no_mask(model) -> None:
    pieces = [single(prompt) for prompt in prompts(model, 2)]
    rows = lay_out(pieces, [0, 1])
    assert rows.packed is None
    assert rows.images == [0, 1]
    short = min(range(2), key=lambda index: len(pieces[index]))
    assert rows.labels[short, len(pieces[short]) :].unique().tolist() in ([], [IGNORE])


def test_piece_longer_than_the_row_is_refused(model) -> None:
    pieces = [single(prompt) for prompt in prompts(model, 1)]
    with pytest.raises(ValueError, match=f"{len(pieces[0])} positions does not fit into rows of 20"):
        lay_out(pieces, [0], length=20)


def test_no_pieces_make_no_rows() -> None:
    rows = lay_out([], [])
    assert rows.ids.shape == (0, 0)
    assert rows.images == []


def test_longest_pieces_find_their_rows_first() -> None:
    pieces = [Piece([1] * n, [IGNORE] * n, [0] * n, list(range(n)), []) for n in (3, 6, 2, 4, 5)]
    rows = lay_out(pieces, [0] * 5, length=10)
    lengths = [[int((row == owner).sum()) for owner in row.unique() if owner >= 0] for row in rows.packed.owners]
    assert lengths == [[6, 4], [5, 3, 2]]
