"""Three kills of each job that can be gone on with; `tests/kill_and_rerun.py` takes more."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "kill_and_rerun.py"


@pytest.mark.parametrize(("job", "entries"), [("convert", 600), ("encode", 240)])
def test_killed_job_run_again_gives_the_same_bytes(job, entries):
    words = [job, "--kills", "3", "--in-a-row", "3", "--seed", "5", "--entries", str(entries)]
    result = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert f"{job}: 3 of 3 kills" in result.stdout.splitlines()[-1]
    assert " killed " in result.stdout


def test_program_sees_what_is_wrong():
    spec = importlib.util.spec_from_file_location("kill_and_rerun", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program
    spec.loader.exec_module(program)
    job = program.Job(killed=[], unfinished=("journal",), finished=".bin")
    final = {"a.bin": b"whole", "manifest": b"{}"}
    fine = {"a.bin": b"whole", "b.bin.partial": b"ha", "journal": b""}
    assert program.differences(fine, final, job, ended=False) == []
    assert program.differences(final, final, job, ended=True) == []
    assert sorted(program.differences(fine, final, job, ended=True)) == [
        "b.bin.partial is left over",
        "journal is left over",
        "manifest is missing",
    ]
    assert program.differences({"a.bin": b"who"}, final, job, ended=False) == ["a.bin differs"]
    assert program.differences({"c.bin": b""}, final, job, ended=False) == ["c.bin is left over"]
