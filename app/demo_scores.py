"""What the demo measures: scenes by the official VQAv2 rule, slips by that of DocVQA, each beside blind controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from visplice.lm.vision_llama import VisionLlama
from visplice.train import vqa_metric
from visplice.train.embedded_answers import (
    DocSet,
    QuestionSet,
    VqaSet,
    answer_when_broken,
    answer_with_images,
    answer_with_words,
    blind_answers,
    encode_images,
)

# Question id to answer of a set, by a model whose encoder is the one of the features.
Answers = dict[int, str]
Broken = Mapping[str, Callable[[], VisionLlama]]  # models without one stage, by what they lack


def score_scenes(
    model: VisionLlama, folder: Path, shards: Path, broken: Broken | None = None
) -> tuple[dict[str, Any], Answers]:
    """The part of the report on scenes, and the model's answers; with `broken`, what is left without one part."""
    vqa = VqaSet.read(folder)

    def score(answers: Answers) -> vqa_metric.VqaReport:
        return vqa_metric.evaluate(vqa.annotations, answers)

    answers, blind, without = _answers(model, vqa, shards, broken, "scenes")
    seeing, controls = score(answers), {name: score(said) for name, said in blind.items()}
    novel = {q["question_id"] for q in vqa.questions if vqa.notes[str(q["image_id"])]["held_out"]}
    split = {
        name: vqa_metric.evaluate(
            [a for a in vqa.annotations if (a["question_id"] in novel) == inside],
            {k: v for k, v in answers.items() if (k in novel) == inside},
        ).accuracy
        for name, inside in (("held_out_combinations", True), ("seen_combinations", False))
    }
    report: dict[str, Any] = {
        "accuracy": seeing.accuracy,
        "blind_accuracy": max(control.accuracy for control in controls.values()),
        "by_question_type": seeing.by_question_type,
        "by_answer_type": seeing.by_answer_type,
        "blind_by_question_type": {
            kind: max(control.by_question_type[kind] for control in controls.values())
            for kind in seeing.by_question_type
        },
        "blind_controls": {name: control.accuracy for name, control in controls.items()},
        "scene_in_words_accuracy": score(answer_with_words(model, vqa)).accuracy,
        "by_split": split,
        "num_questions": seeing.num_questions,
    }
    if broken is not None:
        report["ablations"] = {name: score(said).accuracy for name, said in without.items()}
    return report, answers


def score_slips(
    model: VisionLlama, folder: Path, shards: Path, broken: Broken | None = None
) -> tuple[dict[str, Any], Answers]:
    """The part of the report on slips, and the model's answers; with `broken`, what is left without one part."""
    docs = DocSet.read(folder)
    answers, blind, without = _answers(model, docs, shards, broken, "slips")
    seeing, controls = docs.score(answers), {name: docs.score(said) for name, said in blind.items()}

    def by_type(scored: Any) -> dict[str, float]:
        return {kind: sum(scores) / len(scores) for kind, scores in scored.groups["question_type"].items()}

    report: dict[str, Any] = {
        "anls": seeing.value,
        "exact_match": seeing.further["exact_match"],
        "blind_anls": max(control.value for control in controls.values()),
        "by_question_type": by_type(seeing),
        "blind_by_question_type": {
            kind: max(by_type(control)[kind] for control in controls.values()) for kind in by_type(seeing)
        },
        "blind_controls": {name: control.value for name, control in controls.items()},
        "num_questions": len(seeing.ids),
    }
    if broken is not None:
        report["ablations"] = {name: docs.score(said).value for name, said in without.items()}
    return report, answers


def _answers(
    model: VisionLlama, asked: QuestionSet, shards: Path, broken: Broken | None, desc: str
) -> tuple[Answers, dict[str, Answers], dict[str, Answers]]:
    """The model's answers, those of the blind controls, and those with something broken."""
    features = encode_images(model, [asked.image_path(i) for i in asked.image_ids])
    answers = answer_with_images(model, asked, features, desc=desc)
    blind = blind_answers(model, asked, features, sorted(shards.glob("shard-*.tar")))
    without: dict[str, Answers] = {}
    if broken is not None:
        without = answer_when_broken(model, asked, features)
        for name, build in broken.items():
            without[name] = answer_with_images(build(), asked, features, desc=name)
    return answers, blind, without


def table(report: Mapping[str, Any]) -> str:
    """The report as lines for the terminal."""
    lines = []
    for task, score, measure in (("scenes", "accuracy", "VQAv2 accuracy"), ("slips", "anls", "ANLS")):
        part = report[task]
        lines.append(f"{task + ', ' + measure:<24}{'sees':>8}{'blind':>8}")
        for kind in sorted(part["by_question_type"]):
            blind = part["blind_by_question_type"][kind]
            lines.append(f"  {kind:<22}{part['by_question_type'][kind]:>8.1%}{blind:>8.1%}")
        lines.append(f"  {'all':<22}{part[score]:>8.1%}{part['blind_' + score]:>8.1%}")
        lines += [f"  {name}: {value:.1%}" for name, value in part.get("ablations", {}).items()]
        lines.append("")
    scenes = report["scenes"]
    lines.append(f"scene in words instead of the picture: {scenes['scene_in_words_accuracy']:.1%}")
    lines += [f"{name.replace('_', ' ')}: {value:.1%}" for name, value in scenes["by_split"].items()]
    lines.append(f"slips read without a fault: {report['slips']['exact_match']:.1%}")
    lines.append(
        f"{report['trainable_parameters']:,} trainable parameters, {report['frozen_parameters']:,} frozen and "
        f"{'unchanged to the byte' if report['frozen_unchanged'] else 'CHANGED'}"
    )
    return "\n".join(lines)
