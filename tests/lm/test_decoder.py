import pytest
import torch

from visplice.lm.checkpoint import load_llama, save_llama
from visplice.lm.config import LLAMA_7B, LlamaConfig
from visplice.lm.decoder import KVCache, Llama
from visplice.lm.generate import Sampling, generate

# What differs between the members of the family, in Hugging Face's words.
SHAPES = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "own head_dim": {"head_dim": 20, "num_key_value_heads": 2},
    "rope_theta": {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}},
    "norm_eps": {"rms_norm_eps": 0.1},
}


def reference(randomise, changes):
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    config = {
        "vocab_size": 160,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 56,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return randomise(LlamaForCausalLM(TheirConfig(**config | changes))).eval()


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def pair(request, randomise, tmp_path):
    """Hugging Face's decoder with random weights, and ours read from the folder it wrote."""
    theirs = reference(randomise, request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, load_llama(tmp_path / "theirs")


def close(found, expected, tolerance=1e-5):
    """Within the tolerance, relative to logits of size one."""
    assert found.shape == expected.shape
    difference = (found - expected).abs().max() / expected.pow(2).mean().sqrt().clamp(min=1)
    assert difference < tolerance, f"they differ by {difference:.2e}"


@torch.no_grad()
def test_logits_equal_hugging_face(pair):
    theirs, ours = pair
    ids = torch.randint(160, (2, 40))
    expected = theirs(ids).logits
    assert expected.std() > 0.5  # logits of a model that says something
    close(ours(ids), expected)


@torch.no_grad()
def test_positions_with_gaps_equal_hugging_face(pair):
    theirs, ours = pair
    ids, positions = torch.randint(160, (1, 12)), torch.tensor([[0, 1, 2, 7, 8, 9, 30, 31, 60, 61, 62, 100]])
    expected = theirs(ids, position_ids=positions).logits
    assert (expected - theirs(ids).logits).abs().max() > 0.01
    close(ours(ids, positions=positions), expected)


@torch.no_grad()
def test_greedy_tokens_equal_hugging_face(pair):
    theirs, ours = pair
    ids = torch.randint(160, (1, 9))
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32)[0, 9:]
    sampling = Sampling(max_new_tokens=32)
    steps = generate(ours, ours.tok_embeddings(ids), torch.tensor([9]), sampling, stop_ids=())
    assert [token for (token,) in steps] == expected.tolist()


@torch.no_grad()
def test_saved_folder_opens_in_hugging_face_with_the_same_logits(pair, tmp_path):
    from transformers import LlamaForCausalLM

    theirs, ours = pair
    save_llama(ours, tmp_path / "ours")
    opened, report = LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.randint(160, (2, 40))
    expected = theirs(ids).logits
    torch.testing.assert_close(opened.eval()(ids).logits, expected, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 4}, {"num_kv_heads": 1, "head_dim": 12}])
def test_cache_equals_no_cache(make_llama, changes):
    model = make_llama(**changes)
    ids = torch.randint(324, (2, 30))
    expected = model(ids)
    embeddings = model.tok_embeddings(ids)
    cache = KVCache(model.config, 2, 33, device="cpu", dtype=torch.float32)  # three slots stay empty
    assert cache.length == 33
    slots, found = torch.arange(33), []
    # A prefill of 12, a chunk of 5, then single tokens.
    for start, stop in [(0, 12), (12, 17), *((n, n + 1) for n in range(17, 30))]:
        hidden = model.hidden(
            embeddings[:, start:stop],
            positions=slots[start:stop].expand(2, -1),
            mask=(slots <= slots[start:stop, None])[None, None],
            cache=cache,
            slots=slots[start:stop],
        )
        found.append(model.logits(hidden))
    close(torch.cat(found, dim=1), expected)


@torch.no_grad()
def test_logits_never_depend_on_later_tokens(make_llama):
    model = make_llama()
    ids = torch.randint(324, (1, 20))
    changed = ids.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 324
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :11], before[:, :11], atol=0, rtol=0)
    assert (after[:, 11:] - before[:, 11:]).abs().amax(-1).min() > 0.01


@torch.no_grad()
def test_only_distances_between_positions_matter(make_llama):
    model = make_llama()
    ids = torch.randint(324, (2, 16))
    shifted = model(ids, positions=(torch.arange(16) + 50).expand(2, 16))
    close(shifted, model(ids))
    spread = model(ids, positions=(torch.arange(16) * 3).expand(2, 16))
    assert (spread - shifted).abs().max() > 0.01


@torch.no_grad()
def test_padding_in_front_with_mask_and_shifted_positions_changes_nothing(make_llama):
    model = make_llama()
    ids = torch.randint(324, (1, 16))
    padded = torch.cat([torch.randint(324, (1, 5)), ids], dim=1)
    steps = torch.arange(21)
    mask = (steps <= steps[:, None]) & ((steps >= 5) | (steps == steps[:, None]))
    found = model(padded, positions=(steps - 5).clamp(min=0)[None], mask=mask[None, None])
    close(found[:, 5:], model(ids))


@torch.no_grad()
def test_mask_keeps_two_packed_texts_apart(make_llama):
    model = make_llama()
    first, second = torch.randint(324, (1, 7)), torch.randint(324, (1, 10))
    text = torch.tensor([0] * 7 + [1] * 10)
    mask = (text == text[:, None]) & torch.ones(17, 17, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(7), torch.arange(10)])[None]
    found = model(torch.cat([first, second], dim=1), positions=positions, mask=mask[None, None])
    close(found, torch.cat([model(first), model(second)], dim=1))


def test_gradient_reaches_the_embeddings_through_a_frozen_decoder(make_llama):
    model = make_llama().requires_grad_(False)
    embeddings = torch.randn(1, 6, 32, requires_grad=True)
    model.logits(model.hidden(embeddings)[:, 3]).sum().backward()
    assert (embeddings.grad[0, :4].abs().amax(-1) > 0).all()
    assert (embeddings.grad[0, 4:] == 0).all()  # later tokens have no say


def test_llama_7b_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = Llama(LLAMA_7B)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616


def test_llama_3_8b_has_its_published_number_of_parameters():
    config = LlamaConfig(
        vocab_size=128_256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14_336, rope_theta=500_000.0
    )
    with torch.device("meta"):
        model = Llama(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


def test_tied_head_is_the_embedding_table(make_llama):
    model = make_llama(tie_embeddings=True)
    assert model.output.weight is model.tok_embeddings.weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30}, "dim 30 is not a multiple of num_heads 4; set head_dim"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_impossible_shape_is_refused(make_llama, changes, message):
    with pytest.raises(ValueError, match=message):
        make_llama(**changes)
