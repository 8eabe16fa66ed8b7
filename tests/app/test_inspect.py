"""`visplice inspect`: what it says is what the model does."""

import pytest
import torch
from PIL import Image

from visplice.app.cli import main
from visplice.lm.checkpoint import save_llama
from visplice.lm.config import LlamaConfig
from visplice.lm.decoder import Llama
from visplice.lm.extension import load_extension
from visplice.lm.prompt import IGNORE
from visplice.lm.vision_llama import user_message


def shown(capsys, *words) -> str:
    assert main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def rows(text: str) -> dict[str, str]:
    split = (line.split("  ", 1) for line in text.splitlines() if "  " in line)
    return {label.strip(): value.strip() for label, value in split}


def test_embedded_model_is_told_with_its_parts(capsys):
    told = rows(shown(capsys, "embedded"))
    assert told["parameters"] == "3,067,136" and "float16" in told["stored as"]
    assert told["shape"].startswith("5 layers, 256 wide, feed-forward 512, 8 query heads, 4 key-value heads of 32")
    assert told["tokenizer"] == "450 ids, 5 control tokens" and told["template"] == "turns"
    assert told["visual tokens"].startswith("65 a picture") and told["projector"] == "192 -> 256 -> 256"
    assert told["in float32"] == "11.7 MiB of weights, 4.9 MiB of cache for 1,000 positions"
    assert "free" in told["cpu"]


def test_folder_without_tokenizer_is_told_all_the_same(tmp_path, capsys):
    tiny = LlamaConfig(vocab_size=9, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=8)
    save_llama(Llama(tiny), tmp_path / "tiny")
    told = rows(shown(capsys, tmp_path / "tiny"))
    assert told["family"] == "a LLaMA, of no published shape"
    assert told["tokenizer"].startswith("none: ")


def test_table_is_the_sequence_that_the_model_gets(tmp_path, capsys):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    words = ("embedded", "What color is it?", "--image", tmp_path / "red.png")
    head, *lines = shown(capsys, *words).splitlines()
    assert head.split() == ["position", "id", "text", "image", "patch", "label"]
    model = load_extension("embedded")
    prompt = model.prompts.build(
        [user_message("What color is it?", [tmp_path / "red.png"])], add_generation_prompt=True
    )
    assert [int(line.split()[1]) for line in lines] == prompt.ids
    assert [int(line.split()[0]) for line in lines] == list(range(len(prompt.ids)))
    assert all(line.split()[-1] == "." for line in lines)
    start = prompt.ids.index(model.visual.start)
    assert "[VIS_START]" in lines[start] and "1: CLS" in lines[start + 1] and "1: 0 (0, 0)" in lines[start + 2]
    assert "1: 63 (7, 7)" in lines[start + 65] and "[VIS_END]" in lines[start + 66]
    assert "<|assistant|>" in lines[-1]


def test_question_may_stand_behind_the_picture(tmp_path, capsys):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    picture = ("--image", tmp_path / "red.png")
    assert shown(capsys, "embedded", *picture, "What?") == shown(capsys, "embedded", "What?", *picture)
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "embedded", *map(str, picture), "What?", "else"])
    assert "unrecognized arguments: What? else" in capsys.readouterr().err


def test_answer_shows_the_labels_of_training(capsys):
    _, *lines = shown(capsys, "embedded", "What is it?", "--answer", "a red circle").splitlines()
    model = load_extension("embedded")
    messages = [user_message("What is it?", []), {"role": "assistant", "content": "a red circle"}]
    labels = ["." if label == IGNORE else str(label) for label in model.prompts.build(messages).labels]
    assert [line.split()[-1] for line in lines] == labels
    assert sum(label != "." for label in labels) == 4  # three words and the end


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["embedded", "--image", "x.png"], "needs a question"),
        (["embedded", "--template", "alpaca"], "needs a question"),
        (["embedded", "What?", "--image", "x.png"], "x.png"),
        (["embedded", "What?", "--template", "llama3"], "which template 'llama3' needs"),
        (["embedded", "What? <image>"], "1 image slot but 0 images were given"),
    ],
)
def test_mistake_is_one_line_with_status_2(words, message, capsys):
    assert main(["inspect", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_nothing_of_a_large_decoder_is_read(tmp_path, capsys, monkeypatch):
    tiny = LlamaConfig(vocab_size=9, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=8)
    save_llama(Llama(tiny), tmp_path)
    monkeypatch.setattr("visplice.lm.checkpoint.Checkpoint.read", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
    assert rows(shown(capsys, tmp_path))["parameters"] == f"{tiny.num_parameters:,}"
