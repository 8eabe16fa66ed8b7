"""Captions: CIDEr-D, BLEU-4 and ROUGE-L as pycocoevalcap gives them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from visplice.train.scoring.files import JsonFile, field, one_answer_each
from visplice.train.scoring.ptb import java_tokenize, python_tokenize
from visplice.train.scoring.result import Scored

_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"


def score_captions(annotations: JsonFile, predictions: JsonFile, questions: JsonFile | None = None) -> Scored:
    """Scores one caption for each picture; `score` is CIDEr-D, from 0 to 10.

    Args:
        annotations: COCO's `{"annotations": [{image_id, caption}]}`, or TextCaps' `{"data": [{image_id,
            caption_str}]}`.
        predictions: `[{image_id, caption}]`.
        questions: there are none.

    Raises:
        ValueError: if a file is laid out in another way, the pictures of the files differ, pycocoevalcap is not
            installed, or a file of questions is given.
    """
    if questions is not None:
        raise ValueError(f"captions answer no questions; leave --questions {questions.path} out")
    kind = "a whole number or text"
    value = annotations.value
    textcaps = isinstance(value, dict) and "annotations" not in value and "data" in value
    key, text = ("data", "caption_str") if textcaps else ("annotations", "caption")
    references: dict[int | str, list[str]] = {}
    for index, row in enumerate(annotations.rows(key)):
        where = f"{key}[{index}]"
        image = field(annotations, row, "image_id", kind, where=where)
        references.setdefault(image, []).append(field(annotations, row, text, "text", where=where))
    written = one_answer_each(
        predictions, annotations, references, id_field="image_id", answer_field="caption", id_kind=kind
    )

    package = _pycocoevalcap()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, tokenizer = _tokenized([written[image] for image in references], package)
    flat, _ = _tokenized([caption for captions in references.values() for caption in captions], package)
    if not any(flat):
        raise ValueError(f"{annotations.path}: no 'caption' has a word, expected captions to compare with")
    remaining = iter(flat)
    gts = {image: [next(remaining) for _ in captions] for image, captions in references.items()}
    res = {image: [candidate] for image, candidate in zip(references, candidates, strict=True)}
    cider, each = Cider().compute_score(gts, res)
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, _ = Rouge().compute_score(gts, res)
    return Scored(
        measure="CIDEr-D",
        rule="official",
        rule_source="pycocoevalcap",
        ids=list(references),
        scores=[float(score) for score in each],
        score=float(cider),
        id_field="image_id",
        further={"bleu_4": float(bleu[3]), "rouge_l": float(rouge)},
        settings={"tokenizer": tokenizer},
        notes=[] if len(references) > 1 else ["of one picture alone CIDEr-D is 0: no word tells it from others"],
        packages=("pycocoevalcap",),
    )


def _pycocoevalcap() -> Path:
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("captions are scored by pycocoevalcap, which is missing: pip install 'visplice[captions]'")
    return Path(spec.submodule_search_locations[0])


def _tokenized(captions: Sequence[str], package: Path) -> tuple[list[str], str]:
    java = shutil.which("java")
    if java is not None and (package / _JAR).is_file():
        return java_tokenize(captions, package / _JAR, java), "PTBTokenizer of Stanford CoreNLP 3.4.1 (Java)"
    return python_tokenize(captions), "visplice.train.scoring.ptb (Python, as no Java is found)"
