"""`visplice doctor`: versions, devices and shipped weights, and what is missing with what to do about it."""

import argparse
import importlib
import importlib.metadata
import importlib.resources
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from visplice.app.memory import main_memory, size_text

# Distributions that only some work needs: name on the index, and the work.
OPTIONAL = {
    "transformers": "the tests, which compare the decoder and the encoder with it",
    "playwright": "the tests of the chat page in a real browser",
}
# Files without which the embedded model cannot be built, in the folder `weights` of each package.
WEIGHTS = {
    "vision": ("encoder.safetensors",),
    "lm": ("config.json", "model.safetensors", "tokenizer.json"),
    "projector": ("visplice.json", "projector.safetensors"),
}


def main(args: argparse.Namespace) -> int:
    """Prints what is here; 0 if the embedded model can run, 1 if something that it needs is missing."""
    missing: list[str] = []
    rows = [
        ("visplice", f"{_version('visplice') or 'not installed'}, {Path(__file__).parents[1]}"),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("platform", f"{platform.platform()}, {os.cpu_count()} logical CPUs"),
        ("", ""),
    ]
    rows += _torch_rows(missing)
    rows += [("", ""), *_dependency_rows(missing), *_optional_rows()]
    rows += [("", ""), ("memory", _memory()), ("disk", f"{size_text(shutil.disk_usage('.').free)} free in this folder")]
    rows += [(f"{package} weights", _weights(package, names, missing)) for package, names in WEIGHTS.items()]
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        print(f"{label:{width}}{value}".rstrip())
    print()
    if missing:
        print("missing for the embedded model:")
        print("\n".join(f"  {line}" for line in missing))
        return 1
    print("everything that the embedded model needs is here")
    return 0


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, str]:
    """What visplice depends on without its extras: distribution to requirement as written."""
    written = importlib.metadata.requires("visplice") or []
    plain = [requirement for requirement in written if "extra ==" not in requirement]
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0]: requirement for requirement in plain}


def _dependency_rows(missing: list[str]) -> list[tuple[str, str]]:
    try:
        requirements = _requirements()
    except importlib.metadata.PackageNotFoundError:
        missing.append("visplice itself is not installed; in a clone: python -m pip install -e .")
        return []
    rows = []
    for name, requirement in requirements.items():
        version = _version(name)
        if version is None:
            missing.append(f"{name}: python -m pip install '{requirement}'")
        if name != "torch":  # has its own rows
            value = version or "not installed"
            rows.append((name, f"{value}, {_operators()}" if name == "torchvision" and version else value))
    return rows


def _optional_rows() -> list[tuple[str, str]]:
    return [
        (name, _version(name) or f"not installed (needed for {purpose}: python -m pip install {name})")
        for name, purpose in OPTIONAL.items()
    ]


def _operators() -> str:
    try:
        declared = importlib.import_module("visplice.vision._torchvision")
        declared.declare_missing_operators()
        if declared._library is None:
            return "compiled operators fit this torch"
        return "compiled operators do not fit this torch; their declarations are enough here"
    except Exception as error:  # a broken torch can fail in any way, and the doctor lives on
        return f"does not import: {_first_line(error)}"


def _torch_rows(missing: list[str]) -> list[tuple[str, str]]:
    if _version("torch") is None:
        return [("torch", "not installed")]
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:  # an OSError for a library, an ImportError, a RuntimeError
        missing.append(f"torch {_version('torch')} does not import ({_first_line(error)}); install it anew")
        return [("torch", f"{_version('torch')}, does not import")]
    build = "CPU build"
    if torch.version.cuda or getattr(torch.version, "hip", None):
        build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else f"ROCm {torch.version.hip} build"
    rows = [("torch", f"{torch.__version__}, {build}, threads: {torch.get_num_threads()}")]
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    bf16 = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if capabilities.get(name)]
    level = torch.backends.cpu.get_cpu_capability()
    rows.append(("CPU", f"{level}, bf16 {'by ' + ', '.join(bf16) if bf16 else 'emulated (slower than float32)'}"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            rows.append((f"cuda:{index}", f"{name}, {size_text(free)} of {size_text(total)} free"))
    else:
        rows.append(("CUDA devices", "none"))
    rows.append(("MPS", "yes" if torch.backends.mps.is_available() else "none"))
    return rows


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _memory() -> str:
    known = main_memory()
    return f"{size_text(known[0])} of {size_text(known[1])} available" if known else "unknown"


def _folder(package: str) -> Path:
    return Path(str(importlib.resources.files(f"visplice.{package}"))) / "weights"


def _weights(package: str, names: tuple[str, ...], missing: list[str]) -> str:
    folder = _folder(package)
    sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    absent = [name for name in names if not sizes.get(name)]
    if absent:
        fix = f"install visplice anew, in a clone: git checkout -- {package}/weights"
        missing.append(f"{folder} lacks {', '.join(absent)}: {fix}")
    return ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items()) or "none"
