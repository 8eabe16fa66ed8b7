"""What a published data set says, entry by entry, before any picture is opened.

Each `source_*.py` reads one family of files into a `Source`: entries in the order of the files, one for each sample to
be, with what could not be used among them and why. Nothing is dropped in silence: `items` counts the published units
(questions, captions, conversations or pairs), and those read are those written and those left out.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visplice.train.data.record import Fault


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Something published that comes into no sample."""

    id: str  # what the source calls it
    fault: str  # a name of FAULTS
    message: str
    items: int = 1  # published units that are lost with it


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One sample to be: its record without pictures, and the names of those."""

    id: str  # what the source calls it
    record: dict[str, Any] | None = None  # None where nothing is left of it
    images: tuple[str, ...] = ()  # file names below the folder of pictures
    caption_file: str | None = None  # below the same folder, in place of captions in the record
    items: int = 1  # published units in the record
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """The entries of a data set, and what names it on every machine: no paths, no times."""

    kind: str
    unit: str  # what is published one by one, in the plural
    files: list[dict[str, Any]]  # name, bytes, sha256
    options: dict[str, Any]  # what else decides the samples
    entries: list[Entry] = field(repr=False)


@contextlib.contextmanager
def many_objects() -> Iterator[None]:
    """For reading a source: millions of objects without a cycle, on which collections would take most of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def refused(identity: object, fault: Fault, *, items: int = 1) -> Entry:
    """An entry of which nothing is left."""
    return Entry(id=shown(identity), items=0, left_out=(left_out(identity, fault, items=items),))


def left_out(identity: object, fault: Fault, *, items: int = 1) -> LeftOut:
    return LeftOut(id=shown(identity), fault=fault.name, message=shown(str(fault), 500), items=items)


def shown(value: object, length: int = 200) -> str:
    """Something out of a source, as text that can be written anywhere."""
    text = "" if value is None else str(value)
    return text[:length].encode("utf-8", "backslashreplace").decode()


def identify(value: object, field_name: str) -> str:
    """An id of JSON, as text.

    Raises:
        Fault: `wrong-type`.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise Fault("wrong-type", f"{field_name} is {type(value).__name__}; it is a number or a string")
    return str(value)


def read_text(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of a source file, and what names the file in a manifest.

    Bytes that are not UTF-8 become lone surrogates, so that they cost the entry that holds them and not the whole file.

    Raises:
        OSError: it cannot be read.
    """
    data = file.read_bytes()
    facts = {"name": shown(file.name), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff"), facts


def parse_json(text: str, file: Path) -> Any:
    """Decodes the whole of a source file.

    Raises:
        ValueError: it is not JSON.
    """
    if not text.strip():
        raise ValueError(f"{file} is empty; the download or copy may have failed")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply to be a data set") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); the download or copy may be cut off") from None


def list_of(content: Any, key: str, file: Path, *, what: str) -> list[Any]:
    """The list that a published file keeps under `key`.

    Raises:
        ValueError: another file was given; the message shows what is in it.
    """
    found = content.get(key) if isinstance(content, dict) else None
    if isinstance(found, list):
        return found
    raise ValueError(f"{file} holds {outline(content)}; {what} holds a list under {key!r}")


def outline(content: Any) -> str:
    """What a JSON file holds, in a few words."""
    if isinstance(content, dict):
        keys = ", ".join(map(shown, list(content)[:8]))
        return f"an object with {keys or 'no keys'}"
    return f"a list of {len(content)}" if isinstance(content, list) else type(content).__name__


def first_layout(folder: Path, names: Iterable[Sequence[str]]) -> int:
    """Which of several usual places the pictures of a data set are in: the first under which any is found.

    Args:
        folder: of the pictures.
        names: for each picture where it may be, below the folder, in the same order of places.
    """
    for places in names:
        for number, name in enumerate(places):
            try:
                if (folder / name).is_file():
                    return number
            except (OSError, ValueError):  # a name that no file can have is dealt with where it is opened
                continue
    return 0


def check_folder(images: Path) -> Path:
    """The folder of pictures.

    Raises:
        ValueError: there is none.
    """
    if not images.is_dir():
        raise ValueError(f"--images {images}: {'a file, not' if images.exists() else 'there is no such'} folder")
    return images
