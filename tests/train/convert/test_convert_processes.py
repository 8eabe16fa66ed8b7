"""Convert as processes: interrupted, orphaned, out of memory, and on a disk that takes no more."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from PIL import Image

from visplice.train.convert.convert import convert
from visplice.train.convert.llava import llava_source
from visplice.train.data.workers import Lock, run_tasks

COMMAND = [sys.executable, "-m", "visplice.app.cli", "data", "convert", "llava"]


def make(folder, count, side):
    """Items of which every fifth has no picture, in shards of three."""
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        if index % 5:
            image = Image.effect_noise((side, side), 50).convert("RGB")
            image.save(folder / "images" / f"{index}.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    items = [{"id": str(index), "image": f"{index}.jpg", "conversations": turns} for index in range(count)]
    (folder / "items.json").write_text(json.dumps(items))
    return folder


def start(data, out):
    convert(llava_source(data / "items.json"), out, images=data / "images", per_shard=3)


def words(data, out, *more):
    return ["--json", f"{data}/items.json", "--images", f"{data}/images", "--per-shard", "3", "--out", str(out), *more]


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data that takes a while."""
    return make(tmp_path_factory.mktemp("data"), 180, side=400)


@pytest.fixture(scope="module")
def final(data):
    """Every file of an undisturbed run."""
    start(data, data / "final")
    return content(data / "final")


@contextlib.contextmanager
def running(data, out, *more, **options):
    """The command in a process group of its own, from its first finished shard on."""
    process = subprocess.Popen(
        [*COMMAND, *words(data, out, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs in background
    )
    try:
        while not list(out.glob("*.tar")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_interrupt_ends_all_processes_and_leaves_no_partial_file(data, final, tmp_path):
    out = tmp_path / "out"
    with running(data, out, "--workers", "2") as process:
        os.killpg(process.pid, signal.SIGINT)
        stderr = process.communicate(timeout=10)[1].decode()
    assert (process.returncode, stderr.splitlines()[-1]) == (130, "visplice: interrupted")
    assert "Traceback" not in stderr
    assert {file.suffix for file in out.iterdir()} == {".tar", ".jsonl"}
    start(data, out)
    assert content(out) == final


def test_workers_do_not_outlive_their_parent_and_the_next_run_waits_for_them(data, final, tmp_path):
    out = tmp_path / "out"
    with running(data, out, "--workers", "2") as process:
        process.kill()
        process.wait()
        start(data, out)
    assert content(out) == final


def test_worker_that_dies_is_an_error_and_no_hang():
    with open(os.devnull) as file:
        run = partial(run_tasks, num_workers=2, lock=Lock(file.fileno()), preload="json")
        with pytest.raises(ChildProcessError, match=r"killed \(SIGKILL\), as happens when memory runs out.*--workers"):
            list(run(signal.raise_signal, [signal.SIGKILL] * 3))
        with pytest.raises(ChildProcessError, match="ended with status 5"):
            list(run(os._exit, [5]))
        with pytest.raises(FileNotFoundError, match="nowhere") as error:
            list(run(os.stat, ["/nowhere"]))
        assert "in _serve" in error.value.__notes__[0]
        assert sorted(run(str.upper, ["a", "b", "c"])) == ["A", "B", "C"]


def test_file_that_cannot_grow_stops_workers_with_one_line(data, tmp_path):
    out = tmp_path / "out"
    result = subprocess.run(
        [*COMMAND, *words(data, out, "--workers", "2")],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"visplice: [Errno 27] File too large: '{out}/shard-0")
    assert list(out.glob("*.tar*")) == []
