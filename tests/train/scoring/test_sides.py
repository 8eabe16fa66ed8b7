"""What a side of a comparison is read from, and mistakes in it."""

import json
from pathlib import Path

import pytest

from visplice.train.scoring.sides import read_side


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "scores.jsonl"
    file.write_text('{"question_id": 1, "score": 0.6}\n\n{"question_id": "b", "score": 1, "answer": "x"}\n')
    return file


def test_folder_and_file_give_the_same_scores(lines: Path) -> None:
    assert read_side(str(lines)).scores == read_side(str(lines.parent)).scores == {1: 0.6, "b": 1.0}


@pytest.mark.parametrize("field", ["questionId", "image_id", "id"])
def test_every_name_of_an_id_is_known(field: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_text(json.dumps({field: 7, "score": 0.5}))
    assert read_side(str(tmp_path / "s")).scores == {7: 0.5}


def test_submission_is_scored_by_its_metric(tmp_path: Path) -> None:
    rows = [{"questionId": q, "question": "?", "answers": ["ab"]} for q in (1, 2)]
    (tmp_path / "annotations.json").write_text(json.dumps({"dataset_name": "docvqa", "data": rows}))
    answers = [{"questionId": q, "answer": answer} for q, answer in ((2, "ax"), (1, "AB"))]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    path = str(tmp_path / "answers.json")
    side = read_side(path, metric="docvqa", annotations=str(tmp_path / "annotations.json"))
    assert (side.scores, side.measure) == ({1: 1.0, 2: 0.5}, "ANLS")
    assert side.files.keys() == {"predictions", "annotations"}
    with pytest.raises(ValueError, match="a submission; give --metric and --annotations"):
        read_side(path, metric="docvqa")


def test_captions_are_compared_picture_by_picture(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    texts = {1: ["a red ring on black", "the ring is red"], 2: ["a blue square", "one large blue square on white"]}
    rows = [{"image_id": image, "caption": text} for image, own in texts.items() for text in own]
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": rows}))
    written = [{"image_id": 1, "caption": "a red ring on black"}, {"image_id": 2, "caption": "a green dot"}]
    (tmp_path / "captions.json").write_text(json.dumps(written))
    files = [str(tmp_path / f"{name}.json") for name in ("captions", "annotations")]
    side = read_side(files[0], metric="captions", annotations=files[1])
    assert side.measure == "CIDEr-D" and side.scores[1] > 1 > side.scores[2]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "there is no line in it"),
        ("{", "line 1: this is no JSON"),
        ('{"question_id": 1, "score": 1}\n7', "line 2: field 'score' is missing"),
        ('{"question_id": 1}', "line 1: field 'score' is missing"),
        ('{"question_id": 1, "score": "1"}', "line 1: field 'score' is '1', expected a number"),
        ('{"question_id": 1, "score": true}', "line 1: field 'score' is True, expected a number"),
        ('{"question_id": 1, "score": NaN}', "line 1: field 'score' is nan, expected a number"),
        ('{"number": 1, "score": 1}', "line 1: the id is None"),
        ('{"id": 1, "score": 1}\n{"id": 1, "score": 0}', "1 ids come twice or more: 1"),
    ],
)
def test_mistakes_are_named(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(content)
    with pytest.raises(ValueError) as error:
        read_side(str(tmp_path / "s.jsonl"))
    assert named in str(error.value)


def test_folder_without_scores_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no scores\.jsonl in this folder"):
        read_side(str(tmp_path))
