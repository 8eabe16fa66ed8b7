"""Every command and every Python block of the README does what it says."""

import re
import shlex
from pathlib import Path

import pytest

from visplice.app.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def test_there_are_commands() -> None:
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_target_exists(command: str) -> None:
    target = shlex.split(command)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "visplice " in c and "visplice.train" not in c])
def test_arguments_are_understood(command: str) -> None:
    words = shlex.split(command)
    assert words[0] == ".venv/bin/visplice"
    parsed, rest = build_parser().parse_known_args(words[1:])
    assert parsed.verb == words[1]
    assert not rest or parsed.verb in ("align", "instruct")


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"(?:app/assets|docs)/[\w.]+", README):
        assert (ROOT / name).is_file(), name


def test_python_block_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(compile(block, "README.md", "exec"), {})
    assert re.fullmatch(r"\['\d'\]", capsys.readouterr().out.strip())


def test_rebuild_command_is_understood() -> None:
    (command,) = [c for c in COMMANDS if "visplice.train.backbones" in c]
    help_text = (ROOT / "train/backbones.py").read_text()
    for flag in re.findall(r"--[\w-]+", command):
        assert f'"{flag}"' in help_text
