"""From a WebDataset shard to batches: our transforms beside the usual webdataset + open_clip pipeline.

    python tests/benchmarks/bench_transform.py --pictures 256 --rounds 9

Writes a shard of JPEGs of quality 90, 640 x 480 unless `--size` says otherwise, to a temporary folder: windows of the
photographs that come inside matplotlib and gradio, or of those in `--photographs DIR`. Then every contender reads all
of it into batches, one thread, by turns and in turned order; time is CPU time of this process, the shard lies in the
page cache. The ratio is the median of the ratios of each round, `difference` that of normalised pixels from the exact
transform over all files.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

from visplice.train.data.record import Sample
from visplice.train.data.shard_set import ShardSet
from visplice.train.data.shards import write_shards
from visplice.vision._torchvision import declare_missing_operators
from visplice.vision.fast_transform import FastTransform
from visplice.vision.image import open_image
from visplice.vision.transform import Transform

declare_missing_operators()
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # noqa: E402
from open_clip.transform import image_transform  # noqa: E402

EXACT = Transform(image_size=224, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
GRADIO = "media_assets/images/"
INSIDE = {
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
    "gradio": [GRADIO + name for name in ("cheetah.jpg", "cheetah1.jpg", "groot.jpeg", "lion.jpg", "tower.jpg")],
}
BATCH = 64


def photographs(folder: Path | None) -> list[Image.Image]:
    if folder is not None:
        files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    else:
        files = [importlib.resources.files(package) / path for package, paths in INSIDE.items() for path in paths]
    return [open_image(file.read_bytes()) for file in files if file.is_file()]


def samples(images: list[Image.Image], count: int, size: tuple[int, int]) -> Iterator[Sample]:
    """Random windows of the photographs, between half and all of their height or width, some mirrored."""
    aspect = size[0] / size[1]
    rng = np.random.default_rng(0)
    for index in range(count):
        image = images[index % len(images)]
        width = min(image.width, image.height * aspect) * rng.uniform(0.5, 1)
        height = width / aspect
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, min(image.width, left + width), min(image.height, top + height))
        window = image.resize(size, Image.Resampling.LANCZOS, box=box)
        if rng.random() < 0.5:
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        file = io.BytesIO()
        window.save(file, "JPEG", quality=90)
        yield Sample(key=f"{index:06d}", images=(("jpg", file.getvalue()),), record={"captions": ["a photograph"]})


def peer(folder: Path, is_train: bool) -> Iterator[Tensor]:
    preprocess = image_transform(224, is_train=is_train)
    shards = [str(file) for file in sorted(folder.glob("*.tar"))]
    pipeline = wds.WebDataset(shards, shardshuffle=False).decode("pilrgb").to_tuple("jpg", "json")
    for batch, _ in pipeline.map_tuple(preprocess, lambda record: record).batched(BATCH):
        yield batch


def ours(folder: Path, transform: Callable[[bytes], Tensor], normalise: bool = False) -> Iterator[Tensor]:
    with contextlib.redirect_stderr(io.StringIO()):
        shards = ShardSet(folder)
    for start in range(0, shards.counts[0], BATCH):
        numbers = range(start, min(start + BATCH, shards.counts[0]))
        batch = torch.stack([transform(shards.read(0, number).images[0][1]) for number in numbers])
        yield EXACT.normalise(batch) if normalise else batch


def difference(folder: Path, transform: FastTransform) -> tuple[float, float, float]:
    """Mean over all pixels, mean of the worst file, and largest of one pixel."""
    shards, means, largest = ShardSet(folder), [], 0.0
    for number in range(shards.counts[0]):
        data = shards.read(0, number).images[0][1]
        apart = (EXACT.normalise(transform(data)) - EXACT(open_image(data))).abs()
        means.append(float(apart.mean()))
        largest = max(largest, float(apart.max()))
    return statistics.mean(means), max(means), largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=256, help="files in the shard")
    parser.add_argument("--rounds", type=int, default=9, help="passes of each contender over the shard")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"), help="in pixels")
    parser.add_argument("--photographs", type=Path, help="folder of photographs to cut windows from")
    options = parser.parse_args()
    torch.set_num_threads(1)

    fast, draft = FastTransform(EXACT), FastTransform(EXACT, margin=1.0)
    with tempfile.TemporaryDirectory(prefix="bench_transform_") as name:
        folder = Path(name)
        found = photographs(options.photographs)
        write_shards(
            samples(found, options.pictures, tuple(options.size)), folder, source={}, per_shard=options.pictures
        )
        length = sum(file.stat().st_size for file in folder.glob("*.tar")) / options.pictures
        print(f"{options.pictures} windows of {len(found)} photographs, {length / 1000:.0f} kB a sample\n")
        contenders: dict[str, Callable[[], Iterator[Tensor]]] = {
            "webdataset + open_clip, evaluation, float32": lambda: peer(folder, False),
            "webdataset + open_clip, training, float32": lambda: peer(folder, True),
            "exact, float32": lambda: ours(folder, lambda data: EXACT(open_image(data))),
            "fast, uint8": lambda: ours(folder, fast),
            "fast, normalised to float32": lambda: ours(folder, fast, normalise=True),
            "fast with margin 1, uint8": lambda: ours(folder, draft),
            "fast with margin 1, normalised to float32": lambda: ours(folder, draft, normalise=True),
        }
        runs: dict[str, list[float]] = {contender: [] for contender in contenders}
        for turn in range(options.rounds + 1):
            for contender in list(contenders)[:: 1 if turn % 2 else -1]:
                started = time.process_time()
                count = sum(len(batch) for batch in contenders[contender]())
                spent = time.process_time() - started
                assert count == options.pictures
                if turn:  # the first only warms the caches
                    runs[contender].append(spent / count)
        base = next(iter(runs.values()))
        print("| pipeline | ms a picture | pictures/s | ratio | difference: mean, worst file, largest |")
        print("| --- | --- | --- | --- | --- |")
        for contender, times in runs.items():
            ratio = statistics.median(theirs / mine for theirs, mine in zip(base, times, strict=True))
            middle = statistics.median(times)
            apart = "-"
            if contender.startswith("fast"):
                values = difference(folder, draft if "margin" in contender else fast)
                apart = "{:.5f}, {:.5f}, {:.3f}".format(*values)
            print(f"| {contender} | {middle * 1e3:.2f} | {1 / middle:.0f} | {ratio:.2f} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
