"""Loading a checkpoint: time and memory of `Llama.from_pretrained` beside transformers' `from_pretrained`.

    python tests/benchmarks/bench_load.py --gigabytes 1 --rounds 5

Writes a random LLaMA in shards to a temporary folder, in bfloat16 and in float32, and opens both as bfloat16, each time
in a fresh process, one thread, the two contenders by turns. The files are in the page cache: no disk is measured.
`touched` is until one value of every page of every weight was read, since both map what needs no conversion. Neither it
nor `load` counts imports; `process` is all CPU from the start of Python. Memory is the highest resident size during the
load, less what it was after the imports, over the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DIM, FFN, HEADS, KV_HEADS, VOCAB = 2048, 5632, 16, 4, 32_000
CONTENDERS = ("visplice", "transformers")


def write(folder: Path, dtype_name: str, gigabytes: float) -> float:
    """Writes the model with transformers, in shards of a fifth; returns its gigabytes in bfloat16."""
    import torch

    from visplice.vision._torchvision import declare_missing_operators

    declare_missing_operators()
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    layer = DIM * DIM * (2 + 2 * KV_HEADS / HEADS) + 3 * DIM * FFN
    num_layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCAB * DIM) / layer))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    dtype = getattr(torch, dtype_name)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.rand(parameter.shape, generator=generator).mul_(0.04).sub_(0.02).to(dtype)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=f"{int(gigabytes * 200 * dtype.itemsize / 2)}MB")
    return sum(parameter.numel() for parameter in model.parameters()) * 2 / 1e9


def status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def load(contender: str, folder: str) -> dict[str, float]:
    """One load in this process."""
    import torch

    torch.set_num_threads(1)
    if contender == "visplice":
        from visplice.lm import checkpoint, hub, storage  # noqa: F401  imported by the first load otherwise
        from visplice.lm.decoder import Llama as Model
    else:
        from visplice.vision._torchvision import declare_missing_operators

        declare_missing_operators()
        import transformers

        transformers.utils.logging.disable_progress_bar()
        Model = transformers.LlamaForCausalLM

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident size so far
    wall, cpu = time.perf_counter(), time.process_time()
    model = Model.from_pretrained(folder, dtype=torch.bfloat16)
    loaded, loaded_cpu = time.perf_counter() - wall, time.process_time() - cpu
    total = 0.0
    for weight in model.parameters():
        total += weight.detach().flatten()[:: 4096 // weight.itemsize].float().sum().item()
    now = time.process_time()
    weights = sum(weight.nbytes for weight in model.parameters())
    return {
        "load": loaded,
        "load CPU": loaded_cpu,
        "touched CPU": now - cpu,
        "process CPU": now,
        "memory": (status("VmHWM") - before) / weights,
        "total": total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the weights in bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each contender and dtype")
    parser.add_argument("--load", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(*options.load)))
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print("| stored as | loader | load, wall | load, CPU | touched, CPU | process, CPU | memory / weights |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="bench_load_") as name:
        for dtype in ("bfloat16", "float32"):
            folder = Path(name) / dtype
            size = write(folder, dtype, options.gigabytes)
            runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
            for turn in range(options.rounds + 1):
                for contender in CONTENDERS if turn % 2 else CONTENDERS[::-1]:
                    command = [sys.executable, __file__, "--load", contender, str(folder)]
                    result = subprocess.run(command, env=environment, capture_output=True, text=True)
                    if result.returncode:
                        sys.exit(result.stderr)
                    if turn:  # the first only warms the caches
                        runs[contender].append(json.loads(result.stdout.splitlines()[-1]))
            ours, theirs = (runs[contender][0]["total"] for contender in CONTENDERS)
            if abs(ours - theirs) > 1e-3 * max(1, abs(theirs)):
                sys.exit(f"the loaders differ: the sum of the values looked at is {ours} and {theirs}")
            for contender in CONTENDERS:
                row = {key: statistics.median(run[key] for run in runs[contender]) for key in runs[contender][0]}
                times = " | ".join(f"{row[key]:.3f} s" for key in ("load", "load CPU", "touched CPU", "process CPU"))
                print(
                    f"| {dtype}, {size:.2f} GB in bfloat16 | {contender} | {times} | {row['memory']:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
