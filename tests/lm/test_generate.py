import itertools

import pytest
import torch

from visplice.lm.generate import Sampling, draw, generate, pad_left


def tokens_of(model, rows, stop_ids=(), **sampling):
    """Runs embeddings of unequal lengths as one batch; a list of tokens per row."""
    embeddings, lengths = pad_left(rows)
    steps = list(generate(model, embeddings, lengths, Sampling(**sampling), stop_ids))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)] or [[] for _ in rows]


@pytest.fixture
def model(make_llama):
    return make_llama()


@pytest.fixture
def rows(model):
    """Prompts of 9, 17, 1 and 12 embeddings."""
    with torch.no_grad():
        return [model.tok_embeddings(torch.randint(324, (length,))) for length in (9, 17, 1, 12)]


def test_rows_are_padded_in_front():
    batch, lengths = pad_left([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])])
    assert lengths.tolist() == [1, 3]
    assert batch.tolist() == [[[0, 0], [0, 0], [1, 2]], [[3, 4], [5, 6], [7, 8]]]


@torch.no_grad()
def test_greedy_equals_the_likeliest_token_of_a_full_pass_each_time(model, rows):
    expected, embeddings = [], rows[0][None]
    for _ in range(20):
        expected.append(model.logits(model.hidden(embeddings))[0, -1].argmax().item())
        embeddings = torch.cat([embeddings, model.tok_embeddings(torch.tensor([[expected[-1]]]))], dim=1)
    assert len(set(expected)) > 5  # no model that repeats itself
    assert tokens_of(model, rows[:1], max_new_tokens=20) == [expected]


def test_batch_equals_single_rows(model, rows, logits_of):
    seen = logits_of(model)
    together = tokens_of(model, rows, max_new_tokens=20)
    of_batch = list(seen)
    assert len(of_batch) == 20  # the prompt and 19 steps
    for number, row in enumerate(rows):
        seen.clear()
        assert tokens_of(model, [row], max_new_tokens=20) == [together[number]]
        for step, (one, many) in enumerate(zip(seen, of_batch, strict=True)):
            difference = (one[0] - many[number]).abs().max() / one.pow(2).mean().sqrt()
            assert difference < 1e-5, f"step {step} of row {number} differs by {difference:.1e}"


def test_what_stands_in_the_padding_does_not_matter(model, rows, logits_of):
    embeddings, lengths = pad_left(rows)
    seen, tokens = logits_of(model), []
    for filler in (0.0, 1e3):
        width = embeddings.shape[1]
        padding = torch.arange(width) < (width - lengths)[:, None]
        filled = embeddings.masked_fill(padding[..., None], filler)
        tokens.append(list(generate(model, filled, lengths, Sampling(max_new_tokens=4), ())))
    assert tokens[0] == tokens[1]
    for before, after in zip(seen[:4], seen[4:], strict=True):
        torch.testing.assert_close(after, before, atol=0, rtol=0)


def test_padding_makes_nothing_that_is_not_a_number(model, rows):
    masks, streams = [], []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: masks.append(inputs[1].mask))
    model.layers[-1].register_forward_hook(lambda module, inputs, output: streams.append(output))
    tokens_of(model, rows, max_new_tokens=3)
    assert len(streams) == 3 and all(stream.isfinite().all() for stream in streams)
    # Some kernels give zeros where a query sees no key, others NaN; so each query sees one.
    assert len(masks) == 3 and all(mask.any(-1).all() for mask in masks)


def test_stop_token_ends_its_row_unseen_while_others_go_on(model, rows):
    free = tokens_of(model, rows, max_new_tokens=12)
    stops = {free[0][3], free[1][7]}
    expected = [list(itertools.takewhile(lambda token: token not in stops, row)) for row in free]
    assert len({len(row) for row in expected}) > 1  # they end at different steps
    embeddings, lengths = pad_left(rows)
    steps = list(generate(model, embeddings, lengths, Sampling(max_new_tokens=12), stops))
    assert len(steps) == max(len(row) for row in expected)
    for number, row in enumerate(expected):
        assert [step[number] for step in steps] == row + [None] * (len(steps) - len(row))


def test_generation_is_over_when_every_row_has_ended(model, rows, logits_of):
    first = tokens_of(model, rows[:1], max_new_tokens=1)[0][0]
    seen = logits_of(model)
    assert tokens_of(model, rows[:1], stop_ids=(first,), max_new_tokens=50) == [[]]
    assert len(seen) == 1


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
def test_never_more_than_max_new_tokens(model, rows, logits_of, max_new_tokens):
    seen = logits_of(model)
    assert {len(row) for row in tokens_of(model, rows, max_new_tokens=max_new_tokens)} == {max_new_tokens}
    assert len(seen) == max_new_tokens  # and no step whose tokens nobody gets


