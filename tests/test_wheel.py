"""The wheel as users get it: what is in it, and that it works away from the repository."""

import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from visplice.train import scenes

ROOT = Path(__file__).parents[1]
FOLDERS = ("vision", "projector", "lm", "train", "app")
DATA = ("*/weights/*", "train/configs/*.yaml", "app/assets/*")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} ended with {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools packs whatever an earlier build left in the tree's `build`."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "demo", "runs"
    )
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel alone; everything else is taken from the one that runs the tests.

    That one's site-packages are on the path as a plain folder, so its own `.pth` files, an editable visplice among
    them, do nothing here.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (own / "others.pth").write_text("\n".join(dict.fromkeys(sysconfig.get_path(k) for k in ("purelib", "platlib"))))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--ignore-installed", wheel, cwd=folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info/"
    expected = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    expected |= {path for pattern in DATA for path in ROOT.glob(pattern) if path.is_file()}
    package = {f"visplice/{path.relative_to(ROOT).as_posix()}" for path in expected}
    assert {name for name in names if not name.startswith(info)} == package
    assert f"{info}licenses/LICENSE" in names


def test_wheel_s_own_modules_are_imported(environment: Path, elsewhere: Path) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    code = f"import {', '.join(packages)}\nfor m in ({', '.join(packages)}): print(m.__file__)"
    files = run(environment / "bin" / "python", "-c", code, cwd=elsewhere).split()
    assert len(files) == len(packages)
    assert all(Path(file).is_relative_to(environment) for file in files), files


def test_help(environment: Path, elsewhere: Path) -> None:
    out = run(environment / "bin" / "visplice", "--help", cwd=elsewhere)
    assert "usage: visplice" in out
    assert "doctor" in out


def test_doctor_finds_everything(environment: Path, elsewhere: Path) -> None:
    out = run(environment / "bin" / "visplice", "doctor", cwd=elsewhere)
    assert "everything that the embedded model needs is here" in out
    assert str(environment) in out.splitlines()[0]


def test_ask_sees_where_a_shape_is(environment: Path, elsewhere: Path) -> None:
    def shape(color: str, kind: str, region: str, x: float, y: float) -> scenes.SceneObject:
        return scenes.SceneObject(color, kind, "big", scenes.POSITIONS.index(region), x, y, 0.16)

    objects = (shape("red", "circle", "top left", 0.22, 0.22), shape("blue", "square", "bottom right", 0.78, 0.78))
    picture = elsewhere.parent / "two shapes.png"
    scenes.render(scenes.Scene("white", objects), random.Random(0)).save(picture)
    visplice = environment / "bin" / "visplice"
    out = run(visplice, "ask", "--image", picture, "Where is the red circle?", cwd=elsewhere)
    assert out.strip() == "top left"
    assert list(elsewhere.iterdir()) == []
