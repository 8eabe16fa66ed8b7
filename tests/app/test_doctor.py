import argparse
import importlib
import importlib.metadata
from pathlib import Path

import pytest

from visplice.app import doctor


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every file that is looked for, in place of the shipped ones."""
    for package, names in doctor.WEIGHTS.items():
        (tmp_path / package).mkdir()
        for name in names:
            (tmp_path / package / name).write_bytes(bytes(2048))
    monkeypatch.setattr(doctor, "_folder", lambda package: tmp_path / package)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return doctor.main(argparse.Namespace()), capsys.readouterr().out


def without(names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def lacking(name: str) -> str:
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", lacking)


def test_all_here(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys)
    assert status == 0
    assert out.endswith("\neverything that the embedded model needs is here\n")
    assert "encoder.safetensors 2.0 KiB" in out


def test_every_dependency_has_a_row_and_values_are_aligned(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line for line in run(capsys)[1].splitlines()[:-1] if line]
    labels = {row.split()[0] for row in rows}
    assert labels >= {"torch", "torchvision", "timm", "lightning", "gradio", "webdataset", "tokenizers", "safetensors"}
    assert labels >= {"visplice", "Python", "platform", "CPU", "MPS", "memory", "disk", *doctor.OPTIONAL}
    column = rows[0].index(importlib.metadata.version("visplice"))
    assert all(row[column - 1] == " " and row[column] != " " for row in rows)


def test_missing_and_empty_weights_are_listed(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (weights / "lm" / "tokenizer.json").unlink()
    (weights / "lm" / "model.safetensors").write_bytes(b"")
    status, out = run(capsys)
    assert status == 1
    assert f"{weights / 'lm'} lacks model.safetensors, tokenizer.json: install visplice anew" in out
    assert "vision lacks" not in out


def test_missing_dependency_is_listed_with_its_command(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without({"gradio"}, monkeypatch)
    status, out = run(capsys)
    assert status == 1
    assert "gradio: python -m pip install 'gradio>=" in out


def test_missing_optional_package_is_no_fault(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without({"playwright"}, monkeypatch)
    status, out = run(capsys)
    assert status == 0
    assert "not installed (needed for the tests of the chat page in a real browser" in out


def test_broken_torch_is_named(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import_module = importlib.import_module

    def broken(name: str, package: str | None = None) -> object:
        if name == "torch":
            raise OSError("libtorch.so: cannot open shared object file\nmore")
        return import_module(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    status, out = run(capsys)
    assert status == 1
    assert "does not import (libtorch.so: cannot open shared object file); install it anew" in out


def test_requirements_leave_out_the_extras() -> None:
    requirements = doctor._requirements()
    assert requirements["jsonargparse"].startswith("jsonargparse[signatures]")
    assert {"torch", "gradio"} <= requirements.keys()
    assert "pytest" not in requirements
