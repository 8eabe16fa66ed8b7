"""`visplice eval`: answers to a benchmark, its controls, their scores and the report, in one folder.

run.json            what decides the answers; a folder with another one is refused
predictions.jsonl   a line for each question: id, picture, question, answer, tokens, whether it ended by itself
submission.json     the answers in the official layout
scores.jsonl        id and score of each question, as `visplice score --per-question` writes it
report.json         the score as `visplice score --json` tells it, the controls, and how it was made
report.html         the same for a person, with the worst and best examples
blind-*/            predictions, submission and scores of a control
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from visplice.lm.extension import EMBEDDED, load_extension, read_extension
from visplice.lm.fingerprint import fingerprint
from visplice.lm.vision_llama import VisionLlama
from visplice.train.evaluate import answering, processes
from visplice.train.evaluate.inputs import Inputs
from visplice.train.evaluate.journal import Journal, write_text
from visplice.train.evaluate.page import write_page
from visplice.train.evaluate.pictures import FeatureStore, Pictures
from visplice.train.evaluate.tasks import QUESTION, TASKS, Task
from visplice.train.evaluate.vision_use import vision_use
from visplice.train.scoring.files import JsonFile, some
from visplice.train.scoring.result import Scored, report, write_per_question
from visplice.train.scoring.score import score

BARE = QUESTION  # the prompt of models that were taught with questions alone
REPORT = "report.json"
SUBMISSION = "submission.json"
SCORES = "scores.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One run of a model over a benchmark."""

    task: str
    model: str  # extension or LLaVA folder, or 'embedded'
    questions: str
    images: str
    out: str
    annotations: str | None = None
    prompt: str | None = None  # None takes that of the task
    max_new_tokens: int | None = None
    blind: tuple[str, ...] = ()  # controls, beside the run itself
    seed: int = 0  # of the controls and the intervals
    batch_size: int = 32  # questions
    workers: int = 4  # threads that open pictures
    features: str | None = None  # folder in which features are kept
    skip_bad_images: bool = False
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    vision_tower: str | None = None
    model_base: str | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None:
            if TASKS[self.task].has_questions and QUESTION not in self.prompt:
                raise ValueError(f"--prompt is {self.prompt!r}; {QUESTION} says where the question stands in it")
            if self.prompt.count("<image>") > 1:
                raise ValueError(f"--prompt is {self.prompt!r}; it has more than one <image>, there is one picture")
            if not self.prompt.strip():
                raise ValueError("--prompt is empty")


def evaluate(config: EvalConfig) -> dict[str, Any] | None:
    """Runs a benchmark, or what an earlier run left of it; returns what `report.json` says, None in helper processes.

    Raises:
        ValueError: a file or picture cannot be used, or the folder holds answers of another run.
        OSError: the disk is full, for one; run again, it goes on where it stopped.
    """
    inputs = Inputs.read(
        TASKS[config.task],
        questions=config.questions,
        annotations=config.annotations,
        images=Path(config.images),
        skip_bad_images=config.skip_bad_images,
    )
    with processes.joined(torch.device(config.device)) as (place, device):
        model = load_extension(
            config.model,
            device=device,
            dtype=config.dtype,
            vision_tower=config.vision_tower,
            model_base=config.model_base,
        )
        run = _Run(config, inputs, model, place)
        for shown in (answering.PICTURE, *config.blind):
            run.answer(shown)
        return run.report() if place.first else None


