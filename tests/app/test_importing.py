"""`visplice import`: what comes out is what went in, and nothing half-written stays."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from visplice.app.cli import main
from visplice.lm.checkpoint import load_llama, save_llama, write_llama
from visplice.vision._torchvision import declare_missing_operators

declare_missing_operators()  # transformers imports torchvision

from transformers import LlamaConfig as TheirConfig  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

SHAPE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def save_tokenizer(folder, size):
    backend = Backend(models.BPE(vocab={f"t{n}": n for n in range(size)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


@pytest.fixture
def source(tmp_path):
    """A `.bin` checkpoint as older folders hold it, with a tokenizer, and its logits."""
    torch.manual_seed(0)
    theirs, folder = LlamaForCausalLM(TheirConfig(**SHAPE)).eval(), tmp_path / "source"
    folder.mkdir()
    theirs.config.save_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    save_tokenizer(folder, 30)
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of a checkpoint ran')")
    return folder, theirs


@torch.inference_mode()
def test_imported_folder_has_the_logits_of_its_source_in_transformers_and_here(source, tmp_path, capsys):
    folder, theirs = source
    assert main(["import", str(folder), "--out", str(tmp_path / "out")]) == 0
    ids = torch.randint(0, 40, (2, 9))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert torch.equal(load_llama(tmp_path / "out")(ids), load_llama(folder)(ids))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert f"{sum(p.numel() for p in theirs.parameters()):,} parameters, float32" in capsys.readouterr().out


def test_dtype_is_cast_on_the_way(source, tmp_path):
    folder, _ = source
    assert main(["import", str(folder), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def refused(capsys, *words) -> str:
    assert main(["import", *map(str, words)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("visplice: ") and "Traceback" not in message
    return message


def test_wrong_sources_and_places_are_refused_in_one_line(source, tmp_path, capsys):
    folder, _ = source
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", "--out", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary")
    assert "not empty" in refused(capsys, folder, "--out", tmp_path / "full")
    assert "is a file" in refused(capsys, folder, "--out", tmp_path / "full" / "diary.txt")
    assert (tmp_path / "full" / "diary.txt").read_text() == "dear diary"
    save_tokenizer(folder, 41)
    assert "41 ids, the embedding table only 40 rows" in refused(capsys, folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk_is_one_line_and_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("visplice.lm.checkpoint.save_file", full)
    assert "No space left" in refused(capsys, source[0], "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupted_import_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("visplice.lm.checkpoint.save_file", interrupt)
    assert main(["import", str(source[0]), "--out", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()


@torch.inference_mode()
def test_large_decoder_is_written_in_shards_with_an_index_that_transformers_reads(source, tmp_path):
    model = load_llama(source[0])
    state = model.state_dict()
    save_llama(model, tmp_path / "out")  # what an earlier, smaller save left there goes
    write_llama(model.config, state.__getitem__, tmp_path / "out", dtype=torch.float32, max_shard=20_000)
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    ids = torch.randint(0, 40, (2, 9))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(ids).logits, source[1](ids).logits)
    assert torch.equal(load_llama(tmp_path / "out")(ids), model(ids))
