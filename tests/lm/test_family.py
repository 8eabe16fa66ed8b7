"""Every member of the family against transformers, at random weights that transformers saved."""

import contextlib
import json

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaForCausalLM, MllamaForCausalLM
from transformers import LlamaConfig as TheirConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from visplice.lm.checkpoint import open_checkpoint, read_config, save_llama
from visplice.lm.config import FAMILY, LlamaConfig, RopeScaling, family_of
from visplice.lm.decoder import KVCache, Llama
from visplice.lm.generate import pad_left
from visplice.lm.hf_layout import write_hf_config
from visplice.lm.masks import documents

SHAPE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROPE = {"rope_theta": 10_000.0}
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_4 = {"head_dim": 16, "intermediate_size_mlp": 80, "num_local_experts": 4, "pad_token_id": 0, "floor_scale": 8}
LLAMA_4 |= {"num_hidden_layers": 4, "attention_chunk_size": 16}
MEMBERS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped": {},
    "single key-value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "own head width": {"head_dim": 32},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **ROPE}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, **LLAMA_3, "rope_theta": 500_000.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **ROPE}},
    "yarn, own scale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 0.8,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            **ROPE,
        }
    },
    "Scout": LLAMA_4,
    "Maverick": LLAMA_4 | {"interleave_moe_layer_step": 2, "use_qk_norm": False},
    "two experts a token": LLAMA_4 | {"num_experts_per_tok": 2, "attn_temperature_tuning": False},
}
LENGTH = 160  # past every original length and through ten chunks of attention


@pytest.fixture(scope="module", params=MEMBERS, ids=str)
def pair(request, tmp_path_factory, randomise):
    """Their model, ours, and the folder that both have read."""
    changes, folder = MEMBERS[request.param], tmp_path_factory.mktemp("member")
    torch.manual_seed(0)
    if "num_local_experts" in changes:
        config = Llama4TextConfig(**SHAPE | changes)
        config._attn_implementation = "eager"
        theirs = Llama4ForCausalLM(config)
    else:
        theirs = LlamaForCausalLM(TheirConfig(**SHAPE | changes))
    randomise(theirs).eval().save_pretrained(folder)
    return theirs, Llama.from_pretrained(folder), folder


@pytest.fixture
def ids():
    return torch.randint(3, 199, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_logits_are_those_of_transformers(pair, ids):
    theirs, ours, _ = pair
    expected = theirs(ids).logits
    assert expected.std() > 0.3  # a comparison of noughts would prove nothing
    assert (ours(ids) - expected).abs().max() < 1e-4


@torch.inference_mode()
def test_greedy_tokens_are_those_of_transformers(pair, ids):
    theirs, ours, _ = pair
    prompt = ids[:1, :20]
    expected = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None)
    with (
        pytest.warns(UserWarning, match="84 positions, but the model was made for 64")
        if (ours.config.context_length == 64)
        else contextlib.nullcontext()
    ):
        assert torch.equal(ours.generate(prompt, max_new_tokens=64), expected)


@torch.inference_mode()
def test_cache_gives_the_logits_of_no_cache(pair, ids):
    _, ours, _ = pair
    if ours.config.rope.kind == "dynamic":
        pytest.skip("its frequencies move with the length, and what a cache holds keeps those of its step")
    whole = ours(ids)
    cache = KVCache(ours.config, 2, LENGTH, device="cpu", dtype=torch.float32)
    slots, steps = torch.arange(LENGTH), []
    for start, stop in ((0, 40), *((n, n + 1) for n in range(40, LENGTH))):
        mask = (slots <= slots[start:stop, None])[None, None].expand(2, -1, -1, -1) if start else None
        positions = slots[start:stop].expand(2, -1)
        embeddings = ours.tok_embeddings(ids[:, start:stop])
        hidden = ours.hidden(embeddings, positions=positions, mask=mask, cache=cache, slots=slots[start:stop])
        steps.append(ours.logits(hidden))
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-5 * max(1.0, whole.abs().max().item())


@torch.inference_mode()
def test_left_padded_batch_gives_what_single_prompts_give(pair, ids):
    _, ours, _ = pair
    rows = [ids[0, :37], ids[1, :9]]
    singles = [ours.generate(row[None], max_new_tokens=20)[0, len(row) :] for row in rows]
    padded, lengths = pad_left([row[:, None].float() for row in rows])
    together = ours.generate(padded[..., 0].long(), lengths=lengths, max_new_tokens=20)
    assert torch.equal(together[:, 37:], torch.stack(singles))


@torch.inference_mode()
def test_packed_documents_give_the_logits_of_the_documents_alone(pair, ids):
    _, ours, _ = pair
    lengths = (23, 1, 40)
    positions, mask = documents(lengths)
    packed = ours(ids[:1, : sum(lengths)], positions=positions, mask=mask)[0]
    for piece, logits in zip(ids[0, : sum(lengths)].split(lengths), packed.split(lengths), strict=True):
        alone = ours(piece[None])[0]
        assert (logits - alone).abs().max() < 1e-5 * max(1.0, alone.abs().max().item())


