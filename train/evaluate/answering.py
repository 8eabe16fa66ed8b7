"""One pass over the questions of a benchmark: which pictures a process takes, in what order, and what is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor
from tqdm import tqdm

from visplice.lm.prompt import IMAGE
from visplice.lm.shared_prefix import Asked, answer
from visplice.lm.vision_llama import VisionLlama
from visplice.train.evaluate.journal import ID, Journal
from visplice.train.evaluate.pictures import Pictures
from visplice.train.evaluate.tasks import QUESTION, Question
from visplice.vision.image import ImageError

PICTURE, BLANK, SHUFFLED = "picture", "blank", "shuffled"  # what the model is shown


@dataclass(frozen=True, kw_only=True)
class Work:
    """A picture with what is asked about it."""

    image: str
    shown: str  # the picture that the model gets to see
    questions: list[Question]


def message(prompt: str, question: str) -> dict[str, Any]:
    """The user's message for a prompt, in which `<image>` may say where the picture stands; else it comes first.

    Neither mark means anything inside the question itself.
    """
    pieces = prompt.split(IMAGE)
    if len(pieces) == 1:
        pieces = ["", *pieces]
    content: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image"})
        if text := piece.strip("\n").replace(QUESTION, question):
            content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}


def other_pictures(names: Sequence[str], seed: int) -> dict[str, str]:
    """For each picture another one, each once: a round in an order drawn by `seed`.

    Raises:
        ValueError: there is one picture alone.
    """
    if len(names) < 2:
        raise ValueError("--blind shuffled needs two pictures or more, found one; use --blind blank")
    drawn = sorted(names)
    Random(seed).shuffle(drawn)
    return dict(zip(drawn, [*drawn[1:], drawn[0]], strict=True))


def plan(questions: Sequence[Question], shown: Mapping[str, str], share: tuple[int, int]) -> list[Work]:
    """The pictures of one process with all their questions, those of a size beside each other.

    Args:
        shown: for a picture the one that is shown; itself where it is not in there.
        share: number of this process, and of how many.
    """
    by_picture: dict[str, list[Question]] = {}
    for question in questions:
        by_picture.setdefault(question.image, []).append(question)
    process, of = share
    work = [
        Work(image=name, shown=shown.get(name, name), questions=by_picture[name])
        for name in list(by_picture)[process::of]
    ]
    # Rows of a batch are as wide as the widest; the order of equals is that of the file.
    return sorted(work, key=lambda one: (len(one.questions), sum(len(question.text) for question in one.questions)))


def batches(work: Sequence[Work], size: int) -> Iterator[list[Work]]:
    """Pictures whose questions together are at most `size`, and one picture at least."""
    batch: list[Work] = []
    for one in work:
        if batch and sum(len(other.questions) for other in batch) + len(one.questions) > size:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def answer_all(
    model: VisionLlama,
    work: Sequence[Work],
    pictures: Pictures,
    journal: Journal,
    *,
    prompt: str,
    blank: bool,
    max_new_tokens: int,
    batch_size: int,
    progress: tqdm[Any],
) -> list[str]:
    """Answers what the journal does not have yet; returns what is wrong with pictures that could not be used."""
    done = journal.answered()
    left = [one for one in work if not all(question.id in done for question in one.questions)]
    progress.update(sum(len(one.questions) for one in work) - sum(len(one.questions) for one in left))
    nothing = pictures.blank() if blank else None
    seen = iter(()) if blank else pictures.features([one.shown for one in left])
    faults: list[str] = []
    for batch in batches(left, batch_size):
        usable: list[tuple[Work, Tensor]] = []
        for one in batch:
            features = nothing if nothing is not None else next(seen)
            if isinstance(features, ImageError):
                faults.append(f"{one.shown}: {features}")
            else:
                assert features is not None
                usable.append((one, features))
        if usable:
            asked = [
                Asked(
                    prompts=[
                        model.prompts.build([message(prompt, question.text)], add_generation_prompt=True).ids
                        for question in one.questions
                    ],
                    features=features[None],
                )
                for one, features in usable
            ]
            answers = answer(model, asked, max_new_tokens=max_new_tokens, at_once=batch_size)
            rows = [
                {
                    ID: question.id,
                    "image": one.image,
                    **({"shown": one.shown} if one.shown != one.image else {}),
                    "question": question.text,
                    "answer": model.tokenizer.decode(found.ids).strip(),
                    "num_tokens": len(found.ids),
                    "complete": found.complete,
                }
                for (one, _), own in zip(usable, answers, strict=True)
                for question, found in zip(one.questions, own, strict=True)
            ]
            journal.add(rows)
        progress.update(sum(len(one.questions) for one in batch))
    return faults


def empty_rows(work: Sequence[Work], done: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Lines for the questions of pictures that cannot be used, answered with nothing."""
    return [
        {
            ID: question.id,
            "image": one.image,
            "question": question.text,
            "answer": "",
            "num_tokens": 0,
            "complete": True,
            "no_picture": True,
        }
        for one in work
        for question in one.questions
        if question.id not in done
    ]


def folder_of(out: Path, shown: str) -> Path:
    """Where the answers lie that were given to that kind of picture."""
    return out if shown == PICTURE else out / f"blind-{shown}"
