"""Windows and shared prefixes against transformers at random weights, and against one sequence at a time."""

import math

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from visplice.lm import likelihood
from visplice.lm.checkpoint import load_llama
from visplice.lm.likelihood import checksums, choice_log_probabilities, measure, windows

VOCAB = 160


@pytest.fixture
def pair(randomise, tmp_path):
    """Hugging Face's decoder with random weights, and ours read from the folder it wrote."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = TheirConfig(vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=64, **shape, **ids)
    theirs = randomise(LlamaForCausalLM(config)).eval()
    theirs.save_pretrained(tmp_path)
    return theirs, load_llama(tmp_path)


@torch.no_grad()
def their_perplexity(model, ids, window, stride):
    """The loop of transformers' page on perplexity, each window weighted by the labels that its loss is a mean of."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        own = ids[:, begin:end]
        labels = own.clone()
        labels[:, : -(end - before)] = -100
        num = int((labels[:, 1:] != -100).sum())
        total += float(model(own, labels=labels).loss) * num
        count += num
        before = end
        if end == ids.shape[1]:
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride"), [(64, 63), (64, 32), (20, 1), (20, 7), (2, 1), (50, 49)])
def test_perplexity_in_windows_is_transformers(pair, window, stride, monkeypatch):
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", 5 * VOCAB)  # logits of five rows at a time
    theirs, ours = pair
    ids = torch.randint(VOCAB, (1, 131))
    expected, count = their_perplexity(theirs, ids, window, stride)
    found = measure(ours, ids[0].tolist(), window=window, stride=stride).log_probabilities.double()
    assert len(found) == count == 130
    assert math.exp(-float(found.mean())) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 10, 11, 14, 15, 100])
def test_every_token_but_the_first_counts_once_with_enough_before_it(num_tokens):
    counted = []
    for piece in windows(num_tokens, 10, 4):
        assert piece.end - piece.begin <= 10
        for token in range(piece.first, piece.end):
            counted.append(token)
            assert token - piece.begin >= min(token, 10 - 4)
    assert counted == list(range(1, num_tokens))


@pytest.mark.parametrize(("window", "stride"), [(8, 0), (8, 8), (8, 9), (1, 1), (0, 0)])
def test_windows_that_leave_tokens_out_are_refused(window, stride):
    with pytest.raises(ValueError, match=f"--stride is {stride} and --window {window}"):
        list(windows(20, window, stride))


def test_window_beyond_the_model_is_refused(pair):
    with pytest.raises(ValueError, match="--window is 65, but the model has 64 positions"):
        measure(pair[1], [1, 2, 3], window=65, stride=32)


def test_never_more_logits_at_once_than_said(pair, logits_of, monkeypatch):
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", 7 * VOCAB)
    seen = logits_of(pair[1])
    measure(pair[1], torch.randint(VOCAB, (60,)).tolist(), window=64, stride=32)
    assert max(len(logits) for logits in seen) == 7 and sum(len(logits) for logits in seen) == 59


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_shows_a_single_bit(dtype):
    logits = torch.randn(6, VOCAB).to(dtype)
    kind = torch.int16 if dtype == torch.bfloat16 else torch.int32
    changed = logits.clone()
    for row, column in ((1, 0), (3, VOCAB - 1), (4, 77)):
        changed.view(kind)[row, column] ^= 1
    changed[5, [3, 4]] = logits[5, [4, 3]]  # two that change places
    assert (checksums(logits) != checksums(changed)).tolist() == [False, True, False, True, True, True]
    assert torch.equal(checksums(logits), checksums(logits.clone()))


@torch.no_grad()
def their_choices(model, prefix, choices):
    totals = []
    for choice in choices:
        logits = model(torch.tensor([prefix + choice])).logits[0].double().log_softmax(-1)
        totals.append(sum(float(logits[len(prefix) + i - 1, token]) for i, token in enumerate(choice)))
    return totals


@pytest.mark.parametrize("lengths", [(1, 1), (1, 4, 2), (6, 6, 6, 6), (1, 20)])
def test_choices_behind_a_shared_prefix_are_as_transformers_one_by_one(pair, lengths, monkeypatch):
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", 3 * VOCAB)
    theirs, ours = pair
    prefix = torch.randint(VOCAB, (17,)).tolist()
    choices = [torch.randint(VOCAB, (length,)).tolist() for length in lengths]
    found = choice_log_probabilities(ours, ours.tok_embeddings(torch.tensor(prefix)), choices)
    assert found == pytest.approx(their_choices(theirs, prefix, choices), rel=1e-5)


def test_a_choice_sees_no_other_choice(pair):
    ours = pair[1]
    prefix = ours.tok_embeddings(torch.randint(VOCAB, (9,)))
    first = choice_log_probabilities(ours, prefix, [[1, 2, 3], [4, 5, 6, 7]])[1]
    second = choice_log_probabilities(ours, prefix, [[9, 8, 7, 6, 5], [4, 5, 6, 7], [3]])[1]
    assert first == pytest.approx(second, rel=1e-6)


def test_choices_in_chunked_attention_are_as_one_by_one(make_llama):
    """LLaMA 4: a layer that sees pieces of 8 positions, a prefix that ends inside one, choices that cross its end."""
    ours = make_llama(attention_chunk=8, nope_layers=(1,))
    prefix = ours.tok_embeddings(torch.randint(324, (13,)))
    choices = [torch.randint(324, (length,)).tolist() for length in (2, 7, 1)]
    alone = [choice_log_probabilities(ours, prefix, [choice])[0] for choice in choices]
    assert choice_log_probabilities(ours, prefix, choices) == pytest.approx(alone, rel=1e-5)


def test_choices_that_do_not_fit_are_refused(pair):
    ours = pair[1]
    prefix = ours.tok_embeddings(torch.randint(VOCAB, (60,)))
    with pytest.raises(ValueError, match="60 tokens and the longest choice 5, but the model has 64 positions"):
        choice_log_probabilities(ours, prefix, [[1], [1] * 5])
    assert len(choice_log_probabilities(ours, prefix, [[1], [1] * 4])) == 2


def test_a_likelihood_that_is_no_number_is_said(pair):
    ours = pair[1]
    with pytest.raises(FloatingPointError, match="is no finite number"):
        choice_log_probabilities(ours, torch.full((3, 32), torch.nan), [[1], [2]])
