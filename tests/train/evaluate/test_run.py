"""A run over a benchmark: the answers of one question at a time, however it is cut up, and what a report says."""

import json
import re
import shutil

import pytest

from visplice.lm.vision_llama import VisionLlama
from visplice.train.evaluate import answering, run
from visplice.train.evaluate.journal import Journal
from visplice.train.evaluate.run import evaluate
from visplice.train.scene_data import QUESTIONS_FILE, image_name
from visplice.train.scoring.score import read_files, score


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def opened(model):
    """The model is opened once for all of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_extension", lambda *words, **options: model)
        yield


def test_answers_are_those_of_one_question_at_a_time(config, scenes, model, tmp_path):
    evaluate(config(max_new_tokens=8))
    questions = json.loads((scenes / QUESTIONS_FILE).read_text())["questions"]
    rows = lines(tmp_path / "out/predictions.jsonl")
    assert [row["question_id"] for row in rows] == [question["question_id"] for question in questions]
    for row, question in zip(rows, questions, strict=True):
        picture = scenes / "images" / image_name(question["image_id"])
        alone = model.generate([picture], [question["question"]], max_new_tokens=8)[0]
        assert (row["answer"], row["image"]) == (alone.strip(), picture.name)
    submission = json.loads((tmp_path / "out/submission.json").read_text())
    assert submission == [{"question_id": row["question_id"], "answer": row["answer"]} for row in rows]


def test_every_batch_size_and_an_interruption_end_in_the_same_file(config, tmp_path, monkeypatch):
    found = set()
    for size in (1, 8, 32, 500):
        out = tmp_path / f"out-{size}"
        evaluate(config(out=str(out), batch_size=size))
        found.add((out / "predictions.jsonl").read_bytes())
    out, add = tmp_path / "stopped", Journal.add
    for stop in range(5):
        left = [stop + 1]

        def once(journal, rows, left=left):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            add(journal, rows)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", once)
            with pytest.raises(KeyboardInterrupt):
                evaluate(config(out=str(out), batch_size=4))
    assert 0 < len(lines(out / "answers-0.jsonl")) < 60
    evaluate(config(out=str(out), batch_size=4))
    found.add((out / "predictions.jsonl").read_bytes())
    assert len(found) == 1


def test_a_finished_run_is_reported_again_without_the_model(config, monkeypatch):
    first = evaluate(config())
    monkeypatch.setattr(VisionLlama, "features", lambda *words: pytest.fail("a picture was encoded"))
    assert evaluate(config())["score"]["score"] == first["score"]["score"]


def test_every_picture_is_encoded_once(config, monkeypatch):
    counts, features = [], VisionLlama.features
    monkeypatch.setattr(VisionLlama, "features", lambda self, x: counts.append(len(x)) or features(self, x))
    told = evaluate(config(blind=("shuffled",)))
    assert sum(counts) == told["num_pictures"] == 24
    assert told["num_questions"] > 48


def test_controls_show_that_the_picture_is_used(config, tmp_path):
    told = evaluate(config(blind=("blank", "shuffled")))
    assert told["score"]["score"] > 0.85
    assert all(control["score"] < 0.5 for control in told["controls"].values())
    assert told["vision"]["used"] and told["vision"]["interval"][0] > 0.3
    assert "the picture is used: it is worth " in told["vision"]["verdict"]
    shown = lines(tmp_path / "out/blind-shuffled/predictions.jsonl")
    assert all(row["shown"] != row["image"] for row in shown)


def test_a_model_that_does_not_look_is_found_out(config, monkeypatch):
    plan = answering.plan  # every question gets another picture than its own, in the run itself too

    def swapped(questions, shown, share):
        other = answering.other_pictures(list(dict.fromkeys(question.image for question in questions)), 7)
        return plan(questions, shown or other, share)

    monkeypatch.setattr(answering, "plan", swapped)
    told = evaluate(config(blind=("shuffled",)))
    assert not told["vision"]["used"]
    assert "no sign that the picture is used" in told["vision"]["verdict"]


def test_the_report_equals_the_score_of_its_files(config, scenes, tmp_path):
    told = evaluate(config())
    out = tmp_path / "out"
    files = read_files(str(out / "submission.json"), config().annotations)
    scored = score("vqav2", "official", files)
    assert told["score"]["score"] == scored.value
    assert lines(out / "scores.jsonl") == [
        {"question_id": name, "score": value} for name, value in zip(scored.ids, scored.scores, strict=True)
    ]
    page = (out / "report.html").read_text()
    assert f"{100 * scored.value:.2f} %" in page
    assert len(re.findall("<img src='data:image/jpeg;base64,", page)) == 24
    assert json.loads((out / "report.json").read_text())["run"]["prompt"] == "{question}"


def test_questions_cannot_write_into_the_report(config, scenes, tmp_path):
    content = json.loads((scenes / QUESTIONS_FILE).read_text())
    content["questions"] = content["questions"][:4]
    content["questions"][0]["question"] = "<script>alert(1)</script>"
    (tmp_path / "q.json").write_text(json.dumps(content))
    evaluate(config(questions=str(tmp_path / "q.json"), annotations=None))
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "nothing is scored" in page


@pytest.fixture
def broken(scenes, tmp_path):
    """The pictures, one of which is cut off."""
    shutil.copytree(scenes / "images", tmp_path / "images")
    file = tmp_path / "images" / image_name(5)
    whole = file.read_bytes()
    file.write_bytes(whole[:300])
    return file, whole


def test_a_broken_picture_costs_its_questions_until_it_is_mended(config, broken, tmp_path, capsys):
    file, whole = broken
    images = str(tmp_path / "images")
    with pytest.raises(ValueError, match=r"\d of \d+ questions have no answer: 5000, .*; \d+ are kept"):
        evaluate(config(images=images))
    assert f"picture left out: {file.name}: " in capsys.readouterr().out
    file.write_bytes(whole)
    evaluate(config(images=images))
    evaluate(config(out=str(tmp_path / "straight")))
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == (tmp_path / "straight/predictions.jsonl").read_bytes()


def test_a_bad_picture_can_be_answered_with_nothing(config, broken, tmp_path):
    broken[0].unlink()
    images = str(tmp_path / "images")
    with pytest.raises(ValueError, match=f"1 of 24 pictures are not there: '{broken[0].name}'"):
        evaluate(config(images=images))
    told = evaluate(config(images=images, skip_bad_images=True))
    assert told["num_without_picture"] == told["num_empty"] == 3


def test_another_prompt_does_not_mix_with_answers_that_are_there(config):
    evaluate(config())
    with pytest.raises(ValueError, match=r"prompt was '{question}' and is 'Q: {question}' now; give another --out"):
        evaluate(config(prompt="Q: {question}"))


def small(folder, name, value):
    file = folder / f"{name}.json"
    file.write_text(json.dumps(value))
    return str(file)


def test_the_other_benchmarks_are_answered_and_scored_in_their_layouts(config, scenes, tmp_path, monkeypatch):
    names = [image_name(number) for number in range(3)]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, name in enumerate(names):
        shutil.copy(scenes / "images" / name, pictures / name)
        shutil.copy(scenes / "images" / name, pictures / f"id{number}.jpg")
    ask = "How many shapes are there?"
    files = {
        "docvqa": {
            "dataset_name": "docvqa",
            "data": [
                {"questionId": number, "question": ask, "image": name, "answers": ["3"]}
                for number, name in enumerate(names)
            ],
        },
        "textvqa": {
            "data": [{"question_id": n, "question": ask, "image_id": f"id{n}", "answers": ["3"] * 10} for n in range(3)]
        },
        "textcaps": {"data": [{"image_id": f"id{n}", "caption_str": "a big red ring"} for n in (0, 0, 1, 2)]},
        "coco": {
            "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
            "annotations": [{"image_id": n, "caption": "a small green star", "id": n} for n in range(3)],
        },
    }
    expected = {
        "docvqa": ("questionId", "answer", "ANLS"),
        "textvqa": ("question_id", "answer", "VQA accuracy"),
        "textcaps": ("image_id", "caption", "CIDEr-D"),
        "coco": ("image_id", "caption", "CIDEr-D"),
    }
    for task, content in files.items():
        out = tmp_path / f"out-{task}"
        told = evaluate(
            config(
                task=task,
                questions=small(tmp_path, task, content),
                annotations=None,
                images=str(pictures),
                out=str(out),
                max_new_tokens=6,
            )
        )
        identity, field, measure = expected[task]
        submission = json.loads((out / "submission.json").read_text())
        assert len(submission) == 3 and all(set(row) == {identity, field} for row in submission)
        assert told["score"]["measure"] == measure
        assert "right: " in (out / "report.html").read_text()
