"""`visplice demo`: from nothing to a LLaMA that sees, on the embedded tasks, with the proof beside it.

Data, stage 1, stage 2, evaluation on the held-out split, controls, figures, then the chat with the model just trained.
Every part leaves a marker when it is whole; an interrupted demo goes on behind the last one, and a part made with other
settings is made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visplice.app.demo_scores import Broken, score_scenes, score_slips, table
from visplice.app.device import pick_device
from visplice.lm.extension import EMBEDDED, embedded_folder, load_extension, save_extension
from visplice.lm.vision_llama import VisionLlama
from visplice.train import scene_data, slip_data
from visplice.train.align import Align
from visplice.train.backbone_vision import VISION
from visplice.train.data.module import ShardData
from visplice.train.data.shards import write_json
from visplice.train.embedded_answers import DocSet, QuestionSet, VqaSet
from visplice.train.grid_align import align_symbols
from visplice.train.grid_tables import load_symbols
from visplice.train.instruct import Instruct
from visplice.train.optim import OptimConfig
from visplice.train.report import plot_by_type, plot_examples, plot_losses
from visplice.train.stage import checksum
from visplice.train.trainer import fit, parameter_counts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of the demo; part of every marker, so that other numbers mean other work."""

    seed: int = 0
    train_scenes: int = 7000
    test_scenes: int = 400
    questions: int = 6  # behind one training scene
    train_slips: int = 1800
    test_slips: int = 250
    hidden: int = 256  # width inside the projector
    align_steps: int = 40
    align_batch: int = 64
    align_lr: float = 2e-3
    symbol_steps: int = 220  # of as many pictures as align_batch
    symbol_lr: float = 3e-3
    instruct_steps: int = 1000  # of 8; many small steps beat few large ones
    slips_share: float = 0.3  # of the samples of stage 2; after stage 1, slips need fewer of them than scenes do
    instruct_batch: int = 8
    instruct_lr: float = 5e-4  # at 1e-3 and more it forgets how to read before it has learned to count


LONG = {"train_scenes": 20_000, "train_slips": 5_000, "instruct_steps": 3_000}  # what changes with --long
ENCODER = replace(VISION, weights=EMBEDDED)


class Demo:
    """One run of the demo in its folder."""

    def __init__(self, out: Path, plan: Plan, device: torch.device) -> None:
        self.out, self.plan, self.device = out, plan, device
        self.accelerator = {"cuda": "gpu"}.get(device.type, device.type)
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs a part and notes how long it took."""
        started = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - started, 1)
        return result

    # --- parts ---

    def data(self) -> None:
        plan, data = self.plan, self.out / "data"
        scene_data.write_training(data / "train", count=plan.train_scenes, seed=plan.seed, questions=plan.questions)
        scene_data.write_test(data / "test", count=plan.test_scenes, seed=plan.seed)
        slip_data.write_training(data / "slips_train", count=plan.train_slips, seed=plan.seed)
        slip_data.write_test(data / "slips_test", count=plan.test_slips, seed=plan.seed)

    def part(self, name: str, train: Callable[[Path], VisionLlama]) -> VisionLlama:
        """Has a part of the training done in its folder, or opens it when it is there whole, made by the same plan."""
        folder = self.out / name
        marker = folder / "run.json"
        made = {"plan": asdict(self.plan), "stage": name}
        try:
            noted = json.loads(marker.read_text())
            if noted["made"] == made:
                model = load_extension(folder, device=self.device)
                self.seconds[name] = noted["seconds"]
                print(f"{name}: already trained in {folder}")
                return model
        except (OSError, ValueError, KeyError):
            pass
        marker.unlink(missing_ok=True)
        torch.manual_seed(self.plan.seed)
        model = self.timed(name, lambda: train(folder))
        write_json(marker, {"made": made, "seconds": self.seconds[name]})
        return model.to(self.device)

    def stage(
        self, name: str, build: Callable[[], Any], *, data: Mapping[str, float], steps: int, batch: int
    ) -> VisionLlama:
        """Trains one of the two stages on sets of shards."""

        def train(folder: Path) -> VisionLlama:
            module = build()
            mixture = {str(self.out / "data" / part): share for part, share in data.items()}
            shards = ShardData(mixture=mixture, batch_size=batch, seed=self.plan.seed)
            fit(module, shards, folder, max_steps=steps, seed=self.plan.seed, accelerator=self.accelerator, name=name)
            model: VisionLlama = module.model
            return model

        return self.part(name, train)

    def align(self) -> VisionLlama:
        plan = self.plan

        def build() -> Align:
            return Align(ENCODER, EMBEDDED, hidden=plan.hidden, optim=OptimConfig(lr=plan.align_lr))

        return self.stage("align", build, data={"train": 1.0}, steps=plan.align_steps, batch=plan.align_batch)

    def symbols(self) -> VisionLlama:
        plan = self.plan

        def train(folder: Path) -> VisionLlama:
            model, symbols = load_extension(self.out / "align", device=self.device), load_symbols(embedded_folder("lm"))
            optim = OptimConfig(lr=plan.symbol_lr)
            align_symbols(model, symbols, steps=plan.symbol_steps, batch=plan.align_batch, seed=plan.seed, optim=optim)
            save_extension(model, folder, lm=EMBEDDED)
            return model

        return self.part("symbols", train)

    def instruct(self, name: str = "instruct", *, aligned: bool = True) -> VisionLlama:
        plan = self.plan

        def build() -> Instruct:
            start = str(self.out / "symbols") if aligned else None
            optim = OptimConfig(lr=plan.instruct_lr)
            return Instruct(ENCODER, EMBEDDED, aligned=start, hidden=plan.hidden, optim=optim)

        data = {"train": 1.0 - plan.slips_share, "slips_train": plan.slips_share}
        return self.stage(name, build, data=data, steps=plan.instruct_steps, batch=plan.instruct_batch)

    def evaluate(self, model: VisionLlama, *, ablate: bool) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
        """Scores of the model and of its controls on both tasks, and the model's answers."""
        broken: Broken | None = None
        if ablate:
            broken = {
                "stage 2 skipped": self.symbols,
                "stage 1 skipped": lambda: self.instruct("instruct-without-align", aligned=False),
            }
        data, scores, answers = self.out / "data", {}, {}
        scores["scenes"], answers["scenes"] = score_scenes(model, data / "test", data / "train", broken)
        scores["slips"], answers["slips"] = score_slips(model, data / "slips_test", data / "slips_train", broken)
        return scores, answers

    def figures(self, scores: dict[str, Any], answers: dict[str, dict[int, str]]) -> None:
        folder = self.out / "figures"
        folder.mkdir(exist_ok=True)
        curves = {"stage 1, InfoNCE": "align", "stage 2, answers": "instruct"}
        plot_losses({t: self.out / name / "logs/metrics.csv" for t, name in curves.items()}, folder / "losses.png")
        scenes = scores["scenes"]
        plot_by_type(scenes["by_question_type"], scenes["blind_by_question_type"], folder / "accuracy.png")
        vqa = VqaSet.read(self.out / "data/test")
        truths = [annotation["multiple_choice_answer"] for annotation in vqa.annotations]
        plot_examples(_examples(vqa, truths, answers["scenes"]), folder / "examples.png")
        docs = DocSet.read(self.out / "data/slips_test")
        truths = [row["answers"][0] for row in docs.annotations["data"]]
        plot_examples(_examples(docs, truths, answers["slips"]), folder / "slips.png")


