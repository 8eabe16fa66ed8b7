"""Questions as published: VQAv2, OK-VQA, TextVQA, DocVQA; one sample for a picture, with all its questions as turns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visplice.train.convert.sources import (
    Entry,
    LeftOut,
    Source,
    check_folder,
    first_layout,
    identify,
    left_out,
    list_of,
    parse_json,
    read_text,
    refused,
    shown,
)
from visplice.train.data.record import MARK, Fault, check_depth, check_text


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What a published set calls its parts."""

    questions: str  # key of the list
    question_id: str
    separate: bool  # answers are in a file of their own
    image: str  # field that names the picture
    places: Callable[[Any, str], tuple[str, ...]]  # from that field and the split, where the picture may be


def _coco_places(image_id: Any, split: str) -> tuple[str, ...]:
    if not str(image_id).isdecimal():
        raise Fault("wrong-type", f"image_id is {shown(image_id)!r}; of a COCO picture it is a number")
    number = int(image_id)
    name = f"COCO_{split}_{number:012d}.jpg"
    return name, f"{split}/{name}", f"{number:012d}.jpg", f"{split}/{number:012d}.jpg"


def _open_images_places(image_id: Any, split: str) -> tuple[str, ...]:
    return tuple(f"{folder}{image_id}.jpg" for folder in ("", "train_images/", "test_images/"))


def _document_places(image: Any, split: str) -> tuple[str, ...]:
    return str(image), str(image).rpartition("/")[2]


_COCO = _Layout(questions="questions", question_id="question_id", separate=True, image="image_id", places=_coco_places)
_LAYOUTS = {
    "vqav2": _COCO,
    "okvqa": _COCO,
    "textvqa": _Layout(
        questions="data", question_id="question_id", separate=False, image="image_id", places=_open_images_places
    ),
    "docvqa": _Layout(
        questions="data", question_id="questionId", separate=False, image="image", places=_document_places
    ),
}


class _Talk:
    """One picture, and its questions as they come in."""

    def __init__(self, identity: str, places: tuple[str, ...], url: Any) -> None:
        self.identity, self.places, self.url = identity, places, url
        self.turns: list[dict[str, str]] = []
        self.questions: list[dict[str, Any]] = []
        self.left_out: list[LeftOut] = []

    def add(self, question: dict[str, Any], answer: str, *, suffix: str) -> None:
        mark = "" if self.turns else f"{MARK}\n"
        self.turns.append({"from": "human", "value": f"{mark}{question['question'].strip()}{suffix}"})
        self.turns.append({"from": "gpt", "value": answer})
        self.questions.append(question)

    def entry(self, layout: int) -> Entry:
        record = {"id": self.identity, "conversations": self.turns, "questions": self.questions}
        if isinstance(self.url, str) and self.url:
            record["url"] = self.url
        return Entry(
            id=shown(self.identity),
            record=record if self.turns else None,
            images=(self.places[layout],),
            items=len(self.questions),
            left_out=tuple(self.left_out),
        )


def vqa_source(kind: str, questions: Path, annotations: Path | None, images: Path, *, suffix: str = "") -> Source:
    """A VQA set, with the answer to train on: `multiple_choice_answer` where there is one; else the most frequent, the
    first among equals; of DocVQA the first.

    Args:
        kind: vqav2, okvqa, textvqa or docvqa.
        annotations: where answers are in a file of their own (vqav2, okvqa), else None.
        images: folder of the pictures, or the one above it.
        suffix: appended to each question.
    Raises:
        ValueError: a file is another than it should be, or there is no folder. OSError: a file cannot be read.
    """
    layout = _LAYOUTS[kind]
    assert layout.separate == (annotations is not None)
    check_folder(images)
    text, facts = read_text(questions)
    content = parse_json(text, questions)
    items = list_of(content, layout.questions, questions, what=f"a {kind} questions file")
    files = [facts]
    answers, late = None, list[Entry]()
    if annotations is not None:
        text, facts = read_text(annotations)
        files.append(facts)
        published = list_of(
            parse_json(text, annotations), "annotations", annotations, what=f"a {kind} annotations file"
        )
        answers, late = _answers_by_question(published)
    groups, known = _talks(items, layout, answers, split=_split(content, questions), kind=kind, suffix=suffix)
    if answers is not None:
        if answers and items and not known & answers.keys():
            raise ValueError(f"{questions} and {annotations} have no question in common; are they of the same split?")
        fault = Fault("no-question", "an answer to a question that is not in the questions file")
        late += [refused(identity, fault, items=0) for identity in answers if identity not in known]
    place = first_layout(images, (group.places for group in groups.values() if isinstance(group, _Talk)))
    entries = [group.entry(place) if isinstance(group, _Talk) else group for group in groups.values()]
    return Source(kind=kind, unit="questions", files=files, options={"suffix": suffix}, entries=entries + late)


