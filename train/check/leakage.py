"""Test data that got into training data: pictures that are in both, and what both say of them.

A test picture is in the training data when a training sample has

- a picture of the same bytes (`leaked-picture`), or
- one that is nearly the same (`leaked-near-picture`, see `near_pictures`), or
- the same name (`leaked-name`): the number of a COCO picture, the id of an Open Images one, the document page of
  DocVQA, or the address it came from. Other file names and ids are numbered by everybody and say nothing.

An answer leaks (`leaked-answer`) when, for such a picture, a question of the training sample is one of the test and its
answer one of those that count as right, or when a caption is one of the test's. Questions are compared as words without
case, punctuation and the usual demand for a short answer, answers as the VQA metric compares them. The same question
and answer about another picture is no leak: "What colour is the ball? Red" is true of many.

A training sample counts once under each name, however many test pictures it meets.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from visplice.train.convert.sources import identify, parse_json, read_text
from visplice.train.curate.duplicates import normalised_url
from visplice.train.curate.verdict import digest, normalised, question_answers
from visplice.train.data.near_pictures import PictureHash, near_matches
from visplice.train.data.record import Fault
from visplice.train.vqa_metric import normalize

LEAKS = {
    "leaked-picture": "a picture whose bytes are those of a test picture",
    "leaked-near-picture": "a picture that is nearly a test picture",
    "leaked-name": "a picture with the number or address of a test picture",
    "leaked-answer": "a test question with its answer, or a test caption, for the picture it belongs to",
}

_ID_SPACES = {
    "coco-captions": "coco",
    "vqav2": "coco",
    "okvqa": "coco",
    "textvqa": "openimages",
    "textcaps": "openimages",
    "docvqa": "docvqa",
}
_COCO_FILE = re.compile(r"COCO_(?:train|val|test)\d{4}_(\d{12})")
_COCO_FOLDER = re.compile(r"coco|(?:train|val|test|unlabeled)201[457]", re.IGNORECASE)
_OPEN_IMAGES = re.compile(r"[0-9a-f]{16}")
_DEMANDS = re.compile(
    r"\s*(?:answer the question using a single word or phrase|"
    r"answer with the option'?s letter from the given choices directly|"
    r"when the provided information is insufficient, respond with 'unanswerable')\.?",
    re.IGNORECASE,
)


class Facts(NamedTuple):
    """What a sample is recognised by."""

    shard: str  # or the published file
    key: str
    pictures: tuple[bytes, ...]  # digests of their bytes
    hashes: tuple[PictureHash, ...]
    names: tuple[str, ...]  # of its pictures, where such a name means the same everywhere
    said: frozenset[bytes]  # digests of question and answer

    @property
    def place(self) -> tuple[str, str]:
        return self.shard, self.key

    @property
    def name(self) -> str:
        return f"{self.shard}: {self.key}"


class Leak(NamedTuple):
    """A training sample, by index, and what of the test is in it."""

    sample: int
    name: str
    message: str


def picture_names(record: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    """What the pictures of a record are called wherever they are used.

    Args:
        kind: of the source, as the manifest has it; "" where it is not known.
    """
    names = set[str]()
    if kind in _ID_SPACES and isinstance(record.get("id"), str):
        names.add(_named(_ID_SPACES[kind], record["id"]))
    files = record.get("files")
    for file in files if isinstance(files, list) else ():
        if isinstance(file, str):
            names |= _file_names(file)
    url = record.get("url")
    if isinstance(url, str) and url.strip() and not url.startswith("data:"):
        names.add(f"url {normalised_url(url)}")
        names |= _file_names(url)
    return tuple(sorted(names))


def _named(space: str, identity: str) -> str:
    number = int(identity) if space == "coco" and re.fullmatch(r"\d{1,12}", identity) else identity
    return f"{space} {number}"


def _file_names(file: str) -> set[str]:
    folder, _, name = file.rpartition("/")
    stem = name.partition(".")[0]
    if match := _COCO_FILE.fullmatch(stem):
        return {_named("coco", match[1])}
    if re.fullmatch(r"\d{12}", stem) and _COCO_FOLDER.search(folder):
        return {_named("coco", stem)}
    return {f"openimages {stem}"} if _OPEN_IMAGES.fullmatch(stem) else set()


def things_said(record: Mapping[str, Any], *, suffix: str = "", all_answers: bool = False) -> frozenset[bytes]:
    """Digests of a record's captions and of its questions with their answers.

    Args:
        suffix: what was appended to each question when the data set was made.
        all_answers: also those beside the one to train on: to a test, each of them is right.
    """
    pairs = [("", caption) for caption in record.get("captions") or ()]
    pairs += [(question.removesuffix(suffix), answer) for question, answer in question_answers(record)]
    if all_answers:
        asked = record.get("questions") or ()
        pairs += [(item["question"], answer) for item in asked for answer in item.get("answers") or ()]
    return frozenset(_said(question, answer) for question, answer in pairs if answer.strip())


def _said(question: str, answer: str) -> bytes:
    plain = normalised(answer)
    # Of "a" and "The" the VQA metric leaves nothing, of "?" nothing is left but itself.
    return digest(_words(_DEMANDS.sub("", question)), normalize(plain) or _words(plain) or plain)[:8]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", normalised(text)))


def find_leaks(training: Sequence[Facts], test: Sequence[Facts], *, max_distance: int) -> Iterator[Leak]:
    """Every training sample that holds something of the test, in order, once for each of LEAKS."""
    by_digest, by_name = _holders(test, "pictures"), _holders(test, "names")
    near = _near_holders(training, test, max_distance)
    for index, facts in enumerate(training):
        same = {holder for picture in facts.pictures for holder in by_digest.get(picture, ())}
        alike = near.get(index, set()) - same
        named = {holder for name in facts.names for holder in by_name.get(name, ())} - same - alike
        for name, holders in (("leaked-picture", same), ("leaked-near-picture", alike), ("leaked-name", named)):
            if holders:
                yield Leak(index, name, f"as {test[min(holders)].name}")
        telling = [holder for holder in sorted(same | alike | named) if facts.said & test[holder].said]
        if telling:
            count = len(facts.said & test[telling[0]].said)
            yield Leak(index, "leaked-answer", f"{count} of the answers or captions of {test[telling[0]].name}")


def _holders(test: Sequence[Facts], field: str) -> dict[Any, list[int]]:
    holders = defaultdict[Any, list[int]](list)
    for index, facts in enumerate(test):
        for item in getattr(facts, field):
            holders[item].append(index)
    return holders


def _near_holders(training: Sequence[Facts], test: Sequence[Facts], max_distance: int) -> dict[int, set[int]]:
    """For training samples the test samples with a picture that is nearly one of theirs."""
    ours, owners = _hashes(training)
    theirs, holders = _hashes(test)
    found = defaultdict[int, set[int]](set)
    for own, other in near_matches(ours, theirs, max_distance=max_distance):
        for index in owners[own]:
            found[index].update(holders[other])
    return found


def _hashes(samples: Sequence[Facts]) -> tuple[list[PictureHash], list[list[int]]]:
    """The different hashes, and for each the samples that have it."""
    owners = defaultdict[PictureHash, list[int]](list)
    for index, facts in enumerate(samples):
        for item in facts.hashes:
            owners[item].append(index)
    return list(owners), list(owners.values())


def published_test(questions: Path, annotations: Path | None) -> list[Facts]:
    """A test set out of published VQA files, without its pictures; one entry for each of those.

    Args:
        questions: of VQAv2 or OK-VQA; or a file of TextVQA or DocVQA, which holds the answers too.
        annotations: the answers, where they are in a file of their own; without, only pictures are recognised.
    Raises:
        ValueError: a file is another than it should be. OSError: a file cannot be read.
    """
    content = parse_json(read_text(questions)[0], questions)
    items = _items(content, ("questions", "data"), questions)
    answers: dict[Any, Any] = {}
    if annotations is not None:
        published = _items(parse_json(read_text(annotations)[0], annotations), ("annotations",), annotations)
        answers = {str(item.get("question_id")): item for item in published}
        if items and not any(str(item.get("question_id")) in answers for item in items):
            raise ValueError(f"{questions} and {annotations} have no question in common; are they of the same split?")
    said = defaultdict[tuple[str, ...], set[bytes]](set)
    for item in items:
        names = _published_names(item, coco="questions" in content)
        said[names] |= _published_answers(item, answers.get(str(item.get("question_id")), item))
    return [Facts(questions.name, names[0], (), (), names, frozenset(pairs)) for names, pairs in said.items() if names]


def _items(content: Any, keys: Sequence[str], file: Path) -> list[dict[str, Any]]:
    for key in keys:
        found = content.get(key) if isinstance(content, dict) else None
        if isinstance(found, list) and all(isinstance(item, dict) for item in found):
            return found
    raise ValueError(f"{file}: no list of objects under {' or '.join(map(repr, keys))}; is it a VQA file as published?")


def _published_names(item: Mapping[str, Any], *, coco: bool) -> tuple[str, ...]:
    try:
        if coco:
            return (_named("coco", identify(item.get("image_id"), "image_id")),)
        if "image_id" in item:
            return (_named("openimages", identify(item["image_id"], "image_id")),)
        return (_named("docvqa", identify(item.get("image"), "image")),)
    except Fault:
        return ()


def _published_answers(question: Mapping[str, Any], annotation: Mapping[str, Any]) -> set[bytes]:
    given = annotation.get("answers")
    texts = (
        [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
        if isinstance(given, list)
        else []
    )
    chosen = annotation.get("multiple_choice_answer")
    asked = question.get("question")
    if not isinstance(asked, str):
        return set()
    return {_said(asked, text) for text in (*texts, chosen) if isinstance(text, str) and text.strip()}
