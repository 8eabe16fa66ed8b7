"""The embedded task on disk: WebDataset shards for training, the official VQAv2 layout for testing."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from visplice.train import scene_words, scenes
from visplice.train.data.record import SCHEMA, Sample
from visplice.train.data.shards import read_manifest, write_json, write_shards

QUESTIONS_FILE = "v2_OpenEnded_scenes_test_questions.json"
ANNOTATIONS_FILE = "v2_scenes_test_annotations.json"
# Numbers and backgrounds take a projector longest to learn, so training asks for them more often than testing does.
TRAINING_KINDS = (*scene_words.QUESTION_TYPES, "count", "background")
NUM_ANSWERS = 10  # VQAv2 asks ten people; here all ten know the scene


def png(image: Image.Image) -> bytes:
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def conversation(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers about a picture as LLaVA writes them."""
    written = []
    for number, (question, answer) in enumerate(turns):
        mark = "<image>\n" if number == 0 else ""
        written.append({"from": "human", "value": mark + question})
        written.append({"from": "gpt", "value": answer})
    return written


def training_samples(count: int, seed: int, questions: int) -> Iterator[Sample]:
    """Pictures with a caption for stage 1 and a conversation of several questions for stage 2."""
    for index in tqdm(range(count), desc="training scenes", unit="scene", mininterval=1.0):
        rng = random.Random(f"{seed} train {index}")
        scene = scenes.sample_scene(rng, scenes.TRAIN)
        turns = [(q.text, q.answer) for q in scene_words.ask(scene, rng, questions, TRAINING_KINDS)]
        kind = rng.random()
        if kind < 0.2:
            longer = (rng.choice(scene_words.DESCRIBE), scene_words.caption(scene))
            turns[rng.randrange(len(turns))] = (
                longer if kind < 0.1 else (scene_words.TELL, scene_words.facts(scene, rng, 8))
            )
        record = {"captions": [scene_words.caption(scene)], "conversations": conversation(turns)}
        yield Sample(key=f"scene{index:06d}", images=(("png", png(scenes.render(scene, rng))),), record=record)


def write_training(folder: Path, *, count: int, seed: int, questions: int = 6) -> bool:
    """Writes the training shards unless they are there, whole and made the same way; says whether it wrote."""
    source = {"name": "scenes", "split": scenes.TRAIN, "count": count, "seed": seed, "questions": questions}
    return write_once(training_samples(count, seed, questions), folder, source)


def write_once(samples: Iterator[Sample], folder: Path, source: dict[str, Any]) -> bool:
    """Writes shards unless those of the same source are there, whole; says whether it wrote."""
    try:
        manifest = read_manifest(folder)
        whole = all((folder / shard["name"]).stat().st_size == shard["bytes"] for shard in manifest["shards"])
        if whole and manifest["source"] == source:
            return False
    except (ValueError, FileNotFoundError):
        pass
    write_shards(samples, folder, source=source)
    return True


def begin_test(marker: Path, pictures: Path, source: dict[str, Any]) -> bool:
    """Whether a test set has to be made: its marker, written last, names another source. Then nothing old is left."""
    try:
        if json.loads(marker.read_text())["source"] == source:
            return False
    except (OSError, ValueError, KeyError):
        pass
    marker.unlink(missing_ok=True)
    shutil.rmtree(pictures, ignore_errors=True)  # those of an earlier, larger set
    pictures.mkdir(parents=True)
    return True


def image_name(image_id: int) -> str:
    """File name of a test picture, after COCO's pattern: data type, data subtype, id of twelve digits."""
    return f"scenes_test_{image_id:012d}.png"


def write_test(folder: Path, *, count: int, seed: int, questions: int = 4) -> bool:
    """Writes pictures, questions and annotations as VQAv2 does, unless they are there; says whether it wrote.

    Beside them `scenes.json` holds, for every image id, a description in words and whether the scene contains a
    held-out combination.
    """
    source = {"name": "scenes", "split": scenes.TEST, "count": count, "seed": seed, "questions": questions}
    marker = folder / "scenes.json"
    if not begin_test(marker, folder / "images", source):
        return False
    asked: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    notes: dict[str, dict[str, Any]] = {}
    for image_id in tqdm(range(count), desc="test scenes", unit="scene", mininterval=1.0):
        rng = random.Random(f"{seed} test {image_id}")
        scene = scenes.sample_scene(rng, scenes.TEST)
        scenes.render(scene, rng).save(folder / "images" / image_name(image_id))
        novel = any(scenes.is_held_out(o.color, o.shape, o.region) for o in scene.objects)
        notes[str(image_id)] = {"description": scene_words.describe(scene, rng).text, "held_out": novel}
        for number, question in enumerate(scene_words.ask(scene, rng, questions)):
            question_id = 1000 * image_id + number
            asked.append({"image_id": image_id, "question": question.text, "question_id": question_id})
            answers = [
                {"answer": question.answer, "answer_confidence": "yes", "answer_id": i + 1} for i in range(NUM_ANSWERS)
            ]
            annotations.append(
                {
                    "question_id": question_id,
                    "image_id": image_id,
                    "question_type": question.question_type,
                    "answer_type": question.answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                }
            )
    head = {"info": {"schema": SCHEMA}, "data_type": "scenes", "data_subtype": "test", "license": {}}
    write_json(folder / QUESTIONS_FILE, {**head, "task_type": "Open-Ended", "questions": asked})
    write_json(folder / ANNOTATIONS_FILE, {**head, "annotations": annotations})
    write_json(marker, {"source": source, "scenes": notes})
    return True
