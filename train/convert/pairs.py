"""Pictures and captions of one's own: a table (CSV, TSV, parquet), or a folder with a .txt beside each picture."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from visplice.train.convert.captions import Captions
from visplice.train.convert.sources import Entry, Source, check_folder, read_text, refused, shown
from visplice.train.data.record import Fault, check_text
from visplice.vision.image_facts import IMAGE_SUFFIXES

IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "path")
CAPTION_COLUMNS = ("caption", "text", "title")
URL_COLUMNS = ("url", "image_url")


def table_source(
    file: Path, images: Path, *, image_column: str | None = None, caption_column: str | None = None
) -> Source:
    """The rows of a table, those of one picture together.

    Args:
        file: .csv, .tsv or .parquet, with the names of columns.
        images: folder that file names count from; a path from the root has to lead into it.
        image_column, caption_column: names of columns; None finds the usual ones.
    Raises:
        ValueError: another file, or no such column. OSError: it cannot be read.
    """
    check_folder(images)
    parquet = file.suffix.lower() in (".parquet", ".pq")
    columns, rows, facts = _read_parquet(file) if parquet else _read_csv(file)
    image = _column(columns, image_column, IMAGE_COLUMNS, file, "--image-column")
    caption = _column(columns, caption_column, CAPTION_COLUMNS, file, "--caption-column")
    url = next((columns.index(name) for name in URL_COLUMNS if name in columns), None)
    root = os.path.abspath(images)
    groups: dict[str, Captions | Entry] = {}
    for number, row in enumerate(rows, 1):
        identity = f"row {number}"
        try:
            if len(row) != len(columns):
                raise Fault("bad-row", f"row {number} has {len(row)} fields, the table {len(columns)} columns")
            name = row[image]
            if not isinstance(name, str) or not name:
                raise Fault("missing-image", f"row {number} names no picture")
            check_text(name)
        except Fault as fault:
            groups[identity] = refused(identity, fault)
            continue
        fields = {"url": row[url]} if url is not None else {}
        group = groups.setdefault(f"picture {name}", Captions(name, (_below(name, root),), **fields))
        assert isinstance(group, Captions)
        group.add(identity, row[caption] if row[caption] is not None else "")
    options = {"image_column": columns[image], "caption_column": columns[caption]}
    entries = [group.entry(0) if isinstance(group, Captions) else group for group in groups.values()]
    return Source(kind="pairs", unit="pairs", files=[facts], options=options, entries=entries)


def folder_source(images: Path) -> Source:
    """Every picture below a folder, with the caption in the .txt of the same name.

    Raises:
        ValueError: there is no folder.
    """
    check_folder(images)
    names, sizes = [], {}
    for folder, below, files in os.walk(images, onerror=_raise):
        below.sort()
        for file in files:
            path = os.path.join(folder, file)
            name = os.path.relpath(path, images)
            suffix = os.path.splitext(name)[1].lower().removeprefix(".")
            if suffix == "txt" or suffix in IMAGE_SUFFIXES:
                names.append(name)
                sizes[name] = os.stat(path).st_size if os.path.exists(path) else 0
    names.sort()
    listing = "".join(f"{name}\0{sizes[name]}\0" for name in names).encode("utf-8", "surrogateescape")
    texts = {name for name in names if name.lower().endswith(".txt")}
    used: set[str] = set()
    entries = []
    for name in names:
        if name in texts:
            continue
        text = next((text for text in _beside(name) if text in texts), None)
        used.add(text or "")
        entries.append(_pair(name, text))
    lonely = Fault("missing-image", "a .txt with no picture of its name beside it")
    entries += [refused(text, lonely) for text in names if text in texts and text not in used]
    facts = {"name": "files by name and size", "files": len(names), "sha256": hashlib.sha256(listing).hexdigest()}
    return Source(kind="pairs", unit="pairs", files=[facts], options={}, entries=entries)


def _raise(error: OSError) -> None:
    raise error


def _beside(name: str) -> tuple[str, str]:
    stem = os.path.splitext(name)[0]
    return f"{stem}.txt", f"{stem}.TXT"


def _pair(name: str, text: str | None) -> Entry:
    try:
        check_text(name)
        if text is None:
            raise Fault("no-text", f"there is no {os.path.basename(_beside(name)[0])} beside the picture")
    except Fault as fault:
        return refused(name, fault)
    return Entry(id=shown(name), record={"id": name}, images=(name,), caption_file=text)


def _below(name: str, root: str) -> str:
    """A path from the root as one below the folder, where it leads there; the rest is refused where it is opened."""
    plain = os.path.normpath(name)
    return plain.removeprefix(root + os.sep) if plain.startswith(root + os.sep) else name


def _column(columns: Sequence[str], chosen: str | None, usual: Sequence[str], file: Path, flag: str) -> int:
    names = [chosen] if chosen is not None else usual
    for name in names:
        if name in columns:
            return columns.index(name)
    lower = [column.lower() for column in columns]
    for name in names if chosen is None else ():
        if name in lower:
            return lower.index(name)
    shown_columns = ", ".join(map(shown, columns))
    raise ValueError(
        f"{file} has no column of text called {' or '.join(names)}, but {shown_columns or 'none'}; name one with {flag}"
    )


class _Lines:
    """Lines for the CSV reader, with those of the row it is in."""

    def __init__(self, text: str) -> None:
        self._stream = io.StringIO(text, newline="")
        self.of_row: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            self.of_row.append(line)
            yield line


def _read_csv(file: Path) -> tuple[list[str], Iterator[list[Any]], dict[str, Any]]:
    text, facts = read_text(file)
    header = text.partition("\n")[0]
    if "\0" in header:
        raise ValueError(f"{file} is no text; a table is .csv, .tsv or .parquet")
    tabs = file.suffix.lower() == ".tsv" or ("\t" in header and "," not in header)
    lines = _Lines(text)
    rows = csv.reader(iter(lines), delimiter="\t" if tabs else ",")
    columns = [column.strip() for column in next(rows, [])]
    if not columns:
        raise ValueError(f"{file} is empty; the download or copy may have failed")
    return columns, _rows(rows, lines, file), facts


def _rows(rows: Any, lines: _Lines, file: Path) -> Iterator[list[str]]:
    """Rows that are not empty; a quote that is never closed would swallow all rows behind it."""
    lines.of_row.clear()
    last: list[str] = []
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            raise ValueError(f"{file}, line {rows.line_num}: {error}; is a quote not closed before it?") from None
        last = list(lines.of_row)
        lines.of_row.clear()
        if row:
            yield row
    if len(last) > 1:
        try:
            list(csv.reader(last, rows.dialect, strict=True))
        except csv.Error:
            line = rows.line_num - len(last) + 1
            raise ValueError(f"{file}: a quote is opened in line {line} and never closed") from None


def _read_parquet(file: Path) -> tuple[list[str], Iterator[list[Any]], dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet, types
    except ImportError:
        raise ValueError(f"{file}: reading parquet needs pyarrow (pip install 'visplice[data]')") from None
    data = file.read_bytes()
    facts = {"name": shown(file.name), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        schema = parquet.read_schema(io.BytesIO(data))
        # Other columns, pictures among them, may be far larger than all that is wanted here.
        columns = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
        table = parquet.read_table(io.BytesIO(data), columns=columns)
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not parquet ({error})") from None
    return columns, _batches(table), facts


def _batches(table: Any) -> Iterator[list[Any]]:
    for batch in table.to_batches(max_chunksize=10_000):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
