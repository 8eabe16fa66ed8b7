"""Kills a data job at random moments, runs it again, and compares every byte with a run that nobody disturbed.

    python tests/kill_and_rerun.py convert --kills 20 --seed 0 --log kills.log
    python tests/kill_and_rerun.py encode --kills 20 --seed 0 --log kills.log --in-a-row 5

Each kill is a SIGKILL to the whole process group, workers included, somewhere between the start and the end of the run.
What is then visible in the folder has to be whole: every file that the finished folder has as well has to equal it
already. Exit status 1 where anything differs, or a rerun fails.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

VISPLICE = [sys.executable, "-m", "visplice.app.cli", "data"]
NUM_PICTURES = 48


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job: what to run first, what to kill, and the files that it may have beside the final ones until it ends."""

    first: tuple[list[str], ...] = ()
    killed: list[str]  # without --out
    unfinished: tuple[str, ...]  # names
    finished: str  # suffix of the files that it makes one by one


def jobs(folder: Path, entries: int) -> dict[str, Job]:
    """The jobs, over a folder that `make_data` filled."""
    source = ["llava", "--json", str(folder / "items.json"), "--images", str(folder / "images")]
    shards = str(folder / "shards")
    per_shard = str(max(1, entries // 60))
    return {
        "convert": Job(
            killed=["convert", *source, "--per-shard", per_shard, "--workers", "2"],
            unfinished=(".convert-1-of-1.jsonl",),
            finished=".tar",
        ),
        "encode": Job(
            first=(["convert", *source, "--captions", "--per-shard", per_shard, "--out", shards],),
            killed=["encode", shards, "--tokens", "--workers", "2", "--batch-size", "16"],
            unfinished=("encoding.json",),
            finished=".safetensors",
        ),
    }


def make_data(folder: Path, seed: int, entries: int) -> None:
    """Pictures of noise, of which some are broken, and a LLaVA JSON that names each of them many times."""
    numbers = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for index in range(NUM_PICTURES):
        pixels = numbers.integers(0, 256, (240, 320, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=80)
        data = stream.getvalue()
        data = {7: data[: len(data) // 2], 11: b"", 13: b"no picture"}.get(index, data)
        (folder / "images" / f"{index:04d}.jpg").write_bytes(data)
    items = [
        {
            "id": f"item {index}",
            "image": f"{index % (NUM_PICTURES + 1):04d}.jpg",  # the last is not there
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": f"number {index}"},
            ],
        }
        for index in range(entries)
    ]
    (folder / "items.json").write_text(json.dumps(items))


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: so many seconds behind the start, or behind the moment when so many files were finished.

    Counting files keeps the kills spread over the work on a machine whose speed changes from run to run.
    """

    files: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s behind {f'file {self.files}' if self.files else 'the start'}"


def draw(random_: random.Random, seconds: float, startup: float, whole: int) -> Moment:
    """A random moment of a run of so many seconds, of which the first file took `startup`: one in four before it."""
    if random_.random() < 0.25:
        return Moment(files=0, seconds=random_.uniform(0, startup))
    return Moment(files=random_.randint(1, whole), seconds=random_.uniform(0, 2 * (seconds - startup) / whole))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def run(words: list[str]) -> float:
    """Runs a command of `visplice data` to its end; returns its seconds."""
    start = time.monotonic()
    result = subprocess.run([*VISPLICE, *words], capture_output=True, text=True, timeout=600)
    if result.returncode:
        sys.exit(f"{' '.join(words)}: status {result.returncode}\n{result.stdout}{result.stderr}")
    return time.monotonic() - start


def ends_before(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def run_killed(words: list[str], out: Path, job: Job, moment: Moment) -> bool:
    """Runs a command and kills it with all its workers; returns whether it was still there."""
    process = subprocess.Popen(
        [*VISPLICE, *words, "--out", str(out)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while moment.files and len(list(out.glob(f"*{job.finished}"))) < moment.files:
        if ends_before(process, 0.002):
            return False
    if ends_before(process, moment.seconds):
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def differences(found: dict[str, bytes], final: dict[str, bytes], job: Job, *, ended: bool) -> list[str]:
    """What is wrong with a folder: after a kill, or when the job has ended."""
    wrong = [f"{name} differs" for name, data in found.items() if name in final and data != final[name]]
    for name in found.keys() - final.keys():
        if ended or not (name in job.unfinished or name.endswith(".partial")):
            wrong.append(f"{name} is left over")
    for name, data in found.items():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                tar.getmembers()
    return wrong + ([f"{name} is missing" for name in final.keys() - found.keys()] if ended else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("convert", "encode"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entries", type=int, default=3000, help="samples of the data (default: %(default)s)")
    parser.add_argument(
        "--in-a-row", type=int, default=1, help="kills of one folder before a run that ends (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, help="a line for each kill goes here as well")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    failed = midway = 0
    with tempfile.TemporaryDirectory() as name, open(options.log or os.devnull, "a", encoding="utf-8") as log:

        def tell(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        folder = Path(name)
        make_data(folder, options.seed, options.entries)
        job = jobs(folder, options.entries)[options.job]
        for words in job.first:
            run(words)
        seconds = run([*job.killed, "--out", str(folder / "final")])
        made = sorted(file.stat().st_mtime for file in (folder / "final").glob(f"*{job.finished}"))
        startup = max(0.0, seconds - (made[-1] - made[0]))
        final = content(folder / "final")
        whole = sum(name.endswith(job.finished) for name in final)
        tell(f"{options.job}: undisturbed {seconds:.2f} s, {len(final)} files, {whole} of them *{job.finished}")
        rounds = [min(options.in_a_row, options.kills - n) for n in range(0, options.kills, options.in_a_row)]
        for number, kills in enumerate(rounds, 1):
            out = folder / f"round-{number}"
            wrong: list[str] = []
            drawn = (draw(moments, seconds, startup, whole) for _ in range(kills))
            for moment in sorted(drawn, key=lambda moment: (moment.files, moment.seconds)):
                killed = run_killed(job.killed, out, job, moment)
                there = content(out)
                midway += killed
                wrong += differences(there, final, job, ended=not killed)
                done = sum(name.endswith(job.finished) for name in there)
                partial = sum(name.endswith(".partial") for name in there)
                state = f"{number:3} {'killed' if killed else 'ended before'} {moment}:"
                tell(f"{state:42} {done:3} of {whole} files whole, {partial} partial")
            again = run([*job.killed, "--out", str(out)])
            wrong += differences(content(out), final, job, ended=True)
            failed += kills if wrong else 0
            tell(f"{number:3} run again, {again:.2f} s: {', '.join(wrong) or 'identical'}")
        same = options.kills - failed
        tell(f"{options.job}: {same} of {options.kills} kills ({midway} midway), identical to the undisturbed run")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
