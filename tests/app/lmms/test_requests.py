"""Requests of lmms-eval, against the model's own `generate` and `forward`; lmms-eval is not needed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from visplice.app.lmms.requests import (
    chat_messages,
    generate_until,
    loglikelihood,
    read_decoding,
    simple_messages,
)
from visplice.lm.generate import Sampling
from visplice.lm.prompt import IGNORE
from visplice.lm.vision_llama import VisionLlama

ASSETS = Path(__file__).parents[3] / "app" / "assets"
QUESTIONS = (
    "What shape is red?",
    "How many shapes are there?",
    "Is there a blue circle in the picture, and if so where does it stand?",
    "What color is the square?",
    "Describe the picture.",
)
GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "do_sample": False, "until": ["\n\n"]}


@dataclass
class Instance:
    """As much of lmms-eval's as a model sees."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def model() -> VisionLlama:
    return VisionLlama.from_pretrained("embedded")


@pytest.fixture(scope="module")
def docs() -> dict[str, Any]:
    """Two tasks, whose documents have one picture, two, or none."""
    shown = [Image.open(ASSETS / f"example_{number}.png").convert("RGB") for number in (1, 2)]
    rows = [{"question": text, "pictures": shown[: number % 3]} for number, text in enumerate(QUESTIONS)]
    return {"a": {"test": rows}, "b": {"val": rows[::-1][:3]}}


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    return doc["pictures"]


def simple(docs: dict[str, Any], **options: Any) -> list[Instance]:
    return [
        Instance((doc["question"], GREEDY | options, visual, number, task, split))
        for task, splits in docs.items()
        for split, rows in splits.items()
        for number, doc in enumerate(rows)
    ]


