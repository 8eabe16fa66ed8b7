"""Answers to the questions of the two embedded test sets, and the controls that show what the picture is worth.

Benchmarks of any model are answered by `visplice.train.evaluate`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from visplice.lm.generate import Sampling, generate, pad_left
from visplice.lm.shared_prefix import Asked, answer
from visplice.lm.vision_llama import VisionLlama
from visplice.train import slip_data
from visplice.train.data.shards import read_samples
from visplice.train.scene_data import ANNOTATIONS_FILE, QUESTIONS_FILE, image_name
from visplice.train.scoring.docvqa import score_docvqa
from visplice.train.scoring.files import JsonFile
from visplice.train.scoring.result import Scored

SHORT = Sampling(max_new_tokens=12)  # an answer on a slip is at most ten signs, with a blank before and an end behind


class QuestionSet(Protocol):
    """Questions about pictures, each `{"image_id", "question_id", "question"}`."""

    @property
    def questions(self) -> list[dict[str, Any]]: ...

    @property
    def image_ids(self) -> list[int]: ...

    def image_path(self, image_id: int) -> Path: ...


@dataclass(frozen=True)
class VqaSet:
    """Questions and annotations in the official layout, and where the pictures lie."""

    folder: Path
    questions: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    notes: dict[str, dict[str, Any]]  # image id -> description in words, held_out

    @classmethod
    def read(cls, folder: Path) -> VqaSet:
        questions = json.loads((folder / QUESTIONS_FILE).read_text())["questions"]
        annotations = json.loads((folder / ANNOTATIONS_FILE).read_text())["annotations"]
        notes = json.loads((folder / "scenes.json").read_text())["scenes"]
        return cls(folder, questions, annotations, notes)

    @property
    def image_ids(self) -> list[int]:
        return list(dict.fromkeys(q["image_id"] for q in self.questions))

    def image_path(self, image_id: int) -> Path:
        return self.folder / "images" / image_name(image_id)


@dataclass(frozen=True)
class DocSet:
    """A folder in DocVQA's layout."""

    folder: Path
    annotations: dict[str, Any]  # the official file

    @classmethod
    def read(cls, folder: Path) -> DocSet:
        return cls(folder, json.loads((folder / slip_data.ANNOTATIONS_FILE).read_text()))

    @property
    def questions(self) -> list[dict[str, Any]]:
        return [
            {"image_id": row["docId"], "question_id": row["questionId"], "question": row["question"]}
            for row in self.annotations["data"]
        ]

    @property
    def image_ids(self) -> list[int]:
        return list(dict.fromkeys(row["docId"] for row in self.annotations["data"]))

    def image_path(self, image_id: int) -> Path:
        return self.folder / next(row["image"] for row in self.annotations["data"] if row["docId"] == image_id)

    def score(self, answers: Mapping[int, str]) -> Scored:
        """ANLS, as `visplice score docvqa` gives it."""
        said = [{"questionId": question_id, "answer": answer} for question_id, answer in answers.items()]
        return score_docvqa(_in_memory("annotations", self.annotations), _in_memory("predictions", said))


def _in_memory(path: str, value: Any) -> JsonFile:
    return JsonFile(path=path, sha256="", value=value)


@torch.inference_mode()
def encode_images(model: VisionLlama, paths: Iterable[Path], batch: int = 64) -> Tensor:
    """Frozen features `[M, N, d_vision]` of picture files."""
    paths = list(paths)
    parts = [model.features(model.pixels(paths[i : i + batch])) for i in range(0, len(paths), batch)]
    return torch.cat(parts)


