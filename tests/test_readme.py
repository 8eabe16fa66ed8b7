"""Every command of the README and the recipes, and every Python block, does what it says."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from visplice.app.cli import build_parser, main
from visplice.train.scene_data import write_training

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs/training.md").read_text()


def blocks(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, flags=re.S)


COMMANDS = [
    line.split("#")[0].strip()
    for block in blocks(README + TRAINING)
    for line in block.replace("\\\n", " ").splitlines()
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
    words = shlex.split(command.split(" > ")[0])
    assert words[0] == ".venv/bin/visplice"
    parsed, rest = build_parser().parse_known_args(words[1:])
    assert parsed.verb == words[1]
    assert not rest or parsed.verb in ("align", "instruct")


def test_recipe_from_pictures_to_answers_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As it stands, but for the number of steps and the page that waits for a browser."""
    (tmp_path / "app").symlink_to(ROOT / "app")
    monkeypatch.chdir(tmp_path)
    recipe, _, lora, *_ = blocks(TRAINING)
    shell, commands = recipe.split("END\n.venv", 1)
    subprocess.run(["bash", "-euc", shell + "END\n"], check=True)
    for line in f".venv{commands}{lora}".replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"max_steps \d+", "max_steps 2", line), comments=True)
        if words[1] != "chat":
            assert main(words[1:]) == 0, line
    said = capfd.readouterr().out
    assert "6 read, 6 written, 0 skipped" in said and "val/token_accuracy" in said
    before, after = (tmp_path / f"runs/own/{name}/projector.safetensors" for name in ("instruct", "unmerged"))
    assert before.read_bytes() == after.read_bytes()


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"(?:app/assets|docs)/[\w.-]+\w", README):
        assert (ROOT / name).is_file(), name


PYTHON = dict(enumerate(re.findall(r"```python\n(.*?)```", README, flags=re.S)))
PRINTS = {0: r"\['\d'\]", 1: r"\['.*'\]", 2: r"circle"}


@pytest.mark.parametrize("number", PYTHON)
def test_python_block_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that holds what the block reads: shards as the demo writes them."""
    write_training(tmp_path / "runs/demo/data/train", count=16, seed=0)
    for name in ("app", "lm"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[number], "README.md", "exec"), {})
    assert re.fullmatch(PRINTS[number], capsys.readouterr().out.strip().splitlines()[-1])


def test_rebuild_command_is_understood() -> None:
    (command,) = [c for c in COMMANDS if "visplice.train.backbones" in c]
    help_text = (ROOT / "train/backbones.py").read_text()
    for flag in re.findall(r"--[\w-]+", command):
        assert f'"{flag}"' in help_text
