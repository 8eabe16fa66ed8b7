"""Where a model comes from: a folder on this machine, or a name on the Hugging Face hub.

Fetching is left to `huggingface_hub`: its cache, and HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they
mean everywhere. Only what is read is fetched: config, tokenizer and one version of the weights; never code.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

# Config and tokenizer, whichever kind it is.
FILES = ("*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt")
# Weights, best first; the first kind that a repository has is fetched. Many have several, and other things beside them.
_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors"),
    ("*.safetensors",),
    ("pytorch_model.bin", "pytorch_model-*.bin"),
    ("consolidated.pth", "consolidated.[0-9][0-9].pth"),
    ("original/consolidated.pth", "original/consolidated.[0-9][0-9].pth"),
)
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([^\s@]+))?")


def resolve(
    source: str | Path, *, revision: str | None = None, files: Sequence[str] = FILES, weights: bool = True
) -> Path:
    """The folder of a model: `source` itself where it is one, otherwise the hub's `owner/name[@revision]`, fetched.

    `revision` is a branch, tag or commit; `files` are patterns of what to fetch from the top of the repository;
    `weights` adds the weights: safetensors where there are any, otherwise `.bin`, otherwise Meta's `.pth`.

    Raises:
        ValueError: `source` is neither, or cannot be fetched: the message says which, why, and what to do.
    """
    if source == "":
        raise ValueError("no model is named; expected a folder, or owner/name on the hub")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{source}: a folder has no revisions, but {revision!r} was asked for")
        return folder
    if folder.exists():
        raise ValueError(f"{source}: a file; expected the folder it lies in")
    match = _NAME.fullmatch(source) if isinstance(source, str) else None
    if match is None or ".." in match[1] or "--" in match[1]:
        raise ValueError(f"{source}: no such folder, and not a name on the hub either: those read owner/name")
    name, asked = match[1], match[2] or revision
    if revision is not None and asked != revision:
        raise ValueError(f"{source}: names revision {asked!r}, but {revision!r} was asked for as well")
    for patterns in _WEIGHTS if weights else ((),):
        fetched = _fetch(name, asked, files, patterns)
        if not weights or any(True for pattern in patterns for _ in fetched.glob(pattern)):
            return fetched
        asked = fetched.name  # the commit: the branch may move between two calls
    raise ValueError(
        f"{name}: holds no weights that can be read; expected model.safetensors, pytorch_model.bin or "
        "consolidated.00.pth, alone or in shards"
    )


def _fetch(name: str, revision: str | None, files: Sequence[str], weights: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    ignored = ["*.py", "adapter_*.safetensors"]
    if any(pattern.startswith("original/") for pattern in weights):
        allowed = [*weights, "original/params.json", "original/tokenizer.model"]
    else:
        allowed = [*files, *weights]
        ignored.append("*/*")  # a pattern matches in every folder, where other precisions and formats lie
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
    except Exception as error:  # the library's own, those of its HTTP client, and those of the system
        raise ValueError(_reason(name, revision, error)) from error


def _reason(name: str, revision: str | None, error: Exception) -> str:
    """One line on what went wrong and what to do, without the library's paragraphs."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = urlsplit(constants.ENDPOINT)
    host = f"{endpoint.scheme}://{endpoint.hostname}" + (f":{endpoint.port}" if endpoint.port else "")
    cache = constants.HF_HUB_CACHE
    causes = list(_causes(error))
    absent = f"{name}: no such folder, and "
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{name}: the disk is full under {cache}; make room, or let HF_HOME name a larger place"
    if isinstance(error, HFValidationError):
        return f"{absent}not a name that the hub would take ({_first_line(error)})"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        part = "only in part" if type(error).__name__ == "IncompleteSnapshotError" else "not"  # not in all versions
        return f"{absent}{part} in the cache {cache}; HF_HUB_OFFLINE is set, unset it to fetch it"
    if isinstance(error, GatedRepoError):
        return f"{name}: gated; ask for access on {host}/{name}, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{name}: no revision {revision!r} on {host}"
    if isinstance(error, RepositoryNotFoundError) and error.response.status_code == 404:
        return f"{absent}no such repository on {host}"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return (
            f"{absent}{host} does not show it ({error.response.status_code}): there is none of this name, or it is "
            "private; `hf auth login` or set HF_TOKEN to one that may read it"
        )
    last = _first_line(causes[-1])
    if isinstance(error, LocalEntryNotFoundError):
        return f"{absent}fetching it from {host} failed ({last}), nor is it whole in the cache {cache}; try again"
    return f"{name}: fetching from {host} failed ({last}); try again"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
