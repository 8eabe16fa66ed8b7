"""The slips on disk: WebDataset shards for training, the official DocVQA layout for testing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from visplice.train import scenes, slip_words, slips
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_json
from visplice.train.scene_data import begin_test, conversation, png, write_once

ANNOTATIONS_FILE = "val_v1.0.json"  # the split of DocVQA whose answers are public


def training_samples(count: int, seed: int, questions: int) -> Iterator[Sample]:
    """Pictures with a caption, and a conversation of several questions for stage 2."""
    for index in tqdm(range(count), desc="training slips", unit="slip", mininterval=1.0):
        rng = random.Random(f"{seed} train slip {index}")
        slip = slips.sample_slip(rng, scenes.TRAIN)
        turns = [(q.text, q.answer) for q in slip_words.ask(slip, rng, questions)]
        record = {"captions": [slip_words.caption(slip)], "conversations": conversation(turns)}
        yield Sample(key=f"slip{index:06d}", images=(("png", png(slips.render(slip, rng))),), record=record)


def write_training(folder: Path, *, count: int, seed: int, questions: int = 7) -> bool:
    """Writes the training shards unless they are there, whole and made the same way; says whether it wrote."""
    source = {"name": "slips", "split": scenes.TRAIN, "count": count, "seed": seed, "questions": questions}
    return write_once(training_samples(count, seed, questions), folder, source)


def image_name(index: int) -> str:
    return f"slip_{index:06d}"


def write_test(folder: Path, *, count: int, seed: int, questions: int = 4) -> bool:
    """Writes pictures and annotations as DocVQA does, unless they are there; says whether it wrote.

    Beside them `slips.json` says how they were made.
    """
    source = {"name": "slips", "split": scenes.TEST, "count": count, "seed": seed, "questions": questions}
    marker = folder / "slips.json"
    if not begin_test(marker, folder / "documents", source):
        return False
    data: list[dict[str, Any]] = []
    for index in tqdm(range(count), desc="test slips", unit="slip", mininterval=1.0):
        rng = random.Random(f"{seed} test slip {index}")
        slip = slips.sample_slip(rng, scenes.TEST)
        name = image_name(index)
        slips.render(slip, rng).save(folder / "documents" / f"{name}.png")
        for number, question in enumerate(slip_words.ask(slip, rng, questions)):
            data.append(
                {
                    "questionId": 1000 * index + number,
                    "question": question.text,
                    "question_types": [question.question_type],
                    "image": f"documents/{name}.png",
                    "docId": index,
                    "ucsf_document_id": name,
                    "ucsf_document_page_no": "0",
                    "answers": [question.answer],
                    "data_split": "val",
                }
            )
    head = {"dataset_name": "slips", "dataset_split": "val", "dataset_version": "1.0"}
    write_json(folder / ANNOTATIONS_FILE, {**head, "data": data})
    write_json(marker, {"source": source})
    return True
