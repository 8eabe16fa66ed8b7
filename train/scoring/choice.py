"""Multiple-choice questions: the file, and the scores of lm-evaluation-harness (version 0.4).

acc        the choice whose tokens have the highest log-probability in all
acc_norm   the same, divided by the number of characters of the choice
acc_bytes  the same, divided by the number of bytes in UTF-8
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from visplice.train.scoring.bootstrap import CONFIDENCE, NUM_RESAMPLES, interval
from visplice.train.scoring.files import some
from visplice.train.scoring.result import mean

MEASURES: dict[str, Callable[[str], int]] = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode("utf-8", "surrogatepass")),
}
_FIELDS = {"id", "question", "choices", "answer", "image"}


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of the file."""

    line: int
    id: int | str
    question: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    image: str | None  # file of its picture


@dataclass(frozen=True, kw_only=True)
class QuestionFile:
    """The questions of a file."""

    path: str
    sha256: str
    questions: list[Question]


def read_questions(path: str, images: str | None = None) -> QuestionFile:
    """Reads lines of `{"id"?, "question", "choices": [text, ...], "answer": index, "image"?: file}`.

    Args:
        path: a file of JSON lines.
        images: the folder that pictures are named from; None is that of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: naming line and field, if a field is missing, unknown or wrong, or a picture is not there.
    """
    content = Path(path).read_bytes()
    folder = Path(path).parent if images is None else Path(images)
    questions: list[Question] = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            questions.append(_read_line(line, number, f"{path}: line {number}", folder))
    if not questions:
        raise ValueError(f"{path}: there is no line in it, expected one a question")
    first: dict[int | str, int] = {}
    for question in questions:
        if (before := first.setdefault(question.id, question.line)) != question.line:
            raise ValueError(f"{path}: line {question.line}: field 'id' is {question.id!r} as in line {before}")
    return QuestionFile(path=path, sha256=hashlib.sha256(content).hexdigest(), questions=questions)


def _read_line(line: bytes, number: int, where: str, folder: Path) -> Question:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: this is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, expected an object")
    if unknown := sorted(row.keys() - _FIELDS):
        raise ValueError(f"{where}: field {some(unknown)} is unknown; there is {', '.join(sorted(_FIELDS))}")
    for field in ("question", "choices", "answer"):
        if field not in row:
            raise ValueError(f"{where}: field '{field}' is missing")
    name, text, choices, answer, image = (row.get(field) for field in ("id", "question", "choices", "answer", "image"))
    if "id" not in row:
        name = number
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise ValueError(f"{where}: field 'id' is {name!r}, expected a whole number or text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: field 'question' is {text!r}, expected text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{where}: field 'choices' is {_shown(choices)}, expected a list of two texts or more")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{where}: field 'choices[{index}]' is {choice!r}, expected text")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: field 'answer' is {answer!r}, expected an index from 0 to {len(choices) - 1}")
    if image is not None:
        if not isinstance(image, str) or not image:
            raise ValueError(f"{where}: field 'image' is {image!r}, expected the path of a picture")
        image = str(folder / image)
        if not Path(image).is_file():
            raise ValueError(f"{where}: field 'image': {image}: there is no such file")
    return Question(line=number, id=name, question=text, choices=tuple(choices), answer=answer, image=image)


def _shown(choices: Any) -> str:
    return f"a list of {len(choices)}" if isinstance(choices, list) else repr(choices)


def picked(question: Question, log_probabilities: Sequence[float], measure: str) -> int:
    """The index of the choice that is likeliest by one of MEASURES, the first of several."""
    length = MEASURES[measure]
    scores = [value / length(choice) for value, choice in zip(log_probabilities, question.choices, strict=True)]
    return scores.index(max(scores))


def choice_report(
    file: QuestionFile, log_probabilities: Sequence[Sequence[float]], *, seed: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What `--json` prints.

    Args:
        log_probabilities: of each question's choices.
        settings: what else decides the scores.
    """
    told: dict[str, Any] = {**settings}
    for name in MEASURES:
        right = [
            float(picked(question, values, name) == question.answer)
            for question, values in zip(file.questions, log_probabilities, strict=True)
        ]
        told[name] = mean(right)
        told[f"{name}_interval"] = list(interval(right, seed))
    return told | {
        "chance": mean([1 / len(question.choices) for question in file.questions]),
        "num_questions": len(file.questions),
        "num_with_picture": sum(question.image is not None for question in file.questions),
        "bootstrap": {"confidence": CONFIDENCE, "resamples": NUM_RESAMPLES, "seed": seed},
        "questions": {"path": file.path, "sha256": file.sha256},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("visplice", "torch", "tokenizers", "numpy")},
    }


def choice_text(told: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [
        f"{name:10} {told[name]:.4f}, 95 % interval {told[f'{name}_interval'][0]:.4f} to "
        f"{told[f'{name}_interval'][1]:.4f}"
        for name in MEASURES
    ]
    lines.append(f"{'chance':10} {told['chance']:.4f}")
    num, pictured = told["num_questions"], told["num_with_picture"]
    lines.append(f"{num:,} question{'' if num == 1 else 's'}, {pictured:,} with a picture; {told['prompt']}")
    lines.append(f"questions: {told['questions']['path']}, sha256 {told['questions']['sha256']}")
    return "\n".join(lines)


def question_lines(file: QuestionFile, log_probabilities: Sequence[Sequence[float]]) -> str:
    """A line of JSON a question; `score` is that of `acc`, as `visplice compare` reads it."""
    lines = []
    for question, values in zip(file.questions, log_probabilities, strict=True):
        chosen = {name: picked(question, values, name) for name in MEASURES}
        row = {
            "id": question.id,
            "score": float(chosen["acc"] == question.answer),
            **{name: float(chosen[name] == question.answer) for name in MEASURES if name != "acc"},
            "answer": question.answer,
            "chosen": chosen["acc"],
            "log_probabilities": list(values),
        }
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)
