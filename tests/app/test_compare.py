"""`visplice compare`: what is printed, and mistakes that end in one line."""

import json
from pathlib import Path

import pytest

from visplice.app.cli import main


@pytest.fixture
def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lines of 40 questions, of which the second side answers ten more."""
    monkeypatch.chdir(tmp_path)
    for name, num_right in (("a", 10), ("b", 20)):
        rows = [{"question_id": i, "score": float(i < num_right)} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/scores.jsonl").write_bytes((tmp_path / "b.jsonl").read_bytes())
    return tmp_path


def test_last_line_says_which_side_is_better(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a.jsonl", "run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("A: 0.2500, 95 % interval 0.") and said[0].endswith(", a.jsonl")
    assert "both 10, only A 0, only B 10, neither 20; McNemar's exact test p = 0.002" in said[4]
    assert said[-1].startswith("B is better than A (difference 25.0 points, 95 % interval 1")
    assert main(["compare", "a.jsonl", "a.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no difference can be told")


def test_json_holds_everything_and_the_seed_decides_it(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for seed in ("0", "0", "3"):
        assert main(["compare", "a.jsonl", "b.jsonl", "--json", "--seed", seed]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] != told[2]
    assert (told[0]["better"], told[0]["difference"], told[2]["bootstrap"]["seed"]) == ("b", 0.25, 3)
    assert told[0]["mcnemar"]["threshold"] == 0.5 and len(told[0]["a"]["files"]["scores"]["sha256"]) == 64
    assert told[0]["verdict"].startswith("B is better than A") and "numpy" in told[0]["versions"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["a.jsonl", "none.jsonl"], "none.jsonl"),
        (["a.jsonl", "."], "there is no scores.jsonl in this folder"),
        (["a.jsonl", "b.jsonl", "--annotations", "x.json"], "--metric and --annotations are for submissions"),
        (["a.jsonl", "list.json"], "give --metric and --annotations"),
        (["a.jsonl", "less.jsonl"], "less.jsonl lacks 39 of the 40 in a.jsonl: 1, 2, 3, 4, 5, ..."),
    ],
)
def test_mistakes_end_in_one_line(
    words: list[str], named: str, sides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sides / "list.json").write_text('[{"question_id": 1, "answer": "x"}]')
    (sides / "less.jsonl").write_text('{"question_id": 0, "score": 1}')
    assert main(["compare", *words]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("visplice: ") and named in said.err
