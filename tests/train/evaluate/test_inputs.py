"""Files that do not belong together are refused before a model is opened."""

import json

import pytest

from visplice.train.evaluate import inputs
from visplice.train.evaluate.inputs import Inputs
from visplice.train.evaluate.tasks import TASKS
from visplice.train.scene_data import ANNOTATIONS_FILE, QUESTIONS_FILE


@pytest.fixture
def read(scenes, tmp_path):
    """Reads the scenes with their annotations changed."""

    def read(change):
        content = json.loads((scenes / ANNOTATIONS_FILE).read_text())
        change(content["annotations"])
        (tmp_path / "a.json").write_text(json.dumps(content))
        return Inputs.read(
            TASKS["vqav2"],
            questions=str(scenes / QUESTIONS_FILE),
            annotations=str(tmp_path / "a.json"),
            images=scenes / "images",
        )

    return read


def test_right_answers_come_with_the_questions(read):
    found = read(lambda rows: None)
    assert set(found.references) == {question.id for question in found.questions}
    assert len(found.pictures) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(0), r"1 of \d+ have no answer there \(\d+\), 0 of \d+ answers are to others \(\)"),
        (
            lambda rows: rows.append(rows[0] | {"question_id": 9}),
            r"0 of \d+ have .*, 1 of \d+ answers are to others \(9\)",
        ),
        (lambda rows: rows[3].pop("answer_type"), r"annotations\[3\]: field 'answer_type' is missing"),
        (lambda rows: rows[2].update(answers=["yes"]), r"annotations\[2\]: field 'answers\[0\]' is no object"),
    ],
)
def test_annotations_that_would_not_score_the_answers_are_refused_at_once(read, change, message):
    with pytest.raises(ValueError, match=message):
        read(change)


def test_captions_need_their_library_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    (tmp_path / "c.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]})
    )
    with pytest.raises(ValueError, match=r"pip install 'visplice\[captions\]'"):
        Inputs.read(TASKS["coco"], questions=str(tmp_path / "c.json"), annotations=None, images=tmp_path)
