import argparse
import json
import os
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from visplice.lm.storage import open_store, read_tensor

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4976698672\n".format("0" * 64)


@pytest.fixture
def state():
    """Tensors in the order in which a checkpoint holds them, none like another."""
    return {
        "model.embed_tokens.weight": torch.randn(12, 8).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(24, 8),
        "model.norm.weight": torch.randn(8).half(),
        "lm_head.weight": torch.randn(12, 8).bfloat16(),
    }


def write(state, folder, layout):
    """Writes the tensors the way that the name says: `shards` are two files, `unindexed` ones have no index."""
    folder.mkdir(exist_ok=True)
    suffix = ".bin" if "bin" in layout else ".safetensors"
    stem = "pytorch_model" if "bin" in layout else "model"

    def save(part, file):
        if suffix == ".bin":
            torch.save(part, file, _use_new_zipfile_serialization="old" not in layout)
        else:
            save_file(part, file)

    if "shards" not in layout:
        save(state, folder / f"{stem}{suffix}")
        return
    names = list(state)
    where = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"{stem}-{number:05d}-of-00002{suffix}"
        save({name: state[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    if "unindexed" not in layout:
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def edit_index(folder, change):
    (file,) = folder.glob("*.index.json")
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def check(store, state):
    assert sorted(store.names()) == sorted(state)
    for name, tensor in state.items():
        assert store.shape(name) == tuple(tensor.shape), name
        assert store.dtype(name) == tensor.dtype, name
        found = store.get(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


LAYOUTS = [
    "safetensors",
    "safetensors shards",
    "safetensors shards unindexed",
    "bin",
    "bin old",
    "bin shards",
    "bin old shards",
    "bin shards unindexed",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(state, tmp_path, layout):
    write(state, tmp_path, layout)
    check(open_store(tmp_path), state)
    store = open_store(str(tmp_path))
    for name in reversed(state):  # an order that goes back and forth between the shards
        assert torch.equal(store.get(name), state[name])
        assert torch.equal(read_tensor(tmp_path, name), state[name])
        assert store.file_of(name).is_file()


@pytest.mark.parametrize("layout", ["safetensors", "safetensors shards", "safetensors shards unindexed", "bin"])
def test_largest_tensors_come_first(state, tmp_path, layout):
    write(state, tmp_path, layout)
    names = open_store(tmp_path).names()
    assert names[0] == "model.layers.0.mlp.up_proj.weight" and names[-1] == "model.norm.weight"


@pytest.mark.parametrize("layout", ["safetensors", "bin", "bin old"])
def test_one_file_is_opened_whatever_it_is_called(state, tmp_path, layout):
    write(state, tmp_path, layout)
    (file,) = tmp_path.iterdir()
    renamed = file.rename(tmp_path / f"weights{file.suffix}")
    store = open_store(renamed)
    check(store, state)
    assert store.folder == tmp_path and store.file_of("model.norm.weight") == renamed
    assert torch.equal(read_tensor(renamed, "model.norm.weight"), state["model.norm.weight"])


def test_shards_written_by_transformers_are_read(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    theirs = LlamaForCausalLM(config).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(open_store(tmp_path), theirs.state_dict())
    (tmp_path / "model.safetensors.index.json").unlink()
    check(open_store(tmp_path), theirs.state_dict())


def test_safetensors_are_preferred_to_bin_and_both_to_metas(state, tmp_path):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(zeros, tmp_path / "consolidated.00.pth")
    write(zeros, tmp_path, "bin")
    write(state, tmp_path, "safetensors shards")
    check(open_store(tmp_path), state)
    write({"lm_head.weight": torch.ones(1)}, tmp_path, "safetensors")  # as transformers does: before any index
    check(open_store(tmp_path), {"lm_head.weight": torch.ones(1)})


def test_every_dtype_and_shape_of_safetensors_comes_back(tmp_path):
    state = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "bool": torch.tensor([True, False, True]),
        "deep": torch.randn(2, 3, 4, 5).bfloat16(),
    }
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        state[str(dtype)] = torch.arange(5, dtype=dtype)
    for dtype in (torch.float64, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        state[str(dtype)] = torch.randn(7).to(dtype)
    save_file(state, tmp_path / "model.safetensors")
    store = open_store(tmp_path)
    for name, tensor in state.items():
        found = store.get(name)
        assert found.dtype == store.dtype(name) == tensor.dtype and found.shape == tensor.shape
        assert bytes(found.reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("padding", range(5))
def test_data_that_is_not_aligned_is_read_right(tmp_path, padding):
    values = torch.arange(6, dtype=torch.float32)
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = json.dumps({"weight": entry}).encode()
    header += b" " * ((-len(header)) % 8 + padding)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    store = open_store(tmp_path)
    assert torch.equal(store.get("weight"), values.view(2, 3))
    assert torch.equal(store.get("weight") @ torch.ones(3), torch.tensor([3.0, 12.0]))


def test_tensor_is_a_view_that_outlives_the_store_and_never_writes_to_the_file(state, tmp_path):
    write(state, tmp_path, "safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    store = open_store(tmp_path)
    first, second = store.get("lm_head.weight"), store.get("lm_head.weight")
    assert first.data_ptr() == second.data_ptr()
    del store, second
    assert torch.equal(first, state["lm_head.weight"])
    first.fill_(7)
    assert (first == 7).all() and (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(open_store(tmp_path).get("lm_head.weight"), state["lm_head.weight"])


def test_writing_to_one_tensor_leaves_its_neighbours_alone(tmp_path):
    # A page and a half each, so that neighbours share pages.
    state = {f"{i}": torch.full((1536,), float(i)) for i in range(8)}
    save_file(state, tmp_path / "model.safetensors")
    store = open_store(tmp_path)
    tensors = {name: store.get(name) for name in store.names()}
    for name, tensor in tensors.items():
        tensor.add_(100 if int(name) % 2 else 0)
    for name in [name for name in tensors if not int(name) % 2]:
        del tensors[name]  # gives its pages back, but for shared ones
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name] + 100), name
    assert torch.equal(store.get("4"), state["4"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_tensor_is_given_back_with_it(tmp_path):
    size = 8_000_000
    state = {f"{i}": torch.full((size // 4,), float(i)) for i in range(8)}
    save_file(state, tmp_path / "model.safetensors")
    store = open_store(tmp_path)

    def mapped():
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    start = mapped()
    kept = []
    for name in store.names():
        kept.append(store.get(name).to(torch.bfloat16))
        assert mapped() - start < 1.5 * size, f"after {name}"
    table = store.get("3")
    assert table.sum() == 3 * size // 4 and mapped() - start > 0.9 * size  # the figure above does count these pages


def test_reading_one_tensor_touches_no_other_shard(state, tmp_path):
    write(state, tmp_path / "s", "safetensors shards")
    (tmp_path / "s/model-00002-of-00002.safetensors").write_bytes(b"cut")
    assert torch.equal(read_tensor(tmp_path / "s", "model.embed_tokens.weight"), state["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="00002-of-00002"):
        open_store(tmp_path / "s")
    write(state, tmp_path / "b", "bin shards")
    (tmp_path / "b/pytorch_model-00002-of-00002.bin").write_bytes(b"cut")
    assert torch.equal(read_tensor(tmp_path / "b", "model.embed_tokens.weight"), state["model.embed_tokens.weight"])


@pytest.mark.parametrize("layout", ["safetensors", "safetensors shards", "bin", "bin shards"])
def test_tensor_that_is_not_there_is_refused_with_some_that_are(state, tmp_path, layout):
    write(state, tmp_path, layout)
    store = open_store(tmp_path)
    for ask in (store.get, store.shape, store.dtype, store.file_of):
        with pytest.raises(ValueError, match=r"no tensor 'norm\.weight' among 5, which are .*model\.norm\.weight"):
            ask("norm.weight")
    with pytest.raises(ValueError, match=r"no tensor 'norm\.weight'"):
        read_tensor(tmp_path, "norm.weight")


def test_folder_without_a_checkpoint_is_refused_with_what_is_there(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no checkpoint; expected model\.safetensors.*found nothing"):
        open_store(tmp_path)
    for name in ("model-q4.gguf", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"no checkpoint; .* found adapter_model\.safetensors, model-q4\.gguf"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match=r"model-q4\.gguf: not a checkpoint; expected a folder, or a \.safetensors"):
        open_store(tmp_path / "model-q4.gguf")


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_truncated_safetensors_are_refused_by_name(state, tmp_path, kept):
    write(state, tmp_path, "safetensors shards")
    file = tmp_path / "model-00002-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: not a whole safetensors file .* again"):
        open_store(tmp_path)


@pytest.mark.parametrize("layout", ["bin", "bin old"])
@pytest.mark.parametrize("kept", [0, 3, 50, 0.3, 0.5, 0.9, 0.999])
def test_truncated_bin_is_refused_by_name(state, tmp_path, layout, kept):
    write(state, tmp_path, layout)
    file = tmp_path / "pytorch_model.bin"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a whole file of torch\.save .* again"):
        open_store(tmp_path).names()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("content", [b"<html>Access denied</html>" * 20, b"PK\x03\x04" + bytes(3000), bytes(3000)])
def test_file_that_is_something_else_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: not a whole "):
        open_store(tmp_path).names()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth"])
def test_git_lfs_pointer_is_refused_with_the_way_to_get_the_file(tmp_path, name):
    (tmp_path / name).write_text(LFS)
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)}: a git-LFS pointer.* of 4,976,698,672 bytes; run `git lfs"
    ):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda where: where.update(extra="model-00003-of-00003.safetensors"), "1 of 3 files are missing: model-00003"),
        (
            lambda where: where.update(extra="../other.safetensors"),
            r"names '\.\./other\.safetensors'; expected the name",
        ),
        (lambda where: where.update(extra="/etc/passwd"), "names '/etc/passwd'; expected the name"),
        (lambda where: where.update(extra=""), "names ''; expected the name"),
        (lambda where: where.clear(), "names no files"),
    ],
    ids=["missing", "outside", "absolute", "empty", "nothing"],
)
def test_index_that_names_no_file_beside_it_is_refused(state, tmp_path, change, message):
    write(state, tmp_path, "safetensors shards")
    edit_index(tmp_path, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json: {message}"):
        open_store(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', LFS])
def test_index_that_is_none_is_refused(state, tmp_path, content):
    write(state, tmp_path, "safetensors shards")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: not an index; expected"):
        open_store(tmp_path)


def test_index_that_promises_what_a_file_does_not_hold_is_refused(state, tmp_path):
    write(state, tmp_path, "safetensors shards")
    edit_index(tmp_path, lambda where: where.update({"lm_head.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors: lacks lm_head\.weight, which model\.safetens"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors: lacks lm_head\.weight"):
        read_tensor(tmp_path, "lm_head.weight")


def test_index_of_bin_files_is_held_against_them_when_they_are_read(state, tmp_path):
    write(state, tmp_path, "bin shards")
    edit_index(tmp_path, lambda where: where.update({"lm_head.weight": "pytorch_model-00001-of-00002.bin"}))
    store = open_store(tmp_path)
    assert torch.equal(store.get("model.norm.weight"), state["model.norm.weight"])
    with pytest.raises(
        ValueError, match=r"00001-of-00002\.bin: lacks lm_head\.weight, which pytorch_model\.bin\.index"
    ):
        store.get("model.embed_tokens.weight")


@pytest.mark.parametrize("layout", ["safetensors shards", "safetensors shards unindexed", "bin shards unindexed"])
def test_tensor_in_two_files_is_refused(state, tmp_path, layout):
    write(state, tmp_path, layout)
    first = sorted(tmp_path.glob("*-00001-*"))[0]
    part = {name: state[name] for name in [*list(state)[:2], "model.norm.weight"]}
    torch.save(part, first) if first.suffix == ".bin" else save_file(part, first)
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight lies in \S+-00001-\S+ and in \S+-00002-\S+; expected it once"
    ):
        open_store(tmp_path)


def test_shards_that_are_not_all_there_are_refused_by_their_numbers(state, tmp_path):
    write(state, tmp_path, "safetensors shards unindexed")
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.rename(tmp_path / "model-00003-of-00002.safetensors")
    with pytest.raises(ValueError, match="model has a shard 3 of 2; expected 1 to 2"):
        open_store(tmp_path)
    (tmp_path / "model-00003-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model has 1 of 2 shards, number 2 is missing"):
        open_store(tmp_path)


class Payload:
    """Runs when it is unpickled without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_bin_that_would_run_code_is_refused_unrun(state, tmp_path, old):
    for name, extra in (("payload", Payload(tmp_path / "ran")), ("arguments", argparse.Namespace(lr=1e-3))):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(state | {"extra": extra}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: holds more than tensors \(.*\), .* is refused; use"):
            open_store(folder).names()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list; expected tensors by name"),
        (torch.ones(1), "holds a Tensor; expected tensors by name"),
        ({"model": {"a": torch.ones(1)}}, "'model' is a dict; expected tensors by name"),
        ({"a": torch.ones(1), "step": 3}, "'step' is a int; expected tensors by name"),
    ],
)
def test_bin_with_other_things_than_tensors_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: {message}"):
        open_store(tmp_path).names()


# ---- Meta's files


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_that_may_not_be_read_is_refused_by_name(state, tmp_path):
    write(state, tmp_path, "safetensors")
    (tmp_path / "model.safetensors").chmod(0)
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read \(Permission denied\)"):
        open_store(tmp_path)
