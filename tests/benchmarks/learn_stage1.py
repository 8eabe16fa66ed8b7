"""Does stage 1 help? The embedded task with and without it, at equal seconds of CPU.

    python tests/benchmarks/learn_stage1.py --seeds 0 1 2

Three arms of one budget: stage 1 by InfoNCE (80 steps of 64 pairs, as `visplice demo`) and stage 2; stage 2 alone, with
more steps in place of stage 1; stage 1 by the loss of the captions (LLaVA's pre-training) and stage 2. The steps that
the 80 are worth were fixed once by `--measure`: seconds of CPU of a step from pictures, one thread, frozen weights in
bfloat16. Stage 2 is charged as from pictures and run from cached visual tokens, which come out the same up to the
rounding of bfloat16. Each run is scored twice, early too, since what stage 1 gives it may give early; the learning rate
is that of the whole run then, and still high.

At the end, the model of the best arm and first seed with a part broken.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from learning import BATCH, DTYPE, HIDDEN, Scores, encode_tokens, once, percent, stage_2, table, train

from visplice.app.demo import ENCODER, Plan
from visplice.lm.extension import EMBEDDED, load_extension
from visplice.train.align import Align
from visplice.train.embedded_answers import answer_when_broken
from visplice.train.optim import OptimConfig
from visplice.train.scene_data import write_test, write_training

SCENES, TEST_SCENES, DATA_SEED = 4000, 200, 0
STEPS, EARLY = 300, 100  # of stage 2: all, and those behind which it is scored first
RATE = Plan.instruct_lr
# By --measure, milliseconds a step: InfoNCE 185, captions 255, stage 2 279. So 80 of the first are worth:
ALIGN_STEPS = {"info_nce": Plan.align_steps, "caption": 58}
ALIGN_BATCH = {"info_nce": Plan.align_batch, "caption": BATCH}
MORE_STEPS = 53  # of stage 2, in place of stage 1
ARMS = {"info_nce": "InfoNCE, then stage 2", None: "stage 2 alone", "caption": "captions' loss, then stage 2"}


def align(loss: str) -> Align:
    return Align(ENCODER, EMBEDDED, hidden=HIDDEN, loss=loss, backbone_dtype=DTYPE, optim=OptimConfig(lr=Plan.align_lr))


def measure(out: Path, data: Path) -> None:
    """Prints the cost of each kind of step, from pictures, and what 80 of InfoNCE are worth."""
    kinds: dict[str, Any] = {loss: (lambda loss=loss: align(loss), ALIGN_BATCH[loss]) for loss in ALIGN_STEPS}
    kinds["stage 2"] = (lambda: stage_2(lr=RATE, tokens=None, aligned=None), BATCH)
    costs: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(3):
        for kind in list(kinds)[:: 1 if turn % 2 else -1]:
            build, batch = kinds[kind]
            costs[kind].append(train(build, data, out / "measure", steps=24, seed=turn, batch=batch))
    found = {kind: statistics.median(seconds) for kind, seconds in costs.items()}
    budget = Plan.align_steps * found["info_nce"]
    rows = [
        [kind, str(kinds[kind][1]), f"{1000 * cost:.0f} ms", f"{budget / cost:.0f}"] for kind, cost in found.items()
    ]
    print(table(["step", "batch", "CPU", f"steps worth {Plan.align_steps} of InfoNCE"], rows))


def aligned(out: Path, loss: str, seed: int) -> str:
    """Where stage 1 by that loss lies; it is trained where it does not yet."""
    folder, steps, batch = out / f"{loss}-{seed}", ALIGN_STEPS[loss], ALIGN_BATCH[loss]

    def work() -> dict[str, Any]:
        data = out / "data/train"
        return {"cpu_per_step": train(lambda: align(loss), data, folder, steps=steps, seed=seed, batch=batch)}

    once(folder, {"steps": steps, "batch": batch, "seed": seed, "scenes": SCENES}, work)
    return str(folder)


def arm(out: Path, loss: str | None, seed: int, scores: Scores) -> dict[str, Any]:
    """Trains one arm with one seed and scores it."""
    data, tokens = out / "data/train", out / "tokens"
    folder, more = out / f"{loss or 'alone'}-then-{seed}", MORE_STEPS if loss is None else 0
    start = aligned(out, loss, seed) if loss is not None else None

    def build() -> Any:
        return stage_2(lr=RATE, tokens=tokens, aligned=start)

    def work() -> dict[str, Any]:
        seconds = train(build, data, folder, steps=STEPS + more, seed=seed, early=EARLY + more)
        early, last = (scores.of(load_extension(place)) for place in (folder / "early", folder))
        return {"cpu_per_step": seconds, "early": early, "accuracy": last}

    made = {"steps": STEPS + more, "early": EARLY + more, "seed": seed, "scenes": SCENES, "test_scenes": TEST_SCENES}
    made["stage 1"] = ALIGN_STEPS[loss] if loss is not None else 0
    return once(folder, made, work) | {"folder": folder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learn_stage1"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--measure", action="store_true", help="only what a step of each kind costs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = options.out
    write_training(out / "data/train", count=SCENES, seed=DATA_SEED)
    if options.measure:
        measure(out, out / "data/train")
        return
    write_test(out / "data/test", count=TEST_SCENES, seed=DATA_SEED)
    encode_tokens(out / "data/train", out / "tokens")
    scores = Scores.read(out / "data/test")
    found: dict[str | None, list[dict[str, Any]]] = {loss: [] for loss in ARMS}
    for seed in options.seeds:
        for loss, name in ARMS.items():
            result = arm(out, loss, seed, scores)
            print(f"{name}, seed {seed}: {result['early']:.1%}, {result['accuracy']:.1%}", flush=True)
            found[loss].append(result)
    print(f"seeds {' '.join(map(str, options.seeds))}")
    rows = [
        [ARMS[loss], *(percent([result[when] for result in results]) for when in ("early", "accuracy"))]
        for loss, results in found.items()
    ]
    print(table(["arm", f"{EARLY} steps of stage 2", f"{STEPS} steps"], rows))
    best = max(ARMS, key=lambda loss: statistics.mean(result["accuracy"] for result in found[loss]))
    chosen = found[best][0]

    def broken() -> dict[str, Any]:
        answers = answer_when_broken(load_extension(chosen["folder"]), scores.vqa, scores.features)
        return {what: scores.accuracy(said) for what, said in answers.items()}

    ablated = once(out / "broken", {"arm": str(chosen["folder"]), "of": chosen["made"]}, broken)
    ablated.pop("made")
    print(table([ARMS[best], f"{chosen['accuracy']:.1%}"], [[what, f"{value:.1%}"] for what, value in ablated.items()]))


if __name__ == "__main__":
    main()