@torch.inference_mode()
def test_what_we_save_is_what_transformers_opens(pair, ids, tmp_path):
    theirs, ours, _ = pair
    save_llama(ours, tmp_path)
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert (again(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    assert read_config(tmp_path) == ours.config


@torch.inference_mode()
def test_positions_past_a_hundred_thousand():
    config = LlamaConfig(
        vocab_size=11, dim=4, num_layers=2, num_heads=1, num_kv_heads=1, ffn_dim=8, max_seq_len=131_072,
        rope=RopeScaling(kind="llama3", factor=8.0), rope_theta=5e5, attention_chunk=8192, nope_layers=(1,),
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = Llama(config), torch.randint(0, 11, (1, 131_072))
    logits = model(ids)
    assert logits.shape == (1, 131_072, 11) and logits.isfinite().all()
    for start in (0, 8000):  # what stands behind changes nothing before it, also across the border of a chunk
        assert torch.allclose(logits[:, start : start + 400], model(ids[:, : start + 400])[:, start:], atol=1e-5)


def test_folded_chunks_are_the_masked_ones(pair, ids):
    _, ours, _ = pair
    if ours.config.attention_chunk is None:
        pytest.skip("attention is not chunked")
    with torch.inference_mode():
        folded = ours(ids)
        masked = ours(ids, positions=torch.arange(LENGTH).expand(2, -1))
    assert (folded - masked).abs().max() < 1e-5 * masked.abs().max()


def mllama(folder, randomise):
    config = MllamaTextConfig(
        **{name: value for name, value in SHAPE.items() if name != "max_position_embeddings"},
        max_position_embeddings=64,
        cross_attention_layers=[1],
        pad_token_id=0,
        rope_parameters={"rope_type": "default", **ROPE},
    )
    torch.manual_seed(0)
    model = randomise(MllamaForCausalLM(config)).eval()
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def test_llama_3_2_vision_is_refused_with_an_offer_and_its_text_layers_open(tmp_path, randomise, ids):
    theirs = mllama(tmp_path, randomise)
    with pytest.raises(ValueError, match=r"cross-attention layers of its own \(1\).*2 layers: text_layers_only=True"):
        Llama.from_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path, text_layers_only=True)
    assert ours.config.num_layers == 2
    # Without a picture, transformers leaves the cross-attention out, too.
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
    told = open_checkpoint(tmp_path, text_layers_only=True).told_left_out
    assert told == ("cross-attention layers 1",)


def test_llama_4_with_its_vision_opens_as_text(pair, tmp_path, ids):
    """The published folders nest the text under `text_config` and `language_model.`, vision tensors beside it."""
    _, ours, folder = pair
    if not ours.config.num_experts:
        pytest.skip("not a LLaMA 4")
    from safetensors.torch import load_file, save_file

    state = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    state["vision_model.patch_embedding.linear.weight"] = torch.zeros(2, 2)
    state["multi_modal_projector.linear_1.weight"] = torch.zeros(2, 2)
    save_file(state, tmp_path / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 2}, "boi_token_index": 1}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    with torch.inference_mode():
        assert torch.equal(Llama.from_pretrained(tmp_path)(ids), ours(ids))
    assert open_checkpoint(tmp_path).told_left_out == ("the vision model and its projector",)


PUBLISHED = {
    "LLaMA 7B": 6_738_415_616,
    "LLaMA 2 70B": 68_976_648_192,
    "LLaMA 3 8B": 8_030_261_248,
    "LLaMA 3.2 1B": 1_235_814_400,
    "LLaMA 3.2 3B": 3_212_749_824,
    "LLaMA 3.1 405B": 405_853_388_800,
}


@pytest.mark.parametrize("name", FAMILY)
def test_named_shapes_have_as_many_parameters_as_in_transformers(name):
    config = FAMILY[name]
    raw = write_hf_config(config, "bfloat16")
    with torch.device("meta"):
        ours = Llama(config)
        build = (Llama4TextConfig, Llama4ForCausalLM) if config.num_experts else (TheirConfig, LlamaForCausalLM)
        theirs = build[1](build[0](**raw))
    counted = [sum(p.numel() for p in set(model.parameters())) for model in (ours, theirs)]
    assert counted == [config.num_parameters] * 2
    assert PUBLISHED.get(name, config.num_parameters) == config.num_parameters


def test_every_named_shape_is_told_from_the_others():
    for name, config in FAMILY.items():
        found = family_of(config)
        assert found is not None and FAMILY[found] == config, name  # 7 B of LLaMA 1 or 2: the same numbers
    assert family_of(LlamaConfig(vocab_size=9, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=8)) is None
