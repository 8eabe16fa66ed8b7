"""What a domain needs without touching the LLaMA: adapters on the projector against the whole projector, retrained.

    python tests/benchmarks/learn_domain.py --seeds 0 1 2

The domain is the embedded task with its pictures shifted: red, green and blue change places and a Gaussian blurs them,
while questions and answers stay as they were, so that what looks blue is now called red. Encoder and LLaMA are frozen;
both arms start from the projector that ships and see the same scenes in the same order, each at the rate that does best
on a validation split, by the first seed. The test split is looked at with those rates alone.

Then the controls: another picture's features, adapters whose B is zero, and whether the projector under the adapters is
to the bit what it was, through merging into another folder and taking the adapters out.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from learning import Scores, encode_tokens, once, percent, stage_2, table, train
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from visplice.lm.extension import EMBEDDED, embedded_folder, load_extension
from visplice.lm.merging import merge, unmerge
from visplice.projector.lora import LoraConfig, adapters, remove_lora
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_json, write_shards
from visplice.train.embedded_answers import answer_when_broken, answer_with_images
from visplice.train.scene_data import training_samples, write_test
from visplice.train.trainer import parameter_counts
from visplice.train.tuning import TuneConfig

STEPS, SCENES, BLUR = 150, 1600, 1.2  # of 8: no scene twice; blur in pixels of 112
SPLITS = {"val": (8, 100), "test": (9, 200)}  # seed and scenes; training has seed 7
TRAIN_SEED = 7
LORA = LoraConfig(rank=11, alpha=22.0)
ARMS: dict[str, tuple[TuneConfig, tuple[float, ...]]] = {
    "whole projector": (TuneConfig(), (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    "projector LoRA": (TuneConfig(projector_lora=LORA), (2e-3, 5e-3, 1.2e-2)),
}


def shift(image: Image.Image) -> Image.Image:
    """The picture as the domain has it."""
    red, green, blue = image.convert("RGB").split()
    return Image.merge("RGB", (green, blue, red)).filter(ImageFilter.GaussianBlur(BLUR))


def shifted(samples: Iterator[Sample]) -> Iterator[Sample]:
    for sample in samples:
        stream = io.BytesIO()
        shift(Image.open(io.BytesIO(sample.images[0][1]))).save(stream, "PNG", compress_level=1)
        yield replace(sample, images=(("png", stream.getvalue()),))


def write_data(out: Path) -> None:
    """Shifted scenes for training, validation and test, and those of the test as they were."""
    if not (out / "train/manifest.json").exists():
        source = {"name": "shifted scenes", "count": SCENES, "seed": TRAIN_SEED, "blur": BLUR}
        write_shards(shifted(training_samples(SCENES, TRAIN_SEED, 6)), out / "train", source=source)
    for split, (seed, count) in SPLITS.items():
        if (out / split / "shifted.json").exists():
            continue
        write_test(out / f"plain-{split}", count=count, seed=seed)
        shutil.copytree(out / f"plain-{split}", out / split, dirs_exist_ok=True)
        for file in (out / f"plain-{split}/images").iterdir():
            shift(Image.open(file)).save(out / split / "images" / file.name)
        write_json(out / split / "shifted.json", {"blur": BLUR})


def tune(out: Path, name: str, rate: float, seed: int, steps: int, scores: dict[str, Scores]) -> dict[str, Any]:
    """Trains one arm and scores it on the validation split."""
    config, _ = ARMS[name]
    folder = out / f"{name.replace(' ', '-')}-{rate:g}-{seed}-{steps}"
    learned = 0

    def build() -> Any:
        nonlocal learned
        module = stage_2(lr=rate, tokens=out / "tokens", aligned=EMBEDDED, tune=config)
        learned = parameter_counts(module)[0]
        return module

    def work() -> dict[str, Any]:
        train(build, out / "data/train", folder, steps=steps, seed=seed)
        return {"learned": learned, "val": scores["val"].of(load_extension(folder))}

    made = {"steps": steps, "rate": rate, "seed": seed, "scenes": SCENES, "lora": repr(config.projector_lora)}
    result = once(folder, made, work) | {"folder": folder}
    print(f"{name}, rate {rate:g}, seed {seed}: {result['val']:.1%} on the validation split", flush=True)
    return result


def test(folder: Path | str, made: Any, note: Path, scores: Scores) -> float:
    """Accuracy of a model on the test split."""
    return once(note, {"of": made}, lambda: {"accuracy": scores.of(load_extension(folder))})["accuracy"]


def unchanged(folder: Path, merged: Path) -> None:
    """Fails unless the projector under the adapters is the shipped one to the bit, before and behind a merge."""
    shipped = load_file(str(embedded_folder("projector") / "projector.safetensors"))

    def check(found: dict[str, torch.Tensor]) -> None:
        assert found.keys() == shipped.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in shipped.items())

    check(load_file(str(folder / "projector.safetensors")))
    back = merged.with_name("unmerged")
    for made in (merged, back):  # by a run before this one
        shutil.rmtree(made, ignore_errors=True)
    merge(folder, merged)
    assert not all(torch.equal(t, shipped[n]) for n, t in load_file(str(merged / "projector.safetensors")).items())
    unmerge(merged, back)
    check(load_file(str(back / "projector.safetensors")))
    check(load_file(str(folder / "projector.safetensors")))
    check(load_extension(folder, packs=False).projector.state_dict())
    model = load_extension(folder)
    assert len(list(adapters(model.projector))) == 2
    remove_lora(model.projector)
    check(model.projector.state_dict())


def controls(folder: Path, merged: Path, scores: Scores, plain: Scores) -> dict[str, Any]:
    """Accuracy of the adapted model with a part broken, and with the adapters merged."""
    model = load_extension(folder)
    found = {
        what: scores.accuracy(said) for what, said in answer_when_broken(model, scores.vqa, scores.features).items()
    }
    found["pictures not shifted"] = plain.of(model)
    found["pictures not shifted, adapters taken out"] = plain.of(load_extension(EMBEDDED))
    with torch.no_grad():
        for _, layer in adapters(model.projector):
            layer.lora_B.zero_()
    silent = answer_with_images(model, scores.vqa, scores.features)
    assert silent == answer_with_images(load_extension(EMBEDDED), scores.vqa, scores.features)
    found["B of the adapters zeroed"] = scores.accuracy(silent)
    found["adapters merged"] = scores.of(load_extension(merged))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learn_domain"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=STEPS, help="of 8 scenes (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = options.out
    write_data(out / "data")
    encode_tokens(out / "data/train", out / "tokens")
    scores = {split: Scores.read(out / "data" / split) for split in ("val", "test", "plain-test")}
    before = test(EMBEDDED, EMBEDDED, out / "before", scores["test"])
    print(f"before: {before:.1%}", flush=True)
    chosen, found = {}, {}
    for name, (_, rates) in ARMS.items():
        tried = {rate: tune(out, name, rate, options.seeds[0], options.steps, scores) for rate in rates}
        chosen[name] = max(tried, key=lambda rate: tried[rate]["val"])
    for name, rate in chosen.items():
        runs = [tune(out, name, rate, seed, options.steps, scores) for seed in options.seeds]
        found[name] = [
            run | {"test": test(run["folder"], run["made"], run["folder"] / "test", scores["test"])} for run in runs
        ]
    whole = found["whole projector"]
    gained = statistics.mean(run["test"] for run in whole) - before
    rows = [["before", "", "0", percent([before]), ""]]
    for name, runs in found.items():
        accuracy, learned = [run["test"] for run in runs], runs[0]["learned"]
        share = f"{learned:,} ({learned / whole[0]['learned']:.2%})"
        regained = f"{(statistics.mean(accuracy) - before) / gained:.1%}"
        rows.append([name, f"{chosen[name]:g}", share, percent(accuracy), regained])
    print(f"seeds {' '.join(map(str, options.seeds))}, {options.steps} steps")
    print(table(["projector", "rate", "weights that learn", "accuracy", "regained"], rows))
    folder = found["projector LoRA"][0]["folder"]
    unchanged(folder, out / "merged")
    made = {"folder": str(folder), "run": found["projector LoRA"][0]["made"]}
    broken = once(
        out / "controls", made, lambda: controls(folder, out / "merged", scores["test"], scores["plain-test"])
    )
    print(table(["control, shifted pictures", "accuracy"], [[n, f"{v:.1%}"] for n, v in broken.items() if n != "made"]))
    print("the projector under the adapters is the shipped one to the bit, before and behind the merge")


if __name__ == "__main__":
    main()
