"""The two sides of a comparison: the score of each question, from whichever file holds it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visplice.train.scoring.files import JsonFile, repeated, some
from visplice.train.scoring.score import read_files, score

SCORES_FILE = "scores.jsonl"  # in the folder of an evaluation
_ID_FIELDS = ("question_id", "questionId", "image_id", "id")


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one side scored."""

    path: str  # as given
    scores: dict[int | str, float]  # by question
    files: dict[str, JsonFile]  # what they were read from
    measure: str | None = None  # what the scores are, where they were computed here


def read_side(path: str, *, metric: str | None = None, annotations: str | None = None) -> Side:
    """Reads the folder of an evaluation, lines of `visplice score --per-question`, or a submission.

    Args:
        path: a folder with `scores.jsonl`, a file of lines `{"question_id": ..., "score": ...}`, or a submission in the
            official layout, a JSON list.
        metric, annotations: how a submission is scored, by the official rule; of lines they say nothing.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is laid out in another way, an id comes twice, or a submission comes without a metric.
    """
    file = Path(path) / SCORES_FILE if Path(path).is_dir() else Path(path)
    if Path(path).is_dir() and not file.is_file():
        raise ValueError(
            f"{path}: there is no {SCORES_FILE} in this folder; expected that of an evaluation, a file of lines or a "
            "submission"
        )
    content = file.read_bytes()
    if not content.lstrip().startswith(b"["):
        source = JsonFile(path=str(file), sha256=hashlib.sha256(content).hexdigest(), value=None)
        return Side(path=path, scores=_read_lines(content, str(file)), files={"scores": source})
    if metric is None or annotations is None:
        raise ValueError(
            f"{path}: a JSON list, so a submission; give --metric and --annotations to score it, or lines as "
            "visplice score --per-question writes them"
        )
    files = read_files(str(file), annotations)
    scored = score(metric, "official", files)
    if scored.score is not None and not math.isclose(scored.score, sum(scored.scores) / len(scored.scores)):
        raise ValueError(f"{metric}: the score is no mean over questions, so that two cannot be compared by question")
    _refuse_repeated(scored.ids, str(file))
    return Side(
        path=path,
        scores=dict(zip(scored.ids, scored.scores, strict=True)),
        files=files,
        measure=scored.measure,
    )


def _read_lines(content: bytes, path: str) -> dict[int | str, float]:
    pairs: list[tuple[int | str, float]] = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            pairs.append(_read_line(line, f"{path}: line {number}"))
    if not pairs:
        raise ValueError(f"{path}: there is no line in it, expected one a question")
    _refuse_repeated([name for name, _ in pairs], path)
    return dict(pairs)


def _read_line(line: bytes, where: str) -> tuple[int | str, float]:
    expected = 'expected an object such as {"question_id": 1, "score": 0.6}'
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: this is no JSON ({error}), {expected}") from error
    if not isinstance(row, Mapping) or "score" not in row:
        raise ValueError(f"{where}: field 'score' is missing, {expected}")
    value = row["score"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: field 'score' is {value!r}, expected a number")
    name = next((row[field] for field in _ID_FIELDS if field in row), None)
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise ValueError(f"{where}: the id is {name!r}; expected a number or text as one of {', '.join(_ID_FIELDS)}")
    return name, float(value)


def _refuse_repeated(names: Iterable[int | str], path: str) -> None:
    if twice := repeated(names):
        raise ValueError(f"{path}: {len(twice)} ids come twice or more: {some(twice)}; expected each question once")
