"""`visplice perplexity`: the shipped model, a decoder alone, and adapters that change it."""

import json
import math

import pytest
import torch

from visplice.app.cli import main
from visplice.lm.extension import EMBEDDED, embedded_folder, load_extension, save_extension
from visplice.lm.tuned import LM, LM_LORA
from visplice.projector.lora import LoraConfig, adapters, add_lora
from visplice.vision._torchvision import declare_missing_operators

TEXTS = ["a small red ring at the top, background black. What color is the ring? red", "a large blue square", ""]
SHIPPED = str(embedded_folder("lm"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": one, "id": 1}) + "\n" for one in TEXTS))
    return str(file)


@pytest.fixture
def told(capsys):
    def run(*words, status=0):
        capsys.readouterr()
        assert main(["perplexity", "--device", "cpu", "--json", *words]) == status
        return json.loads(capsys.readouterr().out)

    return run


@torch.no_grad()
def test_perplexity_of_the_shipped_decoder_is_transformers(text, told):
    declare_missing_operators()  # transformers imports torchvision
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    theirs = LlamaForCausalLM.from_pretrained(SHIPPED).float().eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{SHIPPED}/tokenizer.json")
    total, count = 0.0, 0
    for one in TEXTS[:2]:
        ids = torch.tensor([[tokenizer.convert_tokens_to_ids("<|begin|>"), *tokenizer(one)["input_ids"]]])
        num = ids.shape[1] - 1
        total, count = total + float(theirs(ids, labels=ids).loss) * num, count + num
    found = told("--model", SHIPPED, "--text", text)
    assert (found["num_tokens"], found["num_documents"], found["begin_token"]) == (count, 3, "<|begin|>")
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    num_bytes = sum(len(one.encode()) for one in TEXTS)
    assert found["num_bytes"] == num_bytes
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert "without_extension" not in found


def test_extension_changes_no_bit_and_says_so(text, told, capsys):
    found = told("--text", text)
    assert (found["num_different_logits"], found["trained_of_decoder"]) == (0, [])
    assert (
        found["perplexity"]
        == found["without_extension"]["perplexity"]
        == told("--model", SHIPPED, "--text", text)["perplexity"]
    )
    assert main(["perplexity", "--device", "cpu", "--text", text, "--window", "9", "--stride", "4"]) == 0
    said = capsys.readouterr().out
    assert f"with and without the extension: bit-identical logits on {found['num_tokens']} tokens\n" in said
    assert "windows of up to 9 tokens, 4 apart: past the first window of a document, at least 5 tokens" in said
    assert "a document begins with <|begin|>, which is not predicted" in said


def test_adapters_on_the_decoder_are_named_with_both_perplexities(text, told, tmp_path, capsys):
    model = load_extension(EMBEDDED)
    torch.manual_seed(0)
    add_lora(model.lm, LoraConfig(rank=4, alpha=8.0, targets=("wq", "w2")))
    with torch.no_grad():
        for _, layer in adapters(model.lm):
            layer.lora_B.normal_(std=0.02)
    save_extension(model, tmp_path / "tuned", lm=EMBEDDED)
    found = told("--model", str(tmp_path / "tuned"), "--text", text)
    bare = told("--text", text)
    assert found["trained_of_decoder"] == [LM_LORA]
    assert found["num_different_logits"] == found["num_tokens"]
    assert found["without_extension"]["perplexity"] == bare["perplexity"] != found["perplexity"]
    assert main(["perplexity", "--device", "cpu", "--model", str(tmp_path / "tuned"), "--text", text]) == 0
    assert (
        f"perplexity {found['perplexity']:.4f} and {bare['perplexity']:.4f}, logits differ on"
        in capsys.readouterr().out
    )


def test_decoder_trained_in_full_is_compared_with_the_one_it_began_as(text, told, tmp_path):
    model = load_extension(EMBEDDED)
    with torch.no_grad():
        model.lm.output.weight.requires_grad_(True)[7] += 0.5
    model.lm.fingerprint = None  # its weights are others now
    save_extension(model, tmp_path / "tuned", lm=EMBEDDED)
    found = told("--model", str(tmp_path / "tuned"), "--text", text)
    assert found["trained_of_decoder"] == [LM] and found["num_different_logits"] == found["num_tokens"]
    assert found["without_extension"]["perplexity"] == told("--text", text)["perplexity"] != found["perplexity"]


def test_a_frozen_decoder_that_is_not_the_same_ends_with_status_1(text, told, monkeypatch):
    import visplice.lm.extension as extension

    load = extension.load_extension

    def broken(*args, **options):
        model = load(*args, **options)
        with torch.no_grad():
            model.lm.norm.weight[0] *= 1.001
        return model

    monkeypatch.setattr(extension, "load_extension", broken)
    found = told("--text", text, status=1)
    assert 0 < found["num_different_logits"] <= found["num_tokens"]


def test_plain_text_is_one_document(tmp_path, told):
    (tmp_path / "a.txt").write_text("a red ring\n\na blue square\n")
    found = told("--model", SHIPPED, "--text", str(tmp_path / "a.txt"))
    assert (found["num_documents"], found["num_bytes"]) == (1, 26)


@pytest.mark.parametrize(
    ("name", "content", "words", "named"),
    [
        ("a.txt", b"\xff\xfe", (), "a.txt: this is no text in UTF-8"),
        ("a.txt", b"", (), "a.txt: there is no text in it"),
        ("a.jsonl", b'{"text": "x"}\n{"texts": "x"}', (), "a.jsonl: line 2: field 'text' is missing"),
        ("a.jsonl", b'{"text"', (), "a.jsonl: line 1: this is no JSON"),
        ("a.txt", b"red ring", ("--window", "8", "--stride", "8"), "--stride is 8 and --window 8"),
        ("a.txt", b"red ring", ("--window", "5000"), "--window is 5000, but the model has 1024 positions"),
        ("a.txt", b"red ring", ("--model", "nowhere"), "nowhere: no such folder, and not a name on the hub"),
        ("a.txt", b"red ring", ("--vision-tower", "x"), "--vision-tower and --model-base say nothing about it"),
    ],
)
def test_mistakes_end_in_one_line(name, content, words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert main(["perplexity", "--device", "cpu", "--text", name, *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("visplice: ") and said.err.count("\n") == 1
    assert named in said.err
