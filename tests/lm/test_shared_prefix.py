"""Questions that share their picture's prefix get the answers that they get one at a time."""

import pytest
import torch

from visplice.lm.generate import Sampling, generate, pad_left
from visplice.lm.shared_prefix import Asked, answer, shared_length

QUESTIONS = [
    "what is red?",
    "where",
    "what is the color of the small circle?",
    "near the triangle",
    "the large blue square",
]
NEW = 6


@pytest.fixture
def model(make_vision_llama):
    return make_vision_llama()


def prompt(model, *parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return model.prompts.build([{"role": "user", "content": content}], add_generation_prompt=True).ids


def alone(model, ids, features):
    """One prompt by itself, as `VisionLlama.generate` does it: its tokens, and whether it ended before the limit."""
    with torch.inference_mode():
        embeddings, lengths = pad_left([model.embed(torch.tensor([ids]), features)[0]])
        steps = generate(
            model.lm, embeddings, lengths, Sampling(max_new_tokens=NEW), model.prompts.stop_ids, num_ids=320
        )
        found = [row[0] for row in steps]
    return found, len(found) < NEW


def pictures(model, count):
    return [torch.randn(1, model.visual.count, model.encoder.dim) for _ in range(count)]


def check(model, asked, **options):
    found = answer(model, asked, max_new_tokens=NEW, **options)
    for one, answers in zip(asked, found, strict=True):
        expected = [alone(model, ids, one.features) for ids in one.prompts]
        assert [(found.ids, found.complete) for found in answers] == expected
    return found


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_a_batch_of_pictures_with_unequal_numbers_of_questions(model, at_once):
    counts = (1, 3, 5, 2)
    asked = [
        Asked(prompts=[prompt(model, None, text) for text in QUESTIONS[:count]], features=features)
        for count, features in zip(counts, pictures(model, 4), strict=True)
    ]
    found = check(model, asked, at_once=at_once)
    assert len({tuple(one.ids) for answers in found for one in answers}) > 5  # pictures and questions matter


def test_a_picture_behind_the_question(model):
    own = pictures(model, 2)
    check(model, [Asked(prompts=[prompt(model, text, None) for text in QUESTIONS[:3]], features=f) for f in own])


def test_prefixes_of_unequal_length(model):
    first, second = pictures(model, 2)
    asked = [
        Asked(prompts=[prompt(model, None, text) for text in QUESTIONS[:2]], features=first),
        Asked(prompts=[prompt(model, "the small circle", None, text) for text in QUESTIONS[:3]], features=second),
    ]
    check(model, asked)


def test_two_pictures_in_a_prompt(model):
    features = torch.randn(2, model.visual.count, model.encoder.dim)
    check(model, [Asked(prompts=[prompt(model, None, None, text) for text in QUESTIONS[:2]], features=features)])


def test_chunked_attention_and_layers_without_positions(make_vision_llama, make_llama):
    model = make_vision_llama()
    model.lm = make_llama(attention_chunk=8, nope_layers=(1,)).requires_grad_(False)
    asked = [
        Asked(prompts=[prompt(model, None, text) for text in QUESTIONS], features=features)
        for features in pictures(model, 2)
    ]
    check(model, asked)


def test_a_picture_is_projected_and_its_prefix_computed_once(model, monkeypatch):
    positions, projected = [], []
    hidden, project = type(model.lm).hidden, model.projector.forward
    monkeypatch.setattr(type(model.lm), "hidden", lambda lm, x, **o: positions.append(x.shape) or hidden(lm, x, **o))
    monkeypatch.setattr(model.projector, "forward", lambda x: projected.append(x.shape) or project(x))
    prompts = [prompt(model, None, text) for text in QUESTIONS]
    answer(model, [Asked(prompts=prompts, features=pictures(model, 1)[0])], max_new_tokens=1)
    shared = shared_length(prompts, model.visual.vocab_size)
    assert projected == [(1, model.visual.count, model.encoder.dim)]
    assert [shape[:2] for shape in positions] == [(1, shared), (1, sum(len(ids) - shared for ids in prompts))]


def test_the_shared_part_ends_with_the_picture_and_never_cuts_one(model):
    count = model.visual.count
    behind = [prompt(model, None, "the same words and then"), prompt(model, None, "the same words and now")]
    assert shared_length(behind, model.visual.vocab_size) == 1 + 1 + count + 2  # begin, user, the block
    alone_at_the_end = [[1, 3, *model.visual.block()]]
    assert shared_length(alone_at_the_end, model.visual.vocab_size) == 2
    assert shared_length([[1, 2, 3], [1, 2, 4]], model.visual.vocab_size) == 2


def test_what_does_not_fit_is_refused(model):
    ids = prompt(model, None, "what")
    asked = [Asked(prompts=[ids], features=pictures(model, 1)[0])]
    with pytest.raises(ValueError, match=f"{len(ids)} tokens and 128 new ones were asked for, but the model has 128"):
        answer(model, asked, max_new_tokens=128)
    with pytest.raises(ValueError, match="without a prompt"):
        answer(model, [], max_new_tokens=1)


def test_logits_that_are_no_numbers_are_an_error(model):
    features = torch.full((1, model.visual.count, model.encoder.dim), float("nan"))
    with pytest.raises(FloatingPointError, match="no numbers"):
        answer(model, [Asked(prompts=[prompt(model, None, "what")], features=features)], max_new_tokens=1)