class _Run:
    """The questions, the model, and this process's place among others."""

    def __init__(self, config: EvalConfig, inputs: Inputs, model: VisionLlama, place: processes.Place) -> None:
        self.config, self.inputs, self.model, self.place = config, inputs, model, place
        task = inputs.task
        self.prompt = default_prompt(task, config) if config.prompt is None else config.prompt
        self.max_new_tokens = config.max_new_tokens or task.max_new_tokens
        store = FeatureStore(Path(config.features), model) if config.features is not None else None
        encode_batch = max(1, min(config.batch_size, 64))
        self.pictures = Pictures(model, Path(config.images), workers=config.workers, batch=encode_batch, store=store)
        self.seconds: dict[str, float] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        if place.first:
            print(f"prompt: {self.prompt!r}, at most {self.max_new_tokens} tokens, greedy", flush=True)

    def settings(self, shown: str) -> dict[str, Any]:
        """What decides the answers."""
        model = self.model
        return {
            "task": self.inputs.task.name,
            "shown": shown,
            **({"seed": self.config.seed} if shown == answering.SHUFFLED else {}),
            "questions": {"name": Path(self.config.questions).name, "sha256": self.inputs.files["questions"].sha256},
            "prompt": self.prompt,
            "template": model.prompts.template.name,
            "decoding": {"greedy": True, "max_new_tokens": self.max_new_tokens},
            "model": {
                "encoder": model.encoder.config.to_dict() | {"weights": None},
                "fingerprints": {
                    "encoder": fingerprint(model.encoder.vit),
                    "projector": fingerprint(model.projector),
                    "lm": fingerprint(model.lm),
                },
            },
            "dtype": str(self.config.dtype).removeprefix("torch."),
        }

    def answer(self, shown: str) -> None:
        """Answers all questions under one kind of picture, and leaves the predictions in order."""
        questions, started = self.inputs.questions, time.perf_counter()
        names = self.inputs.pictures
        swapped = answering.other_pictures(names, self.config.seed) if shown == answering.SHUFFLED else {}
        folder = answering.folder_of(Path(self.config.out), shown)
        if self.place.first:  # the others find its settings there
            Journal(folder, self.settings(shown))
        self.place.wait()
        journal = Journal(folder, self.settings(shown), process=self.place.number)
        if not journal.finished:
            self._answer(shown, journal, swapped)
        self.place.wait()
        if self.place.first:
            ids, answered = [question.id for question in questions], journal.answered()
            if lacking := [name for name in ids if name not in answered]:
                raise ValueError(
                    f"{folder}: {len(lacking)} of {len(ids)} questions have no answer: {some(lacking)}; "
                    f"{len(answered)} are kept; mend what was named above and run the same command again"
                )
            self.rows[shown] = journal.finish(ids)
            task = self.inputs.task
            submission = [
                {task.answered_id: row["question_id"], task.answer_field: row["answer"]} for row in self.rows[shown]
            ]
            write_text(folder / SUBMISSION, json.dumps(submission, ensure_ascii=False) + "\n")
        self.seconds[shown] = round(time.perf_counter() - started, 1)

    def _answer(self, shown: str, journal: Journal, swapped: dict[str, str]) -> None:
        config, place = self.config, self.place
        work = answering.plan(self.inputs.questions, swapped, (place.number, place.of))
        journal.begin()
        total = sum(len(one.questions) for one in work)
        of = f", process 1 of {place.of}" if place.of > 1 else ""
        label = "answering" if shown == answering.PICTURE else f"answering, {shown} pictures"
        with tqdm(
            total=total, desc=label + of, unit="question", mininterval=1.0, smoothing=0.05, disable=not place.first
        ) as progress:
            faults = answering.answer_all(
                self.model,
                work,
                self.pictures,
                journal,
                prompt=self.prompt,
                blank=shown == answering.BLANK,
                max_new_tokens=self.max_new_tokens,
                batch_size=config.batch_size,
                progress=progress,
            )
        for fault in faults[:20]:
            print(f"picture left out: {fault}", flush=True)
        if faults and config.skip_bad_images:
            journal.add(answering.empty_rows(work, journal.answered()))
        journal.close()

    # --- report ---

    def report(self) -> dict[str, Any]:
        """Scores what was answered and writes the report."""
        out = Path(self.config.out)
        rows = self.rows[answering.PICTURE]
        told: dict[str, Any] = {
            "run": self.settings(answering.PICTURE) | {"name": self.config.model},
            "num_questions": len(rows),
            "num_pictures": len(self.inputs.pictures),
            "num_cut_off": sum(not row["complete"] for row in rows),
            "num_empty": sum(not row["answer"] for row in rows),
            "num_without_picture": sum(bool(row.get("no_picture")) for row in rows),
        }
        scored = {shown: self._score(shown) for shown in self.rows}
        seeing = scored[answering.PICTURE]
        if seeing is not None:
            told["score"] = self._told(answering.PICTURE, seeing)
            blind = {shown: one for shown, one in scored.items() if shown != answering.PICTURE and one is not None}
            told["controls"] = {shown: self._told(shown, one) for shown, one in blind.items()}
            told["vision"] = vision_use(seeing, blind, seed=self.config.seed) if blind else None
        told["made"] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "device": _device_name(self.model.device),
            "processes": self.place.of,
            "batch_size": self.config.batch_size,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("visplice", "torch")},
        }
        write_text(out / REPORT, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        scores = dict(zip(seeing.ids, seeing.scores, strict=True)) if seeing is not None else None
        write_page(out / "report.html", told, rows, scores, self.inputs.references, Path(self.config.images))
        return told

    def _score(self, shown: str) -> Scored | None:
        if "annotations" not in self.inputs.files:
            return None
        files = self._files(shown)
        scored = score(self.inputs.task.metric, "official", files)
        write_per_question(scored, str(answering.folder_of(Path(self.config.out), shown) / SCORES), files)
        return scored

    def _files(self, shown: str) -> dict[str, JsonFile]:
        folder = answering.folder_of(Path(self.config.out), shown)
        files = {
            "predictions": JsonFile.read(str(folder / SUBMISSION)),
            "annotations": self.inputs.files["annotations"],
        }
        if self.inputs.task.has_questions:
            files["questions"] = self.inputs.files["questions"]
        return files

    def _told(self, shown: str, scored: Scored) -> dict[str, Any]:
        return report(self.inputs.task.metric, scored, self._files(shown), seed=self.config.seed)


def default_prompt(task: Task, config: EvalConfig) -> str:
    """The task's own, but for the shipped small LLaMA, which was taught with questions alone."""
    extension = read_extension(config.model, vision_tower=config.vision_tower, model_base=config.model_base)
    return BARE if extension.lm == EMBEDDED and task.has_questions else task.prompt


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
