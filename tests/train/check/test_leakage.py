"""What of a test is in the training data: pictures by bytes, by sight and by name, and their answers."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from visplice.app.cli import main
from visplice.train.check.check import HeldOut, check
from visplice.train.check.leakage import LEAKS, picture_names, published_test, things_said
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_shards


def picture(seed, *, size=(64, 48), **options):
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC).resize(size).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def sample(key, data, *turns, **record):
    if turns:
        record["conversations"] = [
            {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)
        ]
    return Sample(key=key, images=(("jpg", data),), record=record)


def written(folder, samples, **source):
    write_shards(samples, folder, source=source or {"kind": "by hand"})
    return folder


def leaks(report):
    return {
        name: [at["key"] for at in report["problems"][name]["found"]] for name in LEAKS if name in report["problems"]
    }


# --- against a data set ----------------------------------------------------------------------------------------------


def test_pictures_and_answers_of_a_test_are_found(tmp_path):
    test = written(
        tmp_path / "test",
        [
            sample("t1", picture(1), "<image>\nWhat color is the ball?", "red"),
            sample("t2", picture(2), "<image>\nHow many dogs are there?", "two"),
            sample("t3", picture(3), "<image>\nIs it raining?", "yes"),
            sample("t4", picture(4), captions=["A man on a horse."]),
        ],
    )
    training = written(
        tmp_path / "training",
        [
            sample("other", picture(50), "<image>\nWhat color is the ball?", "red"),  # the same pair, another picture
            sample("same", picture(1), "<image>\nWhere is the ball?", "left"),
            sample("same and said", picture(1), "<image>\nWhat color is the ball ?", "Red."),
            sample("near", picture(2, quality=60, size=(120, 90)), "<image>\nWhat is this?", "dogs"),
            sample("near and said", picture(2, size=(128, 96)), "How many dogs are there?\n<image>", "2"),
            sample("other answer", picture(3), "<image>\nIs it raining?", "no"),
            sample("caption", picture(4), captions=["a MAN on a horse", "something else"]),
            sample("clean", picture(60), captions=["A man on a horse."]),
        ],
    )
    report = check(training, against=HeldOut(paths=[test]))
    assert leaks(report) == {
        "leaked-picture": ["same", "same and said", "other answer", "caption"],
        "leaked-near-picture": ["near", "near and said"],
        "leaked-answer": ["same and said", "near and said", "caption"],
    }
    found = report["problems"]["leaked-answer"]["found"][0]
    assert found["message"] == f"1 of the answers or captions of {test}/shard-000000.tar: t1"
    assert report["test"] == {"pictures": 4} and not report["clean"]
    # What training has seen twice is no leak, and what is not compared is not found.
    assert leaks(check(training)) == {}
    assert "leaked-near-picture" not in leaks(check(training, against=HeldOut(paths=[test]), max_distance=None))


def test_every_answer_of_a_test_counts_as_right(tmp_path):
    questions = [{"question_id": 1, "question": "What is it?", "answers": ["ball", "sphere", "round thing"]}]
    test = written(tmp_path / "test", [sample("t", picture(1), "<image>\nWhat is it?", "ball", questions=questions)])
    training = [
        sample(f"k{n}", picture(1), "<image>\nWhat is it?", a) for n, a in enumerate(["sphere", "cube", "Ball"])
    ]
    report = check(written(tmp_path / "training", training), against=HeldOut(paths=[test]))
    assert leaks(report)["leaked-answer"] == ["k0", "k2"]
    # The other way round, training has not seen the answers that were not chosen.
    swapped = check(test, against=HeldOut(paths=[tmp_path / "training"]))
    assert leaks(swapped)["leaked-answer"] == ["t"]


def test_demands_for_short_answers_do_not_hide_a_question(tmp_path):
    test = written(tmp_path / "test", [sample("t", picture(1), "<image>\nWhat is it?", "ball")])
    asked = [
        "<image>\nWhat is it?\nAnswer the question using a single word or phrase.",
        "What is it? Answer the question using a single word or phrase.\n<image>",
        "<image>\nWHAT is it",
        "<image>\nWhat is it?\nIn a word!",
    ]
    training = [sample(f"k{n}", picture(1), text, "ball") for n, text in enumerate(asked)]
    folder = written(tmp_path / "training", training)
    assert leaks(check(folder, against=HeldOut(paths=[test])))["leaked-answer"] == ["k0", "k1", "k2"]
    suffix = {"kind": "vqav2", "options": {"suffix": "\nIn a word!"}}
    folder = written(tmp_path / "training", training, **suffix)  # what convert appended is known
    assert leaks(check(folder, against=HeldOut(paths=[test])))["leaked-answer"] == ["k0", "k1", "k2", "k3"]


def test_flat_pictures_leak_by_bytes_alone(tmp_path):
    def flat(level):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), (level, level, level)).save(buffer, "PNG")
        return buffer.getvalue()

    test = written(tmp_path / "test", [Sample(key="t", images=(("png", flat(200)),), record={"captions": ["grey"]})])
    training = [Sample(key=f"k{n}", images=(("png", flat(n)),), record={"captions": ["grey"]}) for n in (200, 201)]
    assert leaks(check(written(tmp_path / "training", training), against=HeldOut(paths=[test]))) == {
        "leaked-picture": ["k200"],
        "leaked-answer": ["k200"],
    }


# --- names of pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "kind", "names"),
    [
        ({"id": "33471"}, "vqav2", ("coco 33471",)),
        ({"id": "33471"}, "coco-captions", ("coco 33471",)),
        ({"id": "33471"}, "llava", ()),  # a number that everybody gives
        ({"id": "33471"}, "", ()),
        ({"id": 33471}, "vqav2", ()),
        ({"files": ["COCO_val2014_000000033471.jpg"]}, "llava", ("coco 33471",)),
        ({"files": ["coco/train2017/000000033471.jpg"]}, "llava", ("coco 33471",)),
        ({"files": ["000000033471.jpg"]}, "llava", ()),
        ({"files": ["images/000000033471.jpg"]}, "pairs", ()),
        ({"files": ["textvqa/train_images/a9e2f1d0c3b48576.jpg"]}, "llava", ("openimages a9e2f1d0c3b48576",)),
        ({"id": "a9e2f1d0c3b48576"}, "textvqa", ("openimages a9e2f1d0c3b48576",)),
        ({"id": "documents/xnbl0037_1.png"}, "docvqa", ("docvqa documents/xnbl0037_1.png",)),
        ({"url": "https://Host.org/a.jpg?utm_source=x"}, "pairs", ("url host.org/a.jpg",)),
        (
            {"url": "http://images.cocodataset.org/val2017/000000033471.jpg"},
            "coco-captions",
            ("coco 33471", "url images.cocodataset.org/val2017/000000033471.jpg"),
        ),
        ({"url": "data:image/png;base64,AAAA"}, "pairs", ()),
        ({"url": ["x"], "files": "000000033471.jpg"}, "", ()),
        ({"files": [None, {"a": 1}]}, "", ()),
    ],
)
def test_names_that_mean_the_same_everywhere(record, kind, names):
    assert picture_names(record, kind) == names


def test_pictures_are_found_by_name_when_their_bytes_are_others(tmp_path):
    test = written(
        tmp_path / "test",
        [
            sample("t1", picture(1), "<image>\nWhat is it?", "ball", id="9"),
            sample("t2", picture(2), "<image>\nWhat is it?", "dog", id="10", url="http://x.org/dog.jpg"),
        ],
        kind="vqav2",
    )
    training = [
        sample("coco", picture(11), captions=["x"], files=["coco/train2017/000000000009.jpg"]),
        sample("coco said", picture(12), "<image>\nWhat is it?", "ball", files=["COCO_train2014_000000000009.jpg"]),
        sample("url", picture(13), captions=["x"], url="https://x.org/dog.jpg#big"),
        sample("number", picture(14), captions=["x"], id="9", files=["000000009.jpg"]),
    ]
    assert leaks(check(written(tmp_path / "training", training, kind="llava"), against=HeldOut(paths=[test]))) == {
        "leaked-name": ["coco", "coco said", "url"],
        "leaked-answer": ["coco said"],
    }


# --- against published files -----------------------------------------------------------------------------------------


def vqav2(folder):
    """A test set of three questions about two pictures, as VQAv2 is published."""
    questions = [
        {"image_id": 9, "question": "What is it?", "question_id": 90},
        {"image_id": 9, "question": "What color is it?", "question_id": 91},
        {"image_id": 10, "question": "Is it a dog?", "question_id": 100},
    ]
    answers = {90: ["ball", "sphere"], 91: ["red"] * 2, 100: ["yes", "no"]}
    annotations = [
        {
            "question_id": question["question_id"],
            "image_id": question["image_id"],
            "multiple_choice_answer": answers[question["question_id"]][0],
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": number}
                for number, text in enumerate(answers[question["question_id"]], 1)
            ],
        }
        for question in questions
    ]
    (folder / "questions.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return folder / "questions.json", folder / "annotations.json"


def test_published_questions_are_a_test_without_its_pictures(tmp_path, capsys):
    questions, annotations = vqav2(tmp_path)
    training = [
        sample("k1", picture(1), "<image>\nWhat is it?", "sphere", "What color is it?", "red", id="9"),
        sample("k2", picture(2), "<image>\nIs it a dog?", "perhaps", id="10"),
        sample("k3", picture(3), "<image>\nWhat is it?", "sphere", id="11"),
    ]
    folder = written(tmp_path / "training", training, kind="vqav2")
    words = ["--workers", "1", "--against-questions", str(questions), "--against-annotations", str(annotations)]
    assert main(["data", "check", str(folder), *words]) == 1
    out = capsys.readouterr().out
    assert "compared with 2 test pictures" in out
    assert "2 leaked-name" in out and "1 leaked-answer" in out
    assert "shard-000000.tar: k1: 2 of the answers or captions of questions.json: coco 9" in out
    without = check(folder, against=HeldOut(questions=questions))  # answers are not known
    assert leaks(without) == {"leaked-name": ["k1", "k2"]}


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ({"image_id": "a9e2f1d0c3b48576", "question_id": 1}, "openimages a9e2f1d0c3b48576"),
        ({"image": "documents/x.png", "questionId": 1}, "docvqa documents/x.png"),
    ],
)
def test_files_that_hold_their_answers_need_no_other(tmp_path, item, name):
    (tmp_path / "q.json").write_text(json.dumps({"data": [{**item, "question": "What?", "answers": ["A.", "b"]}]}))
    (facts,) = published_test(tmp_path / "q.json", None)
    talk = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a"}]
    assert facts.names == (name,) and len(facts.said) == 2
    for text in ("a", "A", "B."):  # articles are answers, too, where nothing else is
        talk[1]["value"] = text
        assert things_said({"conversations": talk}) <= facts.said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no list of objects under 'questions' or 'data'"),
        ('{"questions": [1]}', "no list of objects"),
        ("{", "not JSON"),
        ("", "is empty"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        published_test(tmp_path / "q.json", None)


def test_annotations_of_another_split_are_refused(tmp_path):
    questions, annotations = vqav2(tmp_path)
    annotations.write_text(json.dumps({"annotations": [{"question_id": 7, "answers": []}]}))
    with pytest.raises(ValueError, match="no question in common; are they of the same split"):
        published_test(questions, annotations)


def test_nonsense_in_published_files_is_passed_over(tmp_path):
    items = [
        {"image_id": None, "question": "What?", "question_id": 1, "answers": ["a"]},
        {"image_id": [9], "question": "What?", "question_id": [1]},
        {"image_id": 9, "question": ["What?"], "question_id": 2, "answers": ["red"]},
        {"image_id": 9, "question": "What?", "question_id": 4, "answers": "red"},
        {"image_id": 9, "question": "What?", "question_id": 3, "answers": [None, {"answer": 3}, {"answer": "red"}, ""]},
    ]
    (tmp_path / "q.json").write_text(json.dumps({"questions": items}))
    (facts,) = published_test(tmp_path / "q.json", None)
    assert facts.names == ("coco 9",) and len(facts.said) == 1


def test_empty_test_is_an_error(tmp_path):
    (tmp_path / "q.json").write_text('{"questions": []}')
    training = written(tmp_path / "training", [sample("k", picture(1), captions=["x"])])
    with pytest.raises(ValueError, match="no usable sample"):
        check(training, against=HeldOut(questions=tmp_path / "q.json"))