def messages_of(doc: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [{"type": "image", "url": picture} for picture in doc["pictures"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]


def alone(model: VisionLlama, request: Instance, docs: dict[str, Any], **sampling: Any) -> str:
    number, task, split = request.args[3:]
    doc = docs[task][split][number]
    return model.generate([doc["pictures"]], [doc["question"]], **{"max_new_tokens": 12} | sampling)[0]


@pytest.fixture(scope="module")
def expected(model, docs) -> list[str]:
    """What is said to each of `simple(docs)` alone."""
    return [alone(model, request, docs) for request in simple(docs)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_over_two_tasks_answers_what_each_question_is_answered_alone(model, docs, expected, batch_size) -> None:
    requests = simple(docs)
    assert generate_until(model, requests, docs, chat=False, batch_size=batch_size, progress=False) == expected
    assert len(set(expected)) > 3


def test_chat_interface_answers_alike(model, docs, expected) -> None:
    chat = [Instance((r.args[0], messages_of, r.args[1], *r.args[3:])) for r in simple(docs)]
    assert generate_until(model, chat, docs, chat=True, batch_size=2, progress=False) == expected


def test_drawn_answers_do_not_depend_on_the_batch_and_repeats_are_drawn_anew(model, docs) -> None:
    wild = {"do_sample": True, "temperature": 5.0}
    requests = simple(docs, **wild)
    twice = [request for request in requests for _ in range(2)]
    answers = generate_until(model, twice, docs, chat=False, batch_size=4, seed=3, progress=False)
    for offset in (0, 1):
        sampling = {"temperature": 5.0, "seed": 3 + offset}
        assert answers[offset::2] == [alone(model, request, docs, **sampling) for request in requests]
    assert answers[0::2] != answers[1::2]


def test_answer_ends_before_the_first_stop_and_the_batch_goes_on(model, docs) -> None:
    requests = simple(docs, max_new_tokens=30)
    whole = [alone(model, request, docs, max_new_tokens=30) for request in requests]
    stops = [" a ", "red"]
    assert any(stop in text for stop in stops for text in whole)
    for request in requests:
        request.args[1]["until"] = stops
    cut = [text.split(" a ")[0].split("red")[0] for text in whole]
    assert generate_until(model, requests, docs, chat=False, batch_size=8, progress=False) == cut


def test_generation_stops_once_all_rows_met_a_stop(model, monkeypatch) -> None:
    steps = []
    taken = VisionLlama._steps

    def counted(*args: Any) -> Any:
        for step in taken(*args):
            steps.append(step)
            yield step

    monkeypatch.setattr(VisionLlama, "_steps", counted)
    talk = [[{"role": "user", "content": "Describe the picture."}]] * 2
    whole = model.answer(talk, Sampling(max_new_tokens=20))
    assert len(whole[0].split()) > 3
    first, taken_whole = whole[0].split()[0], len(steps)
    steps.clear()
    assert model.answer(talk, Sampling(max_new_tokens=20), until=[first]) == [whole[0].split(first)[0]] * 2
    assert len(steps) < taken_whole


@pytest.mark.parametrize(("batch_size", "mean"), [(1, False), (6, True)])
def test_loss_is_that_of_training_and_greedy_is_what_generate_says(model, docs, expected, batch_size, mean) -> None:
    choices = ("circle", "square", "a large blue triangle", "3")
    requests = [
        Instance((doc["question"], f" {choice}", visual, number, "a", "test"))
        for number, doc in enumerate(docs["a"]["test"])
        for choice in choices
    ]
    found = loglikelihood(model, requests, docs, batch_size=batch_size, mean=mean, progress=False)
    for request, (loss, greedy) in zip(requests, found, strict=True):
        doc = docs["a"]["test"][request.args[3]]
        parts = [*({"type": "image"} for _ in doc["pictures"]), {"type": "text", "text": doc["question"]}]
        said = request.args[1].strip()
        prompt = model.prompts.build([{"role": "user", "content": parts}, {"role": "assistant", "content": said}])
        with torch.inference_mode():
            logits = model(torch.tensor([prompt.ids]), model.pixels(doc["pictures"]))[0, :-1]
        labels = torch.tensor(prompt.labels[1:])
        reduction = "mean" if mean else "sum"
        right = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction=reduction)
        assert loss == pytest.approx(float(right), abs=2e-4)
        assert greedy == (expected[request.args[3]] == said)
    assert any(greedy for _, greedy in found) and not all(greedy for _, greedy in found)


def test_pictures_of_one_question_are_encoded_once_for_its_choices(model, docs, monkeypatch) -> None:
    seen = []
    features = VisionLlama.features
    monkeypatch.setattr(
        VisionLlama, "features", lambda self, pixels: seen.append(len(pixels)) or features(self, pixels)
    )
    requests = [Instance(("What?", choice, visual, 2, "a", "test")) for choice in ("red", "blue", "green")]
    loglikelihood(model, requests, docs, batch_size=3, progress=False)
    assert seen == [2]


def test_continuation_may_be_a_function_of_the_document(model, docs) -> None:
    [given] = loglikelihood(model, [Instance(("What?", "red", visual, 1, "a", "test"))], docs, progress=False)
    by_name = Instance(("What?", lambda doc: "red" if doc is docs["a"]["test"][1] else "no", visual, 1, "a", "test"))
    assert loglikelihood(model, [by_name], docs, progress=False) == [given]


def test_too_long_prompt_is_named_and_the_others_are_answered(model, docs, expected, capsys) -> None:
    requests = simple({"a": docs["a"]})
    requests[1] = Instance(("red " * 2000, *requests[1].args[1:]))
    answers = generate_until(model, requests, docs, chat=False, batch_size=8, progress=False)
    assert answers[1] == ""
    assert answers[2:] == expected[2:5]
    told = capsys.readouterr().err
    assert "task a, document 1: the prompt has" in told
    assert "1 requests did not fit" in told
    choice = Instance(("red " * 2000, " red", visual, 1, "a", "test"))
    fine = Instance(("What?", " red", visual, 1, "a", "test"))
    found = loglikelihood(model, [choice, fine], docs, batch_size=2, progress=False)
    assert found[0] == (float("inf"), False)
    assert found[1] == loglikelihood(model, [fine], docs, progress=False)[0]


def test_answer_may_be_longer_allowed_than_the_positions_hold(model, docs, expected, capsys) -> None:
    requests = simple({"a": docs["a"]}, max_new_tokens=100_000, until=[" "])
    answers = generate_until(model, requests, docs, chat=False, batch_size=8, progress=False)
    assert answers == [text.split(" ")[0] for text in expected[:5]]
    assert "5 requests allow longer answers than 1024 positions hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, Sampling(max_new_tokens=1024)),
        ({"max_new_tokens": 5, "temperature": 0, "top_p": 0.9, "do_sample": True}, Sampling(max_new_tokens=5)),
        ({"temperature": 0.7, "do_sample": False, "top_p": None}, Sampling(max_new_tokens=1024)),
        ({"temperature": 0.7, "top_p": 0.9}, Sampling(max_new_tokens=1024, temperature=0.7, top_p=0.9, seed=4)),
        ({"do_sample": True, "top_k": 3}, Sampling(max_new_tokens=1024, temperature=1.0, top_k=3, seed=4)),
        ({"temperature": 1, "seed": 9, "num_beams": 1}, Sampling(max_new_tokens=1024, temperature=1.0, seed=9)),
    ],
)
def test_generation_kwargs_are_read(options, sampling) -> None:
    assert read_decoding(options, 4).sampling == sampling


