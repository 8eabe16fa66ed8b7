"""Stage 1 from pictures and from cached features: pairs per CPU second of whole training steps on one core.

    python tests/benchmarks/bench_features.py --dtype bfloat16 --rounds 3

ViT-L/14 at 196 pixels and a table of 32,000 x 4,096 embeddings, both random; a projector 1024 -> 1024 -> 4096. Both
contenders are `visplice align` as it is, with its loader, Lightning's trainer, clipping, AdamW and logging, one thread,
no workers, by turns. A step from pictures decodes 480 x 640 JPEGs (--data.decode fast), runs the encoder, looks up the
captions' embeddings, and trains the projector; a step from features reads and trains. What is timed is from the end of
one step to the end of the next; the first step of every turn is left out. Encoding pays once for what every epoch
saves, so its pictures per second are told, too.

The features that are trained on have their format and sizes from `visplice data encode`, run on a few pictures first,
and random content: 16,384 pictures would take hours. So the files are larger than any cache of the CPU; they lie in the
page cache: no disk is measured.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from visplice.lm.checkpoint import write_llama
from visplice.lm.config import LlamaConfig
from visplice.lm.decoder import Llama
from visplice.lm.extension import embedded_folder
from visplice.train.align import Align
from visplice.train.data.module import ShardData
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_json, write_shards
from visplice.train.features.encode import EncodeConfig, encode
from visplice.train.features.files import weigh, write_features
from visplice.train.optim import OptimConfig
from visplice.train.trainer import quiet_lightning
from visplice.vision.encoder import EncoderConfig, VisionEncoder

D_VISION, D_LM, VOCAB = 1024, 4096, 32_000
PER_FILE, FILES = 1024, 16
WORDS = "a photograph of two small dogs beside the red car in front of an old house".split()
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}


def write_backbones(folder: Path) -> EncoderConfig:
    """Random weights in their files."""
    config = EncoderConfig(model="vit_large_patch14_clip_quickgelu_224", weights=None, image_size=196)
    save_file(VisionEncoder(config).vit.state_dict(), folder / "vit.safetensors")
    shape = {"num_layers": 1, "num_heads": 32, "num_kv_heads": 1, "ffn_dim": 256, "tie_embeddings": True}
    llama = LlamaConfig(vocab_size=VOCAB, dim=D_LM, **shape)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Llama(llama).state_dict().items()}

    def weight(name: str) -> torch.Tensor:
        return torch.rand(shapes[name], generator=generator).sub_(0.5).mul_(0.04)

    write_llama(llama, weight, folder / "llama", dtype=torch.bfloat16)
    shutil.copy(embedded_folder("lm") / "tokenizer.json", folder / "llama")
    return EncoderConfig(**{**config.to_dict(), "weights": str(folder / "vit.safetensors")})


def pictures(count: int) -> Any:
    """JPEGs of 480 x 640 with detail of all sizes, and a caption for each."""
    numbers = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(numbers.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480))
        noise = numbers.normal(0, 12, (480, 640, 3))
        stream = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
        caption = " ".join(numbers.choice(WORDS, 12))
        yield Sample(key=f"p{number:05d}", images=(("jpg", stream.getvalue()),), record={"captions": [caption]})


def write_many(few: Path, many: Path) -> None:
    """A folder of features with the parts and the form of `few`, and random content."""
    many.mkdir()
    manifest = json.loads((few / "features.json").read_text())
    generator = torch.Generator().manual_seed(0)
    files = []
    for index in range(FILES):
        keys = [f"p{index * PER_FILE + number:08d}".encode() for number in range(PER_FILE)]
        steps = torch.arange(PER_FILE + 1)[:, None]
        tensors = {
            "cls": torch.randn(PER_FILE, D_VISION, generator=generator).bfloat16(),
            "captions": torch.randn(PER_FILE, D_LM, generator=generator).mul_(0.01).bfloat16(),
            "offsets": steps * torch.tensor([1, 1, len(keys[0])]),
            "keys": torch.tensor(list(b"".join(keys)), dtype=torch.uint8),
            "scale": torch.randn(1, 197, D_VISION, generator=generator).bfloat16(),
        }
        file = many / f"features-{index:06d}.safetensors"
        write_features(file, tensors, {})
        counts = {name: PER_FILE for name in ("samples", "pictures", "captions")}
        files.append({"name": file.name, "shard": "", **counts, "scale": 1, **weigh(file), "tokens": None})
    totals = {name: sum(entry[name] for entry in files) for name in ("samples", "pictures", "captions", "bytes")}
    write_json(many / "features.json", {**manifest, **totals, "files": files})


def train(module: Align, data: str, out: Path, *, batch_size: int, steps: int, dtype: str) -> list[float]:
    """CPU seconds of `steps` steps."""
    import lightning as L  # behind visplice.train, which lets torchvision be imported

    seconds: list[float] = []

    class Clock(L.Callback):
        last: float | None = None

        def on_train_batch_end(self, *_: Any) -> None:
            now = time.process_time()
            if self.last is not None:
                seconds.append(now - self.last)
            self.last = now

    trainer = L.Trainer(
        max_steps=steps + 1,
        max_epochs=-1,
        accelerator="cpu",
        precision=PRECISIONS[dtype],  # type: ignore[arg-type]
        gradient_clip_val=1.0,
        callbacks=[Clock()],
        logger=L.pytorch.loggers.CSVLogger(str(out)),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
        default_root_dir=out,
    )
    trainer.fit(module, ShardData(data, batch_size=batch_size))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=PRECISIONS, default="bfloat16", help="of both (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--pictures", type=int, default=96, help="of the data set")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step from pictures")
    parser.add_argument("--cached-batch", type=int, default=512, help="pairs of a step from features")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn from pictures")
    parser.add_argument("--cached-steps", type=int, default=40, help="timed steps of a turn from features")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quiet_lightning()
    with tempfile.TemporaryDirectory(prefix="bench_features_") as name:
        folder = Path(name)
        encoder = write_backbones(folder)
        lm = str(folder / "llama")
        write_shards(pictures(options.pictures), folder / "data", source={}, per_shard=32)
        config = EncodeConfig(
            data=str(folder / "data"),
            out=str(folder / "few"),
            encoder=encoder,
            lm=lm,
            workers=1,
            batch_size=32,
            dtype=getattr(torch, options.dtype),
        )
        start = time.process_time()
        each = encode(config)["bytes"]
        encoded = options.pictures / (time.process_time() - start)
        write_many(folder / "few", folder / "many")
        optim = OptimConfig(lr=1e-3)
        modules = {
            "pictures": Align(encoder, lm, optim=optim),
            "features": Align(encoder, lm, optim=optim, features=str(folder / "many")),
        }
        plans = {
            "pictures": (str(folder / "data"), {"batch_size": options.batch, "steps": options.steps}),
            "features": (str(folder / "many"), {"batch_size": options.cached_batch, "steps": options.cached_steps}),
        }
        seconds: dict[str, list[float]] = {what: [] for what in modules}
        for turn in range(options.rounds):
            for what in list(modules)[:: 1 if turn % 2 else -1]:
                data, plan = plans[what]
                seconds[what] += train(modules[what], data, folder / "runs", dtype=options.dtype, **plan)
                print(f"  turn {turn + 1}, {what}: {statistics.median(seconds[what]):.4f} s a step", flush=True)
        rates = {what: plans[what][1]["batch_size"] / statistics.median(seconds[what]) for what in modules}
    print(f"encoding {encoded:.2f} pictures per CPU second, start-up included; {each:,} bytes of {options.pictures}")
    print("| stage 1 from | dtype | batch | pairs per CPU second | times |")
    print("| --- | --- | --- | --- | --- |")
    for what, (_, plan) in plans.items():
        print(
            f"| {what} | {options.dtype} | {plan['batch_size']} | {rates[what]:,.2f} | "
            f"{rates[what] / rates['pictures']:,.0f} |"
        )


if __name__ == "__main__":
    main()