def _examples(asked: QuestionSet, truths: Sequence[str], answers: Mapping[int, str]) -> list[dict[str, Any]]:
    """A dozen questions from all over the set, as `plot_examples` takes them."""
    rows = [
        {
            "image": asked.image_path(q["image_id"]),
            "question": q["question"],
            "answer": answers[q["question_id"]],
            "truth": truth,
        }
        for q, truth in zip(asked.questions, truths, strict=True)
    ]
    return rows[:: max(1, len(rows) // 12)][:12]


def run(out: Path, *, plan: Plan, device: torch.device, ablate: bool) -> tuple[dict[str, Any], VisionLlama]:
    """Everything but the chat; writes `report.json` and `figures/`, returns the report and the model."""
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(out, plan, device)
    started = time.perf_counter()
    print(f"1/4 data: scenes of coloured shapes and printed slips, in {out / 'data'}")
    demo.timed("data", demo.data)
    print("2/4 stage 1: align projected pictures with captions, and their patches with symbols")
    demo.align()
    demo.symbols()
    print("3/4 stage 2: questions and answers through the frozen LLaMA")
    model = demo.instruct()
    print("4/4 evaluation on scenes and slips never seen, by the official rules of VQAv2 and DocVQA")
    scores, answers = demo.timed("evaluate", lambda: demo.evaluate(model, ablate=ablate))
    trainable, frozen = parameter_counts(model)
    fresh = load_extension(out / "instruct", device=device)
    report = {
        **scores,
        "trainable_parameters": trainable,
        "frozen_parameters": frozen,
        "frozen_unchanged": all(
            checksum(ours) == checksum(theirs)
            for ours, theirs in ((model.encoder, fresh.encoder), (model.lm, fresh.lm))
        ),
        "seed": plan.seed,
        "seconds": {},
    }
    demo.timed("figures", lambda: demo.figures(scores, answers))
    report["seconds"] = {**demo.seconds, "total": round(time.perf_counter() - started, 1)}
    write_json(out / "report.json", report)
    return report, model


def main(args: argparse.Namespace) -> int:
    """Runs the demo; returns the exit status."""
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if not args.no_serve:
        from visplice.app.chat import check_port, serve

        check_port("127.0.0.1", args.port)  # a port in use is said now, not after the training
    plan = replace(Plan(seed=args.seed), **(LONG if args.long else {}))
    report, model = run(out, plan=plan, device=pick_device(args.device), ablate=args.ablate)
    print(f"\n{table(report)}\n\nreport: {out / 'report.json'}, figures: {out / 'figures'}, model: {out / 'instruct'}")
    if not args.no_serve:
        serve(model, title="visplice demo", port=args.port)
    return 0