def test_prompt_that_does_not_fit_is_refused_with_both_numbers(make_llama):
    model = make_llama(max_seq_len=20)
    rows = [torch.randn(15, 32), torch.randn(3, 32)]
    assert [len(row) for row in tokens_of(model, rows, max_new_tokens=5)] == [5, 5]
    message = "the prompt has 15 tokens and 6 new ones were asked for, but the model has 20 positions"
    with pytest.raises(ValueError, match=message):
        tokens_of(model, rows, max_new_tokens=6)


# --- sampling ---


def frequencies(sampling, *, draws=4000):
    """How often each of five tokens of probability 1/2, 1/4, 1/8, 1/16 and 1/16 is drawn."""
    logits = torch.tensor([0.0625, 0.25, 0.5, 0.0625, 0.125]).log().expand(draws, -1)
    generators = [torch.Generator().manual_seed(number) for number in range(draws)]
    return torch.bincount(draw(logits, sampling, generators), minlength=5) / draws


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.0625, 0.25, 0.5, 0.0625, 0.125]),
        ({"temperature": 0.5}, [x**2 / 0.3359375 for x in (0.0625, 0.25, 0.5, 0.0625, 0.125)]),
        ({"temperature": 1e-4}, [0, 0, 1, 0, 0]),
        ({"top_k": 1}, [0, 0, 1, 0, 0]),
        ({"top_k": 3}, [0, 0.25 / 0.875, 0.5 / 0.875, 0, 0.125 / 0.875]),
        ({"top_k": 50}, [0.0625, 0.25, 0.5, 0.0625, 0.125]),
        # The smallest sets that reach p: 1/2; 1/2 + 1/4; 1/2 + 1/4 + 1/8.
        ({"top_p": 0.01}, [0, 0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 1 / 3, 2 / 3, 0, 0]),
        ({"top_p": 0.74}, [0, 1 / 3, 2 / 3, 0, 0]),
        ({"top_p": 0.76}, [0, 0.25 / 0.875, 0.5 / 0.875, 0, 0.125 / 0.875]),
        ({"top_p": 1.0}, [0.0625, 0.25, 0.5, 0.0625, 0.125]),
        # Of the two likeliest, the first has 2/3.
        ({"top_k": 2, "top_p": 0.6}, [0, 0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(settings, expected):
    found = frequencies(Sampling(**{"temperature": 1.0} | settings))
    expected = torch.tensor(expected, dtype=torch.float32)
    assert ((found > 0) == (expected > 0)).all()  # what is cut off is never drawn
    # Five standard deviations of a share of 4,000 draws are at most 0.04.
    torch.testing.assert_close(found, expected, atol=0.04, rtol=0)


def test_rows_of_a_batch_are_drawn_from_their_own_logits():
    logits = torch.full((3, 8), -100.0)
    logits[0, 5] = logits[1, 0] = logits[2, 7] = 0.0
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 2}):
        generators = [torch.Generator().manual_seed(0) for _ in range(3)]
        assert draw(logits, Sampling(**settings), generators).tolist() == [5, 0, 7]


def test_top_k_of_one_equals_greedy(model, rows):
    greedy = tokens_of(model, rows, max_new_tokens=10)
    assert tokens_of(model, rows, max_new_tokens=10, temperature=1.0, top_k=1) == greedy


def test_same_seed_same_tokens_and_another_seed_others(model, rows):
    settings = {"max_new_tokens": 10, "temperature": 1.0}
    first = tokens_of(model, rows, seed=1, **settings)
    assert tokens_of(model, rows, seed=1, **settings) == first
    assert tokens_of(model, rows, seed=2, **settings) != first
    assert tokens_of(model, rows, **settings) != tokens_of(model, rows, **settings)


def test_row_of_a_batch_draws_what_it_draws_alone(model, rows):
    settings = {"max_new_tokens": 10, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = tokens_of(model, rows, **settings)
    assert together != tokens_of(model, rows, max_new_tokens=10)
    assert [tokens_of(model, [row], **settings)[0] for row in rows] == together


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 5}])
def test_random_numbers_of_others_are_left_alone(model, rows, settings):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tokens_of(model, rows, max_new_tokens=2, **settings)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it is at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; it is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; it is at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it is above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_sampling_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@torch.inference_mode()
def test_rows_of_the_table_that_the_tokenizer_lacks_are_never_drawn(model, rows):
    model.output.weight[-4:] = model.output.weight[:4] * 50  # the likeliest by far
    embeddings, lengths = pad_left(rows)
    size = len(model.output.weight)
    free = list(generate(model, embeddings, lengths, Sampling(max_new_tokens=8), ()))
    assert any(token >= size - 4 for step in free for token in step)
    for sampling in (Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, temperature=2.0, seed=0)):
        drawn = list(generate(model, embeddings, lengths, sampling, (), num_ids=size - 4))
        assert all(token < size - 4 for step in drawn for token in step)
