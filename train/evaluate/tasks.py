"""The benchmarks: their official question files, where their pictures lie, and what a submission looks like.

| task | questions | submission |
| --- | --- | --- |
| vqav2, okvqa | `{"questions": [{question_id, image_id, question}]}` | `[{question_id, answer}]` |
| textvqa | `{"data": [{question_id, image_id, question}]}` | `[{question_id, answer}]` |
| docvqa | `{"data": [{questionId, image, question}]}` | `[{questionId, answer}]` |
| textcaps | `{"data": [{image_id}]}`, a row for each caption where it has captions | `[{image_id, caption}]` |
| coco | `{"images": [{id, file_name}]}` | `[{image_id, caption}]` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from visplice.train.convert.sources import first_layout
from visplice.train.scoring.files import JsonFile, field, repeated, some

QUESTION = "{question}"  # where the question stands in a prompt
_SHORT_ANSWER = QUESTION + "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's, and lmms-eval's
_CAPTION = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark."""

    name: str
    metric: str  # what `visplice score` calls it
    prompt: str
    max_new_tokens: int
    rows: str  # key of the list in the file of questions
    id_field: str  # in that file
    answered_id: str  # the same in the submission
    answer_field: str
    image_field: str
    has_questions: bool = True
    answers_beside: str | None = None  # field of a row that holds its answers, where they come in the same file


_VQA = Task(
    name="vqav2",
    metric="vqav2",
    prompt=_SHORT_ANSWER,
    max_new_tokens=16,
    rows="questions",
    id_field="question_id",
    answered_id="question_id",
    answer_field="answer",
    image_field="image_id",
)
_CAPTIONS = replace(
    _VQA,
    metric="captions",
    prompt=_CAPTION,
    max_new_tokens=64,
    answered_id="image_id",
    answer_field="caption",
    has_questions=False,
)
TASKS = {
    task.name: task
    for task in (
        _VQA,
        replace(_VQA, name="okvqa", metric="okvqa"),
        replace(_VQA, name="textvqa", metric="textvqa", rows="data", answers_beside="answers"),
        replace(
            _VQA,
            name="docvqa",
            metric="docvqa",
            max_new_tokens=32,
            rows="data",
            id_field="questionId",
            answered_id="questionId",
            image_field="image",
            answers_beside="answers",
        ),
        replace(_CAPTIONS, name="textcaps", rows="data", id_field="image_id", answers_beside="caption_str"),
        replace(_CAPTIONS, name="coco", rows="images", id_field="id", image_field="file_name"),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One thing to answer."""

    id: int | str
    text: str  # empty where a caption is asked for
    image: str  # file name below the folder of pictures


def read_questions(task: Task, file: JsonFile, images: Path) -> list[Question]:
    """The questions in the order of the file, their pictures where they are found below `images`.

    Raises:
        ValueError: the file is laid out in another way, an id comes twice, a picture's name leads out of the folder, or
            there is no such folder.
    """
    if not images.is_dir():
        raise ValueError(f"--images {images}: {'a file, not' if images.exists() else 'there is no such'} folder")
    found: list[tuple[int | str, str, tuple[str, ...]]] = []
    subset = _picture_names(file.value) if task.name in ("vqav2", "okvqa") else ("", "")
    for index, row in enumerate(file.rows(task.rows)):
        where = f"{task.rows}[{index}]"
        kind = "a whole number" if task.has_questions else "a whole number or text"
        name = field(file, row, task.id_field, kind, where=where)
        text = field(file, row, "question", "text", where=where) if task.has_questions else ""
        found.append((name, text, _places(task, file, row, where, subset)))
    if not task.has_questions:  # TextCaps has a row for each caption of a picture
        found = list({name: one for one in reversed(found) for name in (one[0],)}.values())[::-1]
    if twice := repeated(name for name, _, _ in found):
        raise ValueError(f"{file.path}: {len(twice)} values of '{task.id_field}' come twice or more: {some(twice)}")
    layout = first_layout(images, (places for _, _, places in found))
    return [Question(id=name, text=text, image=places[layout]) for name, text, places in found]


def has_answers(task: Task, file: JsonFile) -> bool:
    """Whether the file of questions holds the answers too, as those of validation splits do."""
    if task.name == "coco":
        return isinstance(file.value, dict) and bool(file.value.get("annotations"))
    rows = file.rows(task.rows)
    return task.answers_beside is not None and all(row.get(task.answers_beside) for row in rows)


def missing_pictures(questions: Iterable[Question], images: Path) -> list[str]:
    """Names of pictures that are not there."""
    names = dict.fromkeys(question.image for question in questions)
    return [name for name in names if not (images / name).is_file()]


def _places(task: Task, file: JsonFile, row: Mapping[str, Any], where: str, subset: tuple[str, str]) -> tuple[str, ...]:
    """Where the picture of a row may be, below the folder of pictures; as many places for every row."""
    if task.name in ("vqav2", "okvqa"):
        number, (data, split) = field(file, row, "image_id", "a whole number", where=where), subset
        name = f"{data}_{split}_{number:012d}"
        plain = f"{number:012d}.jpg"  # as the releases of 2017 name them
        return f"{name}.jpg", f"{split}/{name}.jpg", plain, f"{split}/{plain}", f"{name}.png", f"{split}/{name}.png"
    if task.name in ("textvqa", "textcaps"):
        name = field(file, row, "image_id", "text", where=where)
        places = [f"{folder}{name}.jpg" for folder in ("", "train_images/", "test_images/")]
    else:
        name = field(file, row, task.image_field, "text", where=where)
        parts = name.split("_")
        split = parts[1] if task.name == "coco" and len(parts) == 3 else ""
        places = [name, f"{split}/{name}" if split else PurePosixPath(name).name]
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{file.path}: {where}: field '{task.image_field}' is {name!r}, which leads out of --images")
    return tuple(places)


def _picture_names(value: Any) -> tuple[str, str]:
    """What the names of the pictures of a VQA set begin with: COCO and the split, or what a set of one's own says."""
    named = value if isinstance(value, dict) else {}
    data, split = named.get("data_type", "mscoco"), named.get("data_subtype", "val2014")
    for text in (data, split):
        if not isinstance(text, str) or not re.fullmatch(r"[\w-]+", text):
            raise ValueError(f"data_type and data_subtype are {data!r} and {split!r}; expected one word each")
    return "COCO" if data == "mscoco" else data, split