@pytest.mark.parametrize(
    ("until", "stops"),
    [
        (None, ()),
        ("\n", ("\n",)),
        (["\n\n"], ()),  # lmms-eval's own filler
        (["Q:", "\n\n", ""], ("Q:", "\n\n")),
    ],
)
def test_stops_are_read(until, stops) -> None:
    assert read_decoding({"until": until}, 0).until == stops


def test_beams_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_beams is 5, but visplice has no beam search"):
        read_decoding({"num_beams": 5}, 0)


def test_unread_generation_kwargs_are_named(model, docs, capsys) -> None:
    generate_until(model, simple(docs, image_aspect_ratio="pad")[:1], docs, chat=False)
    assert "generation_kwargs that were not read: image_aspect_ratio" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count", "parts"),
    [
        ("What?", 2, ["image", "image", "What?"]),
        ("A <image> and <image> B", 2, ["image", "image", "A ", " and ", " B"]),
        ("A <image> B", 2, ["image", "image", "A <image> B"]),
        ("What is <image>?", 0, ["What is <image>?"]),
    ],
)
def test_pictures_stand_at_their_marks_or_in_front(docs, text, count, parts) -> None:
    shown = docs["a"]["test"][2]["pictures"][:count]
    [message] = simple_messages(text, shown, "task a, document 0")
    [other] = chat_messages(messages_of({"pictures": shown, "question": text}), "task a, document 0")
    for content in (message["content"], other["content"]):
        kinds = [part["type"] if part["type"] == "image" else part["text"] for part in content]
        assert sorted(kinds) == sorted(parts)
        if kinds[0] != "A ":
            assert kinds == parts
        else:
            assert kinds == ["A ", "image", " and ", "image", " B"]


def test_task_without_pictures_and_system_message_is_read() -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    system, user = chat_messages(talk, "task a, document 0")
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == [{"type": "text", "text": "Hi"}]
    assert simple_messages("Hi", None, "") == [user]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["clip.mp4"],
            r"task a, document 7 shows the model video or sound \('clip.mp4'\); visplice sees pictures alone",
        ),
        ([{"array": [0.0], "sampling_rate": 16000}], r"shows the model dict; visplice sees pictures alone"),
        ([Path("gone.png")], r"task a, document 7: gone.png: there is no such file"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_task(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        simple_messages("What?", given, "task a, document 7")


def test_video_in_messages_is_refused() -> None:
    talk = [{"role": "user", "content": [{"type": "video", "url": "clip.mp4"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match=r"task a, document 7 shows the model video \('clip.mp4'\)"):
        chat_messages(talk, "task a, document 7")


def test_request_of_mutual_information_is_refused(model, docs) -> None:
    with pytest.raises(ValueError, match=r"2 arguments where 6 are due; the metric acc_mutual_info"):
        loglikelihood(model, [Instance(("", "red"))], docs, progress=False)


def test_message_that_the_template_cannot_hold_names_its_document(model, docs) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}]
    request = Instance(("Hi", lambda doc: talk, GREEDY, 1, "a", "test"))
    with pytest.raises(ValueError, match=r"task a, document 1: message 2 has role 'user' where 'assistant' is due"):
        generate_until(model, [request], docs, chat=True, progress=False)
