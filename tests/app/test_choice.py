"""`visplice choice`: text as it stands, through the template, and with pictures."""

import json
import random

import pytest
import torch

from tests.lm import llava_models
from visplice.app.cli import main
from visplice.lm.extension import EMBEDDED, embedded_folder, load_extension
from visplice.lm.vision_llama import user_message
from visplice.train.scenes import render, sample_scene

LM = str(embedded_folder("lm"))
SHAPES = ["circle", "square"]
ROWS = [
    {
        "id": "a",
        "question": "a red ring. What color is the ring?",
        "choices": ["red", "blue", "dark green"],
        "answer": 0,
    },
    {"id": "b", "question": "a large blue square. What shape is large? ", "choices": SHAPES, "answer": 1},
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Prints of a run over rows as an object, and the lines it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *words):
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        capsys.readouterr()
        command = ["choice", "--questions", "q.jsonl", "--device", "cpu", "--json", "--out", "out.jsonl", *words]
        assert main(command) == 0
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        return json.loads(capsys.readouterr().out), lines

    return run


@torch.no_grad()
def by_hand(lm, prefix, ids):
    """One choice in a row of its own; `prefix` as embeddings `[S, D]`."""
    embeddings = torch.cat([prefix, lm.tok_embeddings(torch.tensor(ids))])
    logits = lm.logits(lm.hidden(embeddings[None]))[0].double().log_softmax(-1)
    return sum(float(logits[len(prefix) + i - 1, token]) for i, token in enumerate(ids))


def test_raw_text_is_scored_as_it_stands(run):
    model = load_extension(EMBEDDED)
    told, lines = run(ROWS)
    for row, line in zip(ROWS, lines, strict=True):
        context = model.tokenizer.encode(row["question"].rstrip())
        prefix = model.lm.tok_embeddings(torch.tensor([model.tokenizer.bos_id, *context])).detach()
        between = row["question"][len(row["question"].rstrip()) :] + " "
        for choice, found in zip(row["choices"], line["log_probabilities"], strict=True):
            whole = model.tokenizer.encode(row["question"].rstrip() + between + choice)
            assert found == pytest.approx(by_hand(model.lm, prefix, whole[len(context) :]), rel=1e-4)
    assert told["prompt"] == "raw text, behind the begin token"
    assert told["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2) and told["num_with_picture"] == 0
    assert run(ROWS, "--model", LM)[1] == lines  # a decoder alone


@torch.no_grad()
def test_picture_goes_through_the_template(run, tmp_path):
    rng, rows = random.Random(0), []
    for number in range(3):
        render(sample_scene(rng, "test"), rng).save(tmp_path / f"{number}.png")
        colors = ["red", "green", "blue", "yellow"]
        rows.append({"question": "What color is it?", "choices": colors, "answer": 0, "image": f"{number}.png"})
    model = load_extension(EMBEDDED)
    told, lines = run([*rows, ROWS[0]])
    for row, line in zip(rows, lines, strict=False):
        message = user_message(row["question"], [str(tmp_path / row["image"])])
        prompt = model.prompts.build([message], add_generation_prompt=True)
        features = model.features(model.pixels([str(tmp_path / row["image"])]))
        prefix = model.embed(torch.tensor([prompt.ids]), features)[0]
        expected = [by_hand(model.lm, prefix, model.tokenizer.encode(choice)) for choice in row["choices"]]
        assert line["log_probabilities"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert told["num_with_picture"] == 3
    assert told["prompt"] == "raw text, behind the begin token; with a picture template 'turns'"
    assert lines[0]["log_probabilities"] != lines[1]["log_probabilities"]  # pictures are seen


@torch.no_grad()
def test_choices_of_a_llava_are_as_likely_as_in_transformers(run, tmp_path):
    from transformers import LlavaForConditionalGeneration

    folder, image = tmp_path / "llava", str(tmp_path / "p.png")
    folder.mkdir()
    llava_models.write_hf(folder)
    llava_models.picture(40, 30).save(image)
    row = {"question": "what is it?", "choices": ["red", "a large blue square"], "answer": 0, "image": "p.png"}
    _, (line,) = run([row], "--model", str(folder))
    theirs = LlavaForConditionalGeneration.from_pretrained(folder).float().eval()
    ours = load_extension(folder)
    prompt = ours.prompts.build([user_message(row["question"], [image])], add_generation_prompt=True)
    ids = [theirs.config.image_token_index if token == ours.visual.patch else token for token in prompt.ids]
    for choice, found in zip(row["choices"], line["log_probabilities"], strict=True):
        own = ours.tokenizer.encode(choice)
        inputs = {"input_ids": torch.tensor([ids + own]), "pixel_values": ours.pixels([image])}
        logits = theirs(**inputs).logits[0].double().log_softmax(-1)
        expected = sum(float(logits[len(ids) + i - 1, token]) for i, token in enumerate(own))
        assert found == pytest.approx(expected, rel=1e-5)


def test_chat_puts_text_through_the_template(run):
    raw, chat = run(ROWS), run(ROWS, "--chat")
    assert chat[0]["prompt"] == "template 'turns'" and chat[0]["acc"] == 1
    assert chat[1] == run(ROWS, "--chat", "--model", LM)[1] != raw[1]


def test_written_lines_are_a_side_of_compare(run, tmp_path, capsys):
    run(ROWS)
    assert main(["compare", "out.jsonl", "out.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no difference can be told")


@pytest.mark.parametrize(
    ("row", "words", "named"),
    [
        ({"choices": ["red"]}, (), "q.jsonl: line 1: field 'choices' is a list of 1"),
        ({"answer": 3}, (), "q.jsonl: line 1: field 'answer' is 3"),
        ({"image": "no.png"}, (), "line 1: field 'image': no.png: there is no such file"),
        ({"image": "q.jsonl"}, ("--model", LM), "is a LLaMA alone, but there are questions with a picture"),
        ({"image": "q.jsonl"}, (), "q.jsonl: line 1: q.jsonl is not an image in a known format"),
        ({"question": "red ring " * 900}, (), "line 1: the prompt has"),
        (
            {"question": "what is <image>?"},
            ("--chat",),
            "line 1: the question has 1 image slot but 0 images were given",
        ),
        ({}, ("--out", "./q.jsonl"), "is the file of --questions"),
        ({}, ("--out", "none/x.jsonl"), "there is no folder none"),
    ],
)
def test_mistakes_end_in_one_line(row, words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS[0] | row))
    status = main(["choice", "--questions", "q.jsonl", "--device", "cpu", *words])
    said = capsys.readouterr()
    assert (status, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith("visplice: ") and named in said.err
