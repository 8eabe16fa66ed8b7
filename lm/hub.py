"""Where a model comes from: a folder on this machine, or a name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.tiktoken")


def resolve(source: str | Path, *, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """The folder of a model: `source` itself where it is one, otherwise the hub's `owner/name[@revision]`, fetched.

    Raises:
        ValueError: `source` is neither.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        raise ValueError(f"{source}: no such folder")
    return folder