def _split(content: Any, file: Path) -> str:
    """The split of COCO that pictures are named after."""
    named = content.get("data_subtype")
    if isinstance(named, str) and re.fullmatch(r"\w+", named):
        return named
    found = re.search(r"(train|val|test)\d{4}", file.name)
    return found[0] if found else "train2014"


def _answers_by_question(published: list[Any]) -> tuple[dict[str, dict[str, Any]], list[Entry]]:
    """Annotations under the id of their question, and those that cannot be used."""
    answers: dict[str, dict[str, Any]] = {}
    bad: list[Entry] = []
    for number, item in enumerate(published):
        try:
            if not isinstance(item, dict):
                raise Fault("wrong-type", f"annotation {number} is {type(item).__name__}, not an object")
            identity = identify(item.get("question_id"), "question_id of an annotation")
            if identity in answers:
                raise Fault("duplicate-id", f"question {shown(identity)} is answered twice; the first is kept")
        except Fault as fault:
            bad.append(refused(item.get("question_id") if isinstance(item, dict) else None, fault, items=0))
        else:
            answers[identity] = item
    return answers, bad


def _talks(
    items: list[Any],
    layout: _Layout,
    answers: dict[str, dict[str, Any]] | None,
    *,
    split: str,
    kind: str,
    suffix: str,
) -> tuple[dict[str, _Talk | Entry], set[str]]:
    """Questions under their pictures, in the order in which pictures first come; and the ids of all questions."""
    groups: dict[str, _Talk | Entry] = {}
    known: set[str] = set()
    for number, item in enumerate(items):
        raw = item.get(layout.question_id) if isinstance(item, dict) else None
        try:
            if not isinstance(item, dict):
                raise Fault("wrong-type", f"question {number} is {type(item).__name__}, not an object")
            picture = identify(item.get(layout.image), layout.image)
            if f"picture {picture}" not in groups:
                places = layout.places(item[layout.image], split)
                groups[f"picture {picture}"] = _Talk(picture, places, item.get("flickr_original_url"))
        except Fault as fault:
            groups[f"item {number}"] = refused(raw, fault)
            continue
        talk = groups[f"picture {picture}"]
        assert isinstance(talk, _Talk)
        try:
            identity = identify(raw, layout.question_id)
            if identity in known:
                raise Fault("duplicate-id", f"question {shown(identity)} stood in the file before; the first is kept")
            known.add(identity)
            annotation = item if answers is None else answers.get(identity, {})
            talk.add(*_question(item, raw, annotation, first=kind == "docvqa"), suffix=suffix)
        except Fault as fault:
            talk.left_out.append(left_out(raw, fault))
    return groups, known


def _question(
    item: dict[str, Any], identity: Any, annotation: dict[str, Any], *, first: bool
) -> tuple[dict[str, Any], str]:
    """A question as it is stored, and the answer to train on."""
    text = item.get("question")
    if not isinstance(text, str):
        raise Fault("wrong-type", f"question {shown(identity)} is {type(text).__name__}, not a string")
    if not text.strip():
        raise Fault("no-text", f"question {shown(identity)} is empty")
    given = annotation.get("answers") or []
    if not isinstance(given, list):
        raise Fault("wrong-type", f"answers of question {shown(identity)} are {type(given).__name__}, not a list")
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
    usable = [answer for answer in texts if isinstance(answer, str) and answer.strip()]
    if not all(isinstance(answer, str) for answer in texts):
        raise Fault("wrong-type", f"an answer to question {shown(identity)} is no string")
    chosen = annotation.get("multiple_choice_answer")
    if not isinstance(chosen, str) or not chosen.strip():
        if not usable:
            raise Fault("no-answer", f"nobody answered question {shown(identity)}")
        chosen = usable[0] if first else Counter(usable).most_common(1)[0][0]
    chosen = chosen.strip()
    for part in (text, chosen, *usable):
        check_text(part)
    if MARK in text:
        raise Fault("placeholder-count", f"question {shown(identity)} holds {MARK} as text")
    stored = {"question_id": identity, "question": text, "answers": texts}
    raw = [answer.get("raw_answer") for answer in given if isinstance(answer, dict)]
    if any(isinstance(answer, str) for answer in raw):
        stored["raw_answers"] = raw
    kept = {"question_types": item, "question_type": annotation, "answer_type": annotation}
    stored |= {name: holder[name] for name, holder in kept.items() if name in holder}
    check_depth(stored)
    return stored, chosen