def answer_with_images(
    model: VisionLlama, asked: QuestionSet, features: Tensor, *, batch: int = 16, desc: str = "answering"
) -> dict[int, str]:
    """Question id to answer; `features` `[M, N, d_vision]` as `asked.image_ids` has them, `batch` pictures at once."""
    by_image: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in asked.image_ids}
    for question in asked.questions:
        by_image[question["image_id"]].append(question)
    groups, answers = list(by_image.values()), dict[int, str]()
    with tqdm(total=len(asked.questions), desc=desc, unit="question", mininterval=1.0) as bar:
        for first in range(0, len(groups), batch):
            own = groups[first : first + batch]
            together = [
                Asked(
                    prompts=[_prompt(model, "<image>" + question["question"]).tolist() for question in group],
                    features=features[row : row + 1],
                )
                for row, group in enumerate(own, first)
            ]
            found = answer(model, together, max_new_tokens=SHORT.max_new_tokens)
            for group, said in zip(own, found, strict=True):
                texts = [model.tokenizer.decode(one.ids) for one in said]
                answers |= zip((question["question_id"] for question in group), texts, strict=True)
                bar.update(len(group))
    return answers


def blind_answers(
    model: VisionLlama, asked: QuestionSet, features: Tensor, shards: Sequence[Path]
) -> dict[str, dict[int, str]]:
    """By control, question id to answer: without the picture, with another one, or without the model."""
    side = model.encoder.config.image_size
    blank = model.features(torch.zeros(1, 3, side, side, device=model.device)).expand_as(features)
    return {
        "blank picture": answer_with_images(model, asked, blank, desc="blank picture"),
        "another picture": answer_with_images(model, asked, features.roll(1, 0), desc="another picture"),
        "most frequent answer": most_frequent_answers(shards, asked),
    }


def answer_with_words(model: VisionLlama, vqa: VqaSet, *, batch: int = 64) -> dict[int, str]:
    """Question id to answer of the decoder alone, the scene given in words where the picture would stand."""
    prompts = [_prompt(model, q["question"], vqa.notes[str(q["image_id"])]["description"]) for q in vqa.questions]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that little is padding
    desc = "reading the scene in words"
    with torch.inference_mode(), tqdm(total=len(prompts), desc=desc, unit="question", mininterval=1.0) as bar:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            embeddings, lengths = pad_left([model.lm.tok_embeddings(prompts[i]) for i in chosen])
            tokens: list[list[int]] = [[] for _ in chosen]
            for step in generate(model.lm, embeddings, lengths, SHORT, model.prompts.stop_ids):
                for row, token in zip(tokens, step, strict=True):
                    if token is not None:
                        row.append(token)
            for index, row in zip(chosen, tokens, strict=True):
                answers[index] = model.tokenizer.decode(row)
            bar.update(len(chosen))
    return {q["question_id"]: a for q, a in zip(vqa.questions, answers, strict=True)}


def answer_when_broken(model: VisionLlama, asked: QuestionSet, features: Tensor) -> dict[str, dict[int, str]]:
    """By what is broken, question id to answer: each picture's features are another's, or the projector says nothing.

    The model is as it was afterwards.
    """
    shuffled = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(1))]
    answers = {"features shuffled between pictures": answer_with_images(model, asked, shuffled, desc="shuffled")}
    state = {name: tensor.clone() for name, tensor in model.projector.state_dict().items()}
    with torch.no_grad():
        for parameter in model.projector.linear_2.parameters():
            parameter.zero_()
    answers["projector zeroed"] = answer_with_images(model, asked, features, desc="projector zeroed")
    model.projector.load_state_dict(state)
    return answers


def _prompt(model: VisionLlama, question: str, description: str | None = None) -> Tensor:
    content: Any = question
    if description is not None:
        content = [{"type": "text", "text": description}, {"type": "text", "text": question}]
    prompt = model.prompts.build([{"role": "user", "content": content}], add_generation_prompt=True)
    return torch.tensor(prompt.ids, device=model.device)


def most_frequent_answers(shards: Sequence[Path], asked: QuestionSet) -> dict[int, str]:
    """Question id to the answer that training gave most often to the same question text.

    A text that training never asked gets the overall most frequent answer.
    """
    counts: dict[str, Counter[str]] = {}
    for sample in read_samples(shards):
        turns = sample.record["conversations"]
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            text = human["value"].replace("<image>", "").strip()
            counts.setdefault(text, Counter())[gpt["value"]] += 1
    overall = sum(counts.values(), Counter()).most_common(1)[0][0]
    return {
        q["question_id"]: counts[q["question"]].most_common(1)[0][0] if q["question"] in counts else overall
        for q in asked.questions
    }
