import argparse
import json
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from visplice.lm.tensor_files import open_file


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
    store = open_file(tmp_path / "model.safetensors")
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
    store = open_file(tmp_path / "model.safetensors")
    assert torch.equal(store.get("weight"), values.view(2, 3))
    assert torch.equal(store.get("weight") @ torch.ones(3), torch.tensor([3.0, 12.0]))


def test_tensor_is_a_view_that_outlives_its_file_object_and_never_writes_to_the_file(tmp_path):
    state = {"head": torch.randn(12, 8), "norm": torch.randn(8)}
    save_file(state, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    store = open_file(tmp_path / "model.safetensors")
    first, second = store.get("head"), store.get("head")
    assert first.data_ptr() == second.data_ptr()
    del store, second
    assert torch.equal(first, state["head"])
    first.fill_(7)
    assert (first == 7).all() and (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(open_file(tmp_path / "model.safetensors").get("head"), state["head"])


def test_writing_to_one_tensor_leaves_its_neighbours_alone(tmp_path):
    # A page and a half each, so that neighbours share pages.
    state = {f"{i}": torch.full((1536,), float(i)) for i in range(8)}
    save_file(state, tmp_path / "model.safetensors")
    store = open_file(tmp_path / "model.safetensors")
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
    store = open_file(tmp_path / "model.safetensors")

    def mapped():
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    start = mapped()
    kept = []
    for name in store.names():
        kept.append(store.get(name).to(torch.bfloat16))
        assert mapped() - start < 1.5 * size, f"after {name}"
    table = store.get("3")
    assert table.sum() == 3 * size // 4 and mapped() - start > 0.9 * size  # the figure above does count these pages


class Payload:
    """Runs when it is unpickled without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_bin_that_would_run_code_is_refused_unrun(tmp_path, old):
    for name, extra in (("payload", Payload(tmp_path / "ran")), ("arguments", argparse.Namespace(lr=1e-3))):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(
            {"weight": torch.ones(3), "extra": extra},
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=not old,
        )
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: holds more than tensors \(.*\), .* is refused; use"):
            open_file(folder / "pytorch_model.bin").names()
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
        open_file(tmp_path / "pytorch_model.bin").names()


def test_path_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read \(Is a directory\)"):
        open_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: cannot be read \(No such file or directory\)"):
        open_file(tmp_path / "pytorch_model.bin")
