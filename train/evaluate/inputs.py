"""The files of a run, read and held against each other before a model is opened: a wrong one must not cost a night."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from visplice.train.evaluate.tasks import Question, Task, has_answers, missing_pictures, read_questions
from visplice.train.scoring.files import JsonFile, field, some
from visplice.train.scoring.score import score


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a benchmark consists of."""

    task: Task
    files: dict[str, JsonFile]  # "questions", and "annotations" where there are any
    questions: list[Question]
    references: dict[int | str, list[str]]  # the right answers of each question, empty without annotations

    @property
    def pictures(self) -> list[str]:
        """Names of the distinct pictures, in the order of the questions."""
        return list(dict.fromkeys(question.image for question in self.questions))

    @classmethod
    def read(
        cls, task: Task, *, questions: str, annotations: str | None, images: Path, skip_bad_images: bool = False
    ) -> Inputs:
        """Reads them; without `annotations`, the file of questions is taken where it holds the answers too.

        Raises:
            ValueError: a file is laid out in another way, both are of different questions, pictures are missing, or
                what scores is not installed.
            OSError: a file cannot be read.
        """
        files = {"questions": JsonFile.read(questions)}
        asked = read_questions(task, files["questions"], images)
        if annotations is not None:
            files["annotations"] = JsonFile.read(annotations)
        elif has_answers(task, files["questions"]):
            files["annotations"] = files["questions"]
        references = _read_references(task, files["annotations"], asked) if "annotations" in files else {}
        inputs = cls(task=task, files=files, questions=asked, references=references)
        gone = missing_pictures(asked, images)
        if gone and not skip_bad_images:
            raise ValueError(
                f"--images {images}: {len(gone)} of {len(inputs.pictures)} pictures are not there: {some(gone)}; give "
                "the right folder, or --skip-bad-images to answer their questions with ''"
            )
        return inputs


def _read_references(task: Task, file: JsonFile, asked: Sequence[Question]) -> dict[int | str, list[str]]:
    """The right answers, from annotations that will do to score the answers to these questions."""
    if task.metric == "captions":
        if find_spec("pycocoevalcap") is None:
            raise ValueError("captions are scored by pycocoevalcap, which is missing: pip install 'visplice[captions]'")
        found = _captions(file)
    else:
        # Whatever the rule will refuse at the end, it refuses of empty answers now.
        found = _answers(task, file)
        empty = [{task.answered_id: name, task.answer_field: ""} for name in found]
        score(task.metric, "official", {"annotations": file, "predictions": _in_memory(file.path, empty)})
    names = {question.id for question in asked}
    lacking, beyond = [name for name in names if name not in found], [name for name in found if name not in names]
    if lacking or beyond:
        raise ValueError(
            f"--annotations {file.path} is not of the questions that are asked: {len(lacking)} of {len(names)} have no "
            f"answer there ({some(lacking)}), {len(beyond)} of {len(found)} answers are to others ({some(beyond)})"
        )
    return found


def _answers(task: Task, file: JsonFile) -> dict[int | str, list[str]]:
    key = "annotations" if task.name in ("vqav2", "okvqa") else "data"
    found: dict[int | str, list[str]] = {}
    for index, row in enumerate(file.rows(key)):
        where = f"{key}[{index}]"
        name = field(file, row, task.answered_id, "a whole number", where=where)
        answers = field(file, row, "answers", "a list", where=where)
        found[name] = [answer.get("answer", "") if isinstance(answer, dict) else answer for answer in answers]
    return found


def _captions(file: JsonFile) -> dict[int | str, list[str]]:
    """Of COCO's layout, or TextCaps'."""
    in_coco = isinstance(file.value, dict) and "annotations" in file.value
    key, text = ("annotations", "caption") if in_coco else ("data", "caption_str")
    found: dict[int | str, list[str]] = {}
    for index, row in enumerate(file.rows(key)):
        where = f"{key}[{index}]"
        name = field(file, row, "image_id", "a whole number or text", where=where)
        found.setdefault(name, []).append(field(file, row, text, "text", where=where))
    return found


def _in_memory(path: str, value: object) -> JsonFile:
    return JsonFile(path=path, sha256="", value=value)
