"""The file of multiple-choice questions, and what is made of the likelihoods of their choices."""

import json
from pathlib import Path
from typing import Any

import pytest

from visplice.train.scoring.choice import choice_report, picked, question_lines, read_questions

GOOD = {"question": "What color?", "choices": ["red", "blue"], "answer": 1}


def file_of(folder: Path, *rows: Any) -> str:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_lines_are_read_with_their_number_as_id_where_they_have_none(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").touch()
    path = file_of(tmp_path, GOOD, "", GOOD | {"id": "x", "image": "a.png"})
    first, second = read_questions(path, str(tmp_path / "pictures")).questions
    assert (first.id, first.choices, first.answer, first.image) == (1, ("red", "blue"), 1, None)
    assert (second.id, second.line, second.image) == ("x", 3, str(tmp_path / "pictures/a.png"))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("{", "this is no JSON"),
        ([1], "found list, expected an object"),
        ({"choices": ["a", "b"], "answer": 0}, "field 'question' is missing"),
        ({"question": "?", "answer": 0}, "field 'choices' is missing"),
        ({"question": "?", "choices": ["a", "b"]}, "field 'answer' is missing"),
        (GOOD | {"question": " "}, "field 'question' is ' ', expected text"),
        (GOOD | {"choices": ["a"]}, "field 'choices' is a list of 1, expected a list of two texts or more"),
        (GOOD | {"choices": "ab"}, "field 'choices' is 'ab'"),
        (GOOD | {"choices": ["a", ""]}, "field 'choices[1]' is '', expected text"),
        (GOOD | {"choices": [None, "b"]}, "field 'choices[0]' is None, expected text"),
        (GOOD | {"answer": 2}, "field 'answer' is 2, expected an index from 0 to 1"),
        (GOOD | {"answer": -1}, "field 'answer' is -1"),
        (GOOD | {"answer": "blue"}, "field 'answer' is 'blue'"),
        (GOOD | {"answer": True}, "field 'answer' is True"),
        (GOOD | {"image": "none.png"}, "none.png: there is no such file"),
        (GOOD | {"image": 3}, "field 'image' is 3, expected the path of a picture"),
        (GOOD | {"id": 1.5}, "field 'id' is 1.5"),
        (GOOD | {"id": 1}, "field 'id' is 1 as in line 1"),
        (GOOD | {"query": "?"}, "field 'query' is unknown"),
    ],
)
def test_mistake_is_named_with_its_line(row: Any, named: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, GOOD, row)
    with pytest.raises(ValueError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}: line 2: ") and named in str(error.value)


def test_file_without_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no line in it"):
        read_questions(file_of(tmp_path, ""))


def test_scores_written_out_by_hand(tmp_path: Path) -> None:
    """Likeliest in all, per character and per byte: the three measures pick three choices."""
    row = {"question": "?", "choices": ["ab", "abcd", "éàüö"], "answer": 1}
    file = read_questions(file_of(tmp_path, row, GOOD | {"answer": 0}))
    values = [[-4.0, -4.4, -5.0], [-1.0, -2.0]]
    question = file.questions[0]
    assert [picked(question, values[0], name) for name in ("acc", "acc_norm", "acc_bytes")] == [0, 1, 2]
    told = choice_report(file, values, seed=0, settings={"prompt": "raw"})
    assert (told["acc"], told["acc_norm"], told["acc_bytes"]) == (0.5, 1.0, 0.5)
    assert told["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert told["acc_interval"] == [0.0, 1.0] and told["num_questions"] == 2
    first, second = map(json.loads, question_lines(file, values).splitlines())
    assert (first["id"], first["score"], first["acc_norm"], first["acc_bytes"]) == (1, 0.0, 1.0, 0.0)
    assert (second["score"], second["chosen"], second["log_probabilities"]) == (1.0, 0, [-1.0, -2.0])


def test_first_of_equally_likely_choices_is_picked(tmp_path: Path) -> None:
    (question,) = read_questions(file_of(tmp_path, GOOD)).questions
    assert picked(question, [-1.0, -1.0], "acc") == 0
