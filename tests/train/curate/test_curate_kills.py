"""A curating run that is killed, anywhere, leaves the data set as it was or as it is to be."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from visplice.train.curate.curate import applied, curate, make_filter, undo


class Killed(BaseException):
    """What nobody catches."""


def ending(real, calls, *arguments, **options):
    """Does what it is asked as often as there are calls; from then on nothing reaches the disk."""
    if next(calls, None) is None:
        raise Killed
    return real(*arguments, **options)


@pytest.mark.parametrize("work", ["apply", "undo", "redo"])
def test_ended_anywhere_the_data_are_as_before_or_as_after(folder, monkeypatch, work, read, put):
    """Every call that changes the disk is once the last."""

    def prepare():
        undo(folder, "all")
        if work != "apply":
            put(folder, "duplicate-lines")
            put(folder, "privacy")

    def act():
        if work == "apply":
            put(folder, "duplicate-lines")
        else:
            undo(folder, *{"undo": ["privacy"], "redo": ["duplicate-lines"]}[work], later="redo")

    prepare()
    before = read(folder)
    act()
    after = read(folder)
    assert before != after
    seen, last = set(), 0
    while True:
        prepare()
        calls = iter(range(last))
        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, partial(ending, getattr(os, name), calls))
            try:
                act()
                ended = False
            except Killed:
                ended = True
        state = read(folder)
        assert state in (before, after)
        seen.add(str(state))
        if not ended:
            break
        if state == before:  # the next run does it
            act()
            assert read(folder) == after
        last += 1
    assert last >= 2 and len(seen) == 2


def test_killed_for_real_the_data_are_as_before_or_as_after(tmp_path, write, read, put):
    folder = tmp_path / "data"
    write(folder, count=400, per_shard=40)
    before = read(folder)
    words = [sys.executable, "-m", "visplice.app.cli", "data", "curate", str(folder), "near-lines", "--workers", "2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True) as process:
        process.stderr.read(20)  # the progress bar: it has begun
        time.sleep(random.random() * 0.3)
        process.kill()
    if applied(folder):  # it was done sooner
        undo(folder, "all")
    assert read(folder) == before
    deadline = time.monotonic() + 60
    while True:  # workers of a killed run notice within a moment
        try:
            entry = put(folder, "near-lines")
            break
        except BlockingIOError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    undo(folder, "all")
    assert put(folder, "near-lines")["sha256"] == entry["sha256"]


def test_a_worker_that_dies_is_said_and_nothing_is_applied(folder, monkeypatch, content):
    before = content(folder)

    class Dying(type(make_filter("privacy", {}))):
        def measure(self, sample):
            if sample.key == "s20":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().measure(sample)

    monkeypatch.setattr(sys.modules[__name__], "Dying", Dying, raising=False)
    Dying.__qualname__ = "Dying"
    with pytest.raises((ChildProcessError, OSError), match=r"worker process .*nothing was applied"):
        curate(folder, Dying(), workers=2)
    assert content(folder) == before
