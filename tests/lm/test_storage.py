import json
import re

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
