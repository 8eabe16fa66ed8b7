"""`visplice eval` as it is typed: through kills, in two processes, and with mistakes that end in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from visplice.app.cli import main
from visplice.train.scene_data import ANNOTATIONS_FILE, QUESTIONS_FILE, write_test


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_test(folder, count=60, seed=4, questions=3)
    return folder


@pytest.fixture
def words(scenes, tmp_path):
    """The command, with its output in the test's folder."""
    given = {
        "--model": "embedded",
        "--questions": scenes / QUESTIONS_FILE,
        "--annotations": scenes / ANNOTATIONS_FILE,
        "--images": scenes / "images",
        "--out": tmp_path / "out",
    }
    return lambda **changes: [
        "eval",
        "vqav2",
        *(str(word) for pair in (given | {f"--{k}": v for k, v in changes.items()}).items() for word in pair),
    ]


def command(words: list[str], *launcher: str) -> list[str]:
    return [*(launcher or (sys.executable,)), "-m", "visplice.app.cli", *words]


def kill_behind(words: list[str], folder: Path, lines: int) -> None:
    """Runs the command and kills it as soon as that many answers are on disk."""
    process = subprocess.Popen(command(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file, deadline = folder / "answers-0.jsonl", time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_kills_and_two_processes_end_in_the_file_of_a_straight_run(words, tmp_path, capsys):
    assert main(words()) == 0
    printed = capsys.readouterr().out
    assert "prompt: '{question}', at most 16 tokens, greedy" in printed
    assert "vqav2: VQA accuracy 0." in printed and "report.html" in printed
    straight = (tmp_path / "out/predictions.jsonl").read_bytes()

    killed = [*words(out=tmp_path / "killed"), "--batch-size", "2"]
    for lines in (1, 20):
        kill_behind(killed, tmp_path / "killed", lines)
    kept = (tmp_path / "killed/answers-0.jsonl").read_bytes().count(b"\n")
    # Another number of processes takes over what the killed one left.
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1"}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = subprocess.run(command(killed, *launcher), env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert 20 <= kept < 180
    assert (tmp_path / "killed/predictions.jsonl").read_bytes() == straight
    assert json.loads((tmp_path / "killed/report.json").read_text())["made"]["processes"] == 2
    assert run.stdout.count("vqav2: VQA accuracy") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "none"}, "--images none: there is no such folder"),
        ({"prompt": "What?"}, "--prompt is 'What?'; {question} says where the question stands in it"),
        ({"questions": "absent.json"}, "No such file or directory: 'absent.json'"),
        ({"model": "nowhere"}, "nowhere/visplice.json: no such file"),
    ],
)
def test_a_mistake_is_one_line(words, capsys, changes, message):
    assert main(words(**changes)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_files_in_each_other_s_place_are_named(words, scenes, capsys):
    assert main(words(questions=scenes / ANNOTATIONS_FILE)) == 2
    assert "field 'questions' is missing, expected a list" in capsys.readouterr().err


def test_an_unknown_task_and_batches_of_none_are_refused(words, capsys):
    for wrong in (["eval", "gqa"], [*words(), "--batch-size", "0"], [*words(), "--blind", "dark"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    assert "invalid choice: 'gqa'" in capsys.readouterr().err
