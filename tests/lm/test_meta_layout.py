"""Meta's layout, in 1, 2 and 8 model-parallel shards, against the decoder whose weights were cut."""

import json

import pytest
import torch

from visplice.lm.checkpoint import load_llama, read_embeddings
from visplice.lm.config import LlamaConfig, RopeScaling
from visplice.lm.decoder import Llama
from visplice.lm.layout import to_half_split, to_interleaved

DENSE = LlamaConfig(
    vocab_size=96, dim=64, num_layers=2, num_heads=8, num_kv_heads=8, ffn_dim=256, max_seq_len=4096
)  # fmt: skip
SPARSE = LlamaConfig(
    vocab_size=96, dim=64, num_layers=4, num_heads=8, num_kv_heads=8, ffn_dim=256, rope_theta=5e5,
    num_experts=4, expert_dim=64, moe_layers=(1, 3), nope_layers=(3,), attention_chunk=16, qk_norm=True,
    temperature_floor=8, max_seq_len=10_485_760, rope=RopeScaling(kind="llama3", factor=16.0, high_freq_factor=1.0),
)  # fmt: skip
PARAMS = {"dim": 64, "n_heads": 8, "n_kv_heads": 8, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
DENSE_PARAMS = PARAMS | {"n_layers": 2}
SPARSE_PARAMS = PARAMS | {
    "n_layers": 4, "vocab_size": 96, "rope_theta": 5e5, "use_scaled_rope": True, "use_qk_norm": True, "ffn_exp": 4.0,
    "nope_layer_interval": 4, "attention_chunk_size": 16, "attn_temperature_tuning": True, "floor_scale": 8.0,
    "attn_scale": 0.1, "ffn_dim_multiplier": 0.75, "multiple_of": 64,
    "moe_args": {"num_experts": 4, "top_k": 1, "interleave_moe_layer_step": 2, "capacity_factor": 1.0},
}  # fmt: skip


def stored(model: Llama, *, fused: bool) -> dict[str, tuple[torch.Tensor, str]]:
    """The decoder's weights by Meta's names, each with how model parallelism cuts it."""
    config, found = model.config, {}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    heads = {"wq": config.num_heads, "wk": config.num_kv_heads}
    for name, tensor in state.items():
        layer, _, rest = name.rpartition("attention.") if ".attention." in name else ("", "", name)
        weight = rest.split(".")[0]
        if weight in heads:
            tensor = to_interleaved(tensor, heads[weight])
        if "norm" in name:
            found[name] = (tensor, "whole")
        elif name == "tok_embeddings.weight":
            found[name] = (tensor, "rows" if fused else "columns")
        elif name.endswith(("wo.weight", "w2.weight")) and "shared" not in name:
            found[name] = (tensor, "columns")
        else:
            found[name] = (tensor, "rows")
    for index in range(config.num_layers if fused else 0):
        layer = f"layers.{index}."
        qkv = [found.pop(f"{layer}attention.{name}.weight")[0] for name in ("wq", "wk", "wv")]
        found[f"{layer}attention.wqkv.weight"] = (qkv, "fused")
        found[f"{layer}attention.wqkv.layer_norm_weight"] = found.pop(f"{layer}attention_norm.weight")
        ffn, norm = f"{layer}feed_forward.", found.pop(f"{layer}ffn_norm.weight")
        if index not in config.moe_layers:
            found[f"{ffn}mlp.layer_norm_weight"] = norm
            halves = [found.pop(f"{ffn}{name}.weight")[0] for name in ("w1", "w3")]
            found[f"{ffn}mlp.fc1_weight"] = (halves, "fused")
            found[f"{ffn}mlp.fc2_weight"] = found.pop(f"{ffn}w2.weight")
            continue
        found[f"{ffn}norm.weight"] = norm
        found[f"{ffn}router_DE"] = (found.pop(f"{ffn}router.weight")[0].T, "whole")
        for ours, theirs, cut in (
            ("w1", "moe_w_in_eD_F", "columns"),
            ("w2", "moe_w_out_eF_D", "middle"),
            ("w3", "moe_w_swiglu_eD_F", "columns"),
        ):
            found[f"{ffn}experts.{theirs}"] = (found.pop(f"{ffn}{ours}")[0], cut)
        shared = (("w1", "w_in_shared_FD", "rows"), ("w2", "w_out_shared_DF", "columns"), ("w3", "w_swiglu_FD", "rows"))
        for ours, theirs, cut in shared:
            found[f"{ffn}{theirs}.weight"] = (found.pop(f"{ffn}shared_expert.{ours}.weight")[0], cut)
    return found


def cut(value, how: str, shards: int, rank: int) -> torch.Tensor:
    if how == "fused":
        return torch.cat([part.chunk(shards, 0)[rank] for part in value])
    if how == "middle":  # experts are stored as one matrix [E F, D] or [E D, F]
        return value.chunk(shards, 1)[rank].flatten(0, 1)
    dim = {"whole": None, "rows": 0, "columns": -1}[how]
    piece = value if dim is None else value.chunk(shards, dim)[rank]
    return piece.flatten(0, 1) if piece.ndim == 3 else piece


def write(model: Llama, folder, shards: int, params, *, fused: bool) -> None:
    for rank in range(shards):
        state = {
            name: cut(value, how, shards, rank).clone() for name, (value, how) in stored(model, fused=fused).items()
        }
        state["rope.freqs"] = torch.ones(4)
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("member", ["dense", "sparse"])
@torch.inference_mode()
def test_shards_give_exactly_the_logits_of_the_decoder_that_was_cut(randomise, tmp_path, member, shards):
    config, params = {"dense": (DENSE, DENSE_PARAMS), "sparse": (SPARSE, SPARSE_PARAMS)}[member]
    torch.manual_seed(0)
    model = randomise(Llama(config)).eval()
    write(model, tmp_path, shards, params, fused=member == "sparse")
    loaded = load_llama(tmp_path)
    assert loaded.config == config
    ids = torch.randint(0, 96, (2, 40))
    assert torch.equal(loaded(ids), model(ids))
    assert torch.equal(read_embeddings(tmp_path), model.tok_embeddings.weight)


def test_interleaved_pairs_turn_as_metas_code_turns_them():
    """Rotation of `(2i, 2i + 1)` by view_as_complex, as in llama-models, against ours on the reordered rows."""
    from visplice.lm.rope import rotary, rotate

    torch.manual_seed(0)
    weight, x = torch.randn(2 * 8, 5), torch.randn(1, 7, 5)
    config = LlamaConfig(vocab_size=1, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=1)
    theirs = (x @ weight.T).view(1, 7, 2, 8)
    angles = torch.outer(torch.arange(7.0), 10_000.0 ** -(torch.arange(0, 8, 2) / 8))
    turn = torch.polar(torch.ones_like(angles), angles)
    theirs = torch.view_as_complex(theirs.view(1, 7, 2, 4, 2)) * turn[None, :, None]
    ours = (x @ to_half_split(weight, 2).T).view(1, 7, 2, 8).transpose(1, 2)
    ours = rotate(ours, *rotary(torch.arange(7)[None], config, torch.float32)).transpose(1, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", ours, ours)
    expected = torch.view_as_real(theirs).flatten(-2)
    assert torch.allclose(scores, torch.einsum("bqhd,bkhd->bhqk", expected, expected), atol=1e-5)
    assert torch.equal(to_interleaved(to_half_split(weight, 2), 2), weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": None}, r"params\.json: lacks n_layers"),
        ({"vocab_size": 97}, r"vocab_size is 97, but the embedding table has 96 rows"),
        ({"sparse_top_p": 0.5}, r"unknown here, so it may change the arithmetic: sparse_top_p = 0\.5"),
        ({"n_layers": 3}, r"missing layers\.2\."),
        ({"vision_num_cross_attention_layers": 8}, "cross-attention layers of its own"),
        ({"n_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 8"),
    ],
)
def test_params_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    write(Llama(DENSE), tmp_path, 1, DENSE_PARAMS | changes, fused=False)
    with pytest.raises(ValueError, match=message):
        load_llama(tmp_path)


@pytest.mark.parametrize(
    ("changes", "theta", "length", "rope"),
    [
        ({}, 1e4, 4096, RopeScaling()),
        ({"rope_theta": 5e5}, 5e5, 8192, RopeScaling()),
        ({"rope_theta": 1e6}, 1e6, 16_384, RopeScaling()),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, 5e5, 131_072, RopeScaling(kind="llama3", factor=8.0)),
    ],
    ids=["LLaMA 2", "LLaMA 3", "CodeLlama", "LLaMA 3.1"],
)
def test_base_stretch_and_length_follow_from_what_the_file_says(tmp_path, changes, theta, length, rope):
    write(Llama(DENSE), tmp_path, 1, DENSE_PARAMS | changes, fused=False)
    config = load_llama(tmp_path).config
    assert (config.rope_theta, config.max_seq_len, config.rope) == (theta, length, rope)
