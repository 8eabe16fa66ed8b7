"""LLaVA's instruction data: a JSON list of `{"id", "image", "conversations"}`, or one such object a line (.jsonl).

Read as LLaVA's loader reads it: without `image` it is text alone, a first turn that is not the human's is dropped, and
the mark of a single picture goes to the front of its turn, once, as `<image>\\n`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visplice.train.convert.sources import Entry, Source, identify, outline, parse_json, read_text, refused
from visplice.train.data.record import MARK, Fault, check_depth

_OURS = ("id", "image", "images", "conversations", "captions", "questions", "files")  # fields with a meaning of ours


def llava_source(file: Path, *, captions: bool = False) -> Source:
    """Every item of the file.

    Args:
        file: .json or .jsonl.
        captions: take the answer of each conversation as a caption, for stage 1 (LLaVA-Pretrain).
    Raises:
        ValueError: the file is no such list. OSError: it cannot be read.
    """
    text, facts = read_text(file)
    items = _lines(text) if _is_lines(text, file) else iter(_list(parse_json(text, file), file))
    del text
    seen: dict[int, list[Any]] = {}  # to the items that may be equal
    entries = [item if isinstance(item, Entry) else _entry(item, seen, captions) for item in items]
    return Source(
        kind="llava",
        unit="conversations",
        files=[facts],
        options={"captions": captions} if captions else {},
        entries=entries,
    )


def _is_lines(text: str, file: Path) -> bool:
    if file.suffix.lower() == ".jsonl":
        return True
    if text.lstrip()[:1] != "{":
        return False
    try:
        json.loads(text.lstrip().partition("\n")[0])
    except ValueError:
        return False
    return len(text.strip().splitlines()) > 1


def _list(content: Any, file: Path) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError(f"{file} holds {outline(content)}; llava is a list of objects with conversations")
    return content


def _lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            yield refused(f"line {number}", Fault("bad-json", f"line {number} is not JSON ({error})"))


def _entry(item: Any, seen: dict[int, list[Any]], captions: bool) -> Entry:
    if not isinstance(item, dict):
        return refused(None, Fault("wrong-type", f"the item is {type(item).__name__}, not an object"))
    identity = item.get("id")
    try:
        name = identify(identity, "id") if identity is not None else ""
        check_depth(item)
        _refuse_double(item, seen)
        images = _images(item.get("image"))
        record = {"id": name} if name else {}
        record |= _text(item.get("conversations"), len(images), captions)
        record |= {key: value for key, value in item.items() if key not in _OURS}
    except Fault as fault:
        return refused(identity, fault)
    return Entry(id=name, record=record, images=images)


def _refuse_double(item: dict[str, Any], seen: dict[int, list[Any]]) -> None:
    """An id may come again with other content, as in LLaVA-1.5's mix; the very same item may not."""
    turns = item.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    same = seen.setdefault(hash((repr(item.get("id")), repr(item.get("image")), repr(first))), [])
    if item in same:
        raise Fault("duplicate-id", "the same item, with the same id, stood in the file before; the first is kept")
    same.append(item)


def _images(image: Any) -> tuple[str, ...]:
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) for name in names):
        raise Fault("wrong-type", f"image is {str(image)[:80]}; it is a file name, or a list of them")
    return tuple(names)


def _text(turns: Any, num_images: int, captions: bool) -> dict[str, Any]:
    """The conversation, or its answer as a caption. What is no turn is left as it is for the record's own check."""
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("from") == "gpt":
        turns = turns[1:]
    if captions:
        if not isinstance(turns, list) or len(turns) != 2 or not isinstance(turns[1], dict):
            raise Fault("turn-order", "a caption is the answer of one question; these are other turns")
        text = turns[1].get("value")
        return {"captions": [text.strip() if isinstance(text, str) else text]}
    if num_images == 1 and isinstance(turns, list):
        turns = [_marked(turn) for turn in turns]
    return {"conversations": turns}


def _marked(turn: Any) -> Any:
    if not isinstance(turn, dict) or turn.get("from") != "human":
        return turn
    value = turn.get("value")
    if not isinstance(value, str) or MARK not in value:
        return turn
    return {**turn, "value": f"{MARK}\n{value.replace(MARK, '').strip()}".strip()}
