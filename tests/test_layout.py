"""The folders and who may import whom, read from the source: nothing of the package is imported here."""

import ast
import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("vision", "projector", "lm", "train", "app")
NOT_OURS = {"build", "dist", "demo", "runs"}  # outputs, and so ignored by git

# Which of our folders a folder may import.
MAY_IMPORT = {
    "vision": {"vision", "projector"},
    "projector": {"vision", "projector"},
    "lm": {"vision", "projector", "lm"},
    "train": {"vision", "projector", "lm", "train"},
    "app": {"vision", "projector", "lm", "train", "app"},
}
# Where a package may be imported: folders, or single files.
ONLY_IN = {
    "lightning": ("train/",),
    "pytorch_lightning": (),  # the old name: its classes are not those of `lightning`
    "gradio": ("app/",),
    "fastapi": ("app/",),
    "transformers": ("lm/export.py",),
    "lmms_eval": ("app/lmms/",),
    "accelerate": ("app/lmms/",),
}
# `visplice --help` has to be quick, so these are imported by the verb that needs them.
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "gradio",
    "matplotlib",
    "webdataset",
    "numpy",
    "PIL",
    "jsonargparse",
)

MAX_LINES = 350


def repository_files() -> list[Path]:
    """Files that git tracks or would, else every file outside hidden folders and outputs."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if (ROOT / ".git").exists() and listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = []
        for folder, children, names in os.walk(ROOT):
            children[:] = [c for c in children if not c.startswith((".", "__pycache__")) and c not in NOT_OURS]
            paths += [Path(folder, name) for name in names if ".egg-info" not in folder]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = repository_files()
SOURCES = [path for path in FILES if path.suffix == ".py" and relative(path).split("/")[0] in FOLDERS]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also of those inside functions and by `import_module("...")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(path: str, source: str) -> list[str]:
    """What a file imports against the table above."""
    found, folder = [], path.split("/")[0]
    tree = ast.parse(source)
    for line, name in imported(tree):
        package, _, rest = name.partition(".")
        if package == "visplice" and rest.split(".")[0] not in MAY_IMPORT[folder]:
            found.append(
                f"{path}:{line}: {folder} imports {name}; it may import {', '.join(sorted(MAY_IMPORT[folder]))}"
            )
        if package in FOLDERS:
            found.append(f"{path}:{line}: imports {name}; the package is visplice.{package}")
        if package in ONLY_IN and not path.startswith(ONLY_IN[package]):
            found.append(f"{path}:{line}: imports {package}; only {', '.join(ONLY_IN[package]) or 'nobody'} may")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"{path}:{node.lineno}: relative import")
    return found


def test_imports_point_one_way() -> None:
    assert {relative(path).split("/")[0] for path in SOURCES} == set(FOLDERS)
    assert [v for path in SOURCES for v in violations(relative(path), path.read_text())] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vision/encoder.py", "from visplice.lm.config import LlamaConfig"),
        ("projector/mlp.py", "from visplice import lm"),
        ("lm/decoder.py", "def f():\n    import visplice.train.data"),
        ("train/align.py", "import importlib\nimportlib.import_module('visplice.app.cli')"),
        ("lm/decoder.py", "import lightning.pytorch as pl"),
        ("train/align.py", "from gradio import Blocks"),
        ("lm/checkpoint.py", "import transformers"),
        ("train/align.py", "from pytorch_lightning import Trainer"),
        ("app/score.py", "from lmms_eval.api.model import lmms"),
        ("lm/decoder.py", "from .config import LlamaConfig"),
        ("app/ask.py", "from lm.config import LlamaConfig"),
    ],
)
def test_wrong_import_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vision/encoder.py", "from visplice.projector.mlp import Projector\nimport torch"),
        ("train/align.py", "from lightning.pytorch import Trainer\nfrom visplice.lm.config import LlamaConfig"),
        ("lm/export.py", "import transformers"),
        ("app/chat.py", "import gradio\nfrom visplice.train import scenes"),
    ],
)
def test_right_import_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, visplice.app.cli; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == []


def test_packages_are_the_folders_with_an_init() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [relative(path.parent) for path in FILES if path.name == "__init__.py"]
    assert sorted(setuptools["packages"]) == sorted("visplice." + folder.replace("/", ".") for folder in folders)
    assert setuptools["package-dir"] == {f"visplice.{folder}": folder for folder in FOLDERS}
    without = {relative(path.parent) for path in SOURCES} - set(folders)
    assert without == set(), "folders with Python files need an __init__.py"


def test_package_data_names_every_data_file() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = [
        f"{package.removeprefix('visplice.').replace('.', '/')}/{pattern}"
        for package, listed in package_data.items()
        for pattern in listed
    ]
    for pattern in patterns:
        assert (ROOT / pattern).parent.is_dir(), f"{pattern}: there is no such folder"
    data = [relative(p) for p in FILES if relative(p).split("/")[0] in FOLDERS and p.suffix != ".py"]
    # A star of package-data does not cross a slash, one of fnmatch does.
    shipped = [p for p in data if any(fnmatch.fnmatch(p, q) and p.count("/") == q.count("/") for q in patterns)]
    assert data == shipped, "pyproject.toml's package-data does not name these, so the wheel leaves them out"


@pytest.mark.parametrize("name", [*FOLDERS, "train.data"])
def test_bare_name_is_refused(name: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    top = name.split(".")[0]
    assert f"ImportError: import visplice.{top}, not {top}" in result.stderr


def test_files_stay_short() -> None:
    code = {".py", ".yaml", ".js", ".css", ".html"}
    long = {relative(p) for p in FILES if p.suffix in code and len(p.read_text().splitlines()) >= MAX_LINES}
    assert long == set(), f"a file of {MAX_LINES} lines or more has more than one job"


def test_no_file_names_a_machine_s_folders() -> None:
    pattern = re.compile(rb"(?<![\w.:])/(?:work|root|home|Users|tmp|mnt|opt)/[\w.]")
    found = [
        f"{relative(path)}: {match.group().decode()}" for path in FILES for match in pattern.finditer(path.read_bytes())
    ]
    assert found == []
