import json
import re

import pytest
import torch

from visplice.lm.storage import open_store, read_tensor


def check(store, state):
    assert sorted(store.names()) == sorted(state)
    for name, tensor in state.items():
        assert store.shape(name) == tuple(tensor.shape), name
        assert store.dtype(name) == tensor.dtype, name
        found = store.get(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def meta_state(kind, *, dim=16, heads=4, kv_heads=2, ffn=24, vocab=20, layers=2, experts=4):
    """A whole model under Meta's names: `llama`, or `llama4` with a sparse and a dense layer."""
    head, rand = dim // heads, torch.randn
    state = {"tok_embeddings.weight": rand(vocab, dim), "norm.weight": rand(dim), "output.weight": rand(vocab, dim)}
    for layer in range(layers):
        sparse = layer % 2
        parts = {"attention.wo.weight": rand(dim, heads * head)}
        if kind == "llama":
            parts |= {
                "attention.wq.weight": rand(heads * head, dim),
                "attention.wk.weight": rand(kv_heads * head, dim),
                "attention.wv.weight": rand(kv_heads * head, dim),
                "feed_forward.w1.weight": rand(ffn, dim),
                "feed_forward.w2.weight": rand(dim, ffn),
                "feed_forward.w3.weight": rand(ffn, dim),
                "attention_norm.weight": rand(dim),
                "ffn_norm.weight": rand(dim),
            }
        else:
            parts["attention.wqkv.weight"] = rand((heads + 2 * kv_heads) * head, dim)
            parts["attention.wqkv.layer_norm_weight"] = rand(dim)
        if kind == "llama4" and sparse:
            parts |= {
                "feed_forward.norm.weight": rand(dim),
                "feed_forward.router_DE": rand(dim, experts),
                "feed_forward.experts.moe_w_in_eD_F": rand(experts, dim, ffn),
                "feed_forward.experts.moe_w_swiglu_eD_F": rand(experts, dim, ffn),
                "feed_forward.experts.moe_w_out_eF_D": rand(experts, ffn, dim),
                "feed_forward.w_in_shared_FD.weight": rand(ffn, dim),
                "feed_forward.w_swiglu_FD.weight": rand(ffn, dim),
                "feed_forward.w_out_shared_DF.weight": rand(dim, ffn),
            }
        elif kind == "llama4":
            parts |= {
                "feed_forward.mlp.layer_norm_weight": rand(dim),
                "feed_forward.mlp.fc1_weight": rand(2 * ffn, dim),
                "feed_forward.mlp.fc2_weight": rand(dim, ffn),
            }
        state |= {f"layers.{layer}.{name}": tensor for name, tensor in parts.items()}
    return {name: tensor.bfloat16() for name, tensor in state.items()}


def cut(state, count, *, table_dim=0, heads=4, kv_heads=2):
    """What each of `count` processes holds: fairscale cuts column-parallel layers by output, row-parallel by input."""
    head = state["norm.weight"].shape[0] // heads
    ranks = [{} for _ in range(count)]
    for name, tensor in state.items():
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if name == "tok_embeddings.weight":
            parts = tensor.chunk(count, dim=table_dim)
        elif leaf in ("wk", "wv"):
            parts = [
                tensor.view(kv_heads, head, -1)[rank * kv_heads // count :][: max(1, kv_heads // count)]
                for rank in range(count)
            ]
            parts = [part.flatten(0, 1) for part in parts]
        elif leaf == "wqkv":
            q, k, v = (
                part.view(-1, head, part.shape[1]) for part in tensor.split([head * heads, *[head * kv_heads] * 2])
            )
            each = max(1, kv_heads // count)
            parts = []
            for rank in range(count):
                first = rank * kv_heads // count
                held = [q.chunk(count)[rank], k[first : first + each], v[first : first + each]]
                parts.append(torch.cat(held).flatten(0, 1))
        elif leaf == "fc1_weight":
            w1, w3 = tensor.chunk(2)
            parts = [torch.cat(pair) for pair in zip(w1.chunk(count), w3.chunk(count), strict=True)]
        elif leaf in ("moe_w_in_eD_F", "moe_w_swiglu_eD_F"):
            parts = [part.flatten(0, 1) for part in tensor.chunk(count, dim=2)]
        elif leaf == "moe_w_out_eF_D":
            parts = [part.flatten(0, 1) for part in tensor.chunk(count, dim=1)]
        elif leaf in ("wq", "w1", "w3", "output", "w_in_shared_FD", "w_swiglu_FD"):
            parts = tensor.chunk(count, dim=0)
        elif leaf in ("wo", "w2", "fc2_weight", "w_out_shared_DF"):
            parts = tensor.chunk(count, dim=1)
        else:
            parts = [tensor] * count
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone()
    return ranks


def write_meta(ranks, folder, **params):
    folder.mkdir(parents=True, exist_ok=True)
    for number, rank in enumerate(ranks):
        torch.save(rank, folder / f"consolidated.{number:02d}.pth")
    if params:
        (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("kind", "table_dim"), [("llama", 0), ("llama", 1), ("llama4", 0)])
def test_slices_of_a_model_parallel_checkpoint_are_joined(tmp_path, kind, table_dim, count):
    state = meta_state(kind, kv_heads=4)
    write_meta(cut(state, count, table_dim=table_dim, kv_heads=4), tmp_path)
    store = open_store(tmp_path)
    check(store, state)
    assert store.folder == tmp_path
    assert store.file_of("norm.weight") == tmp_path / "consolidated.00.pth"
    assert torch.equal(read_tensor(tmp_path, "tok_embeddings.weight"), state["tok_embeddings.weight"])


@pytest.mark.parametrize("kind", ["llama", "llama4"])
def test_copies_of_heads_are_dropped_where_there_are_more_files_than_heads(tmp_path, kind):
    state = meta_state(kind, kv_heads=2)
    ranks = cut(state, 4, kv_heads=2)
    write_meta(ranks, tmp_path, n_heads=4, n_kv_heads=2)
    check(open_store(tmp_path), state)
    name = "layers.0.attention.wk.weight" if kind == "llama" else "layers.0.attention.wqkv.weight"
    ranks[3][name] = ranks[3][name] + 1
    write_meta(ranks, tmp_path)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} differs between files"):
        open_store(tmp_path).get(name)


def test_tensors_that_the_decoder_does_not_need_are_left_out(tmp_path):
    state = meta_state("llama4", kv_heads=4)
    extra = {
        "rope.freqs": torch.ones(2),
        "layers.0.attention.inner_attention.rope.freqs": torch.ones(2),
        "layers.0.attention.wqkv._extra_state": None,
        "layers.1.feed_forward.expert_activation_DE": torch.ones(2, 2),
        "layers.1.feed_forward.global_gate_stats_3E": torch.ones(3, 2),
        "vision_embeddings.vision_encoder.conv1._linear.weight": torch.randn(4, 4),
        "vision_projection.weight": torch.randn(4, 4),
    }
    write_meta([rank | extra for rank in cut(state, 2, kv_heads=4)], tmp_path)
    check(open_store(tmp_path), state)


def test_metas_files_are_found_in_original_and_without_a_number(tmp_path):
    state = meta_state("llama")
    write_meta(cut(state, 2), tmp_path / "original")
    store = open_store(tmp_path)
    check(store, state)
    assert store.folder == tmp_path / "original"
    torch.save(state, tmp_path / "consolidated.pth")
    check(open_store(tmp_path), state)


def test_missing_slice_is_refused_by_number_or_by_width(tmp_path):
    write_meta(cut(meta_state("llama", kv_heads=4), 4, kv_heads=4), tmp_path)
    (tmp_path / "consolidated.03.pth").unlink()
    with pytest.raises(
        ValueError, match=r"3 files make layers\.0\.attention\.wo\.weight 12 wide, expected 16; files are"
    ):
        open_store(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(
        ValueError,
        match=r"holds consolidated\.00\.pth, consolidated\.02\.pth; expected consolidated\.00\.pth, consolidated\.01",
    ):
        open_store(tmp_path)


def test_heads_wider_than_the_model_are_no_missing_slice(tmp_path):
    state = meta_state("llama", dim=16)
    for name in [name for name in state if ".wo." in name]:
        state[name] = torch.randn(16, 32).bfloat16()
    ranks = cut(state, 2)
    write_meta(ranks, tmp_path, n_heads=4, head_dim=8)
    check(open_store(tmp_path), state)
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(ValueError, match=r"params\.json: not JSON"):
        open_store(tmp_path)
    (tmp_path / "params.json").unlink()
    with pytest.raises(ValueError, match=r"32 wide, expected 16; not all of them are of this model"):
        open_store(tmp_path)


def test_slices_of_different_models_are_refused(tmp_path):
    ranks = cut(meta_state("llama"), 2)
    write_meta([ranks[0], ranks[1] | {"layers.7.ffn_norm.weight": torch.ones(16)}], tmp_path)
    with pytest.raises(
        ValueError, match=r"consolidated\.01\.pth: layers\.7\.ffn_norm\.weight only here or only in cons"
    ):
        open_store(tmp_path)
    write_meta([ranks[0], ranks[1] | {"norm.weight": torch.ones(8).bfloat16()}], tmp_path)
    with pytest.raises(
        ValueError, match=r"01\.pth: norm\.weight is \[8\] torch\.bfloat16, in consolidated\.00\.pth \[16\]"
    ):
        open_store(tmp_path)
    write_meta([ranks[0], ranks[1] | {"norm.weight": torch.ones(16).bfloat16()}], tmp_path)
    with pytest.raises(ValueError, match=r"norm\.weight differs between files that all hold it; expected parts of one"):
        open_store(tmp_path).get("norm.weight")


def test_quantised_slices_are_refused(tmp_path):
    write_meta(cut(meta_state("llama"), 2), tmp_path)
    for rank in range(2):
        (tmp_path / f"int4_scales_{rank}.pt").touch()
    with pytest.raises(
        ValueError, match=r"quantised weights \(int4_scales_0\.pt, int4_scales_1\.pt\); expected those in bf"
    ):
        open_store(tmp_path)
