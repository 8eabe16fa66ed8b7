"""Captions as published: COCO, Karpathy's splits of it, TextCaps. One sample a picture, with all its captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from visplice.train.convert.sources import (
    Entry,
    LeftOut,
    Source,
    check_folder,
    first_layout,
    identify,
    left_out,
    list_of,
    outline,
    parse_json,
    read_text,
    refused,
    shown,
)
from visplice.train.data.record import Fault, check_text

SPLITS = {
    "train": ("train", "restval"),
    "val": ("val",),
    "test": ("test",),
    "all": None,
}  # Karpathy's, as they are used


class Captions:
    """One picture, and its captions as they come in."""

    def __init__(self, identity: str, places: tuple[str, ...], **fields: Any) -> None:
        self.identity, self.places, self.fields = identity, places, fields
        self.texts: list[str] = []
        self.left_out: list[LeftOut] = []

    def add(self, identity: Any, text: Any) -> None:
        try:
            if not isinstance(text, str):
                raise Fault("wrong-type", f"caption {shown(identity)} is {type(text).__name__}, not a string")
            check_text(text)
            if not text.strip():
                raise Fault("no-text", f"caption {shown(identity)} is empty")
        except Fault as fault:
            self.left_out.append(left_out(identity, fault))
        else:
            self.texts.append(text.strip())

    def entry(self, layout: int) -> Entry:
        if not self.texts and not self.left_out:
            return refused(self.identity, Fault("no-text", f"picture {self.identity} has no caption"), items=0)
        fields = {key: value for key, value in self.fields.items() if isinstance(value, str) and value}
        return Entry(
            id=shown(self.identity),
            record={"id": self.identity, "captions": self.texts, **fields} if self.texts else None,
            images=(self.places[layout],),
            items=len(self.texts),
            left_out=tuple(self.left_out),
        )


def coco_source(file: Path, images: Path, *, split: str | None = None) -> Source:
    """COCO captions.

    Args:
        file: `captions_{train,val}{2014,2017}.json`, or Karpathy's `dataset_coco.json`.
        images: folder of the pictures, or the one above it.
        split: of Karpathy's JSON, a name of SPLITS; "train" where it is None.
    Raises:
        ValueError: another file, no folder, or a split where there are none. OSError: a file cannot be read.
    """
    check_folder(images)
    text, facts = read_text(file)
    content = parse_json(text, file)
    pictures = list_of(content, "images", file, what="a COCO captions file")
    options: dict[str, Any] = {}
    if "annotations" in content:
        if split is not None:
            raise ValueError(f"--split is for Karpathy's JSON; {file} is one split already")
        annotations = list_of(content, "annotations", file, what="a COCO captions file")
        groups = _official(pictures, annotations)
    elif any(isinstance(picture, dict) and "sentences" in picture for picture in pictures):
        options = {"split": split or "train"}
        groups = _karpathy(pictures, SPLITS[options["split"]])
    else:
        raise ValueError(f"{file} holds {outline(content)}, and no captions; a COCO captions file has annotations")
    return _source("coco-captions", groups, images, files=[facts], options=options)


def textcaps_source(file: Path, images: Path) -> Source:
    """TextCaps, `TextCaps_0.1_{train,val}.json`: an item for each caption, with those of one picture together.

    Raises:
        ValueError: another file, or no folder. OSError: a file cannot be read.
    """
    check_folder(images)
    text, facts = read_text(file)
    items = list_of(parse_json(text, file), "data", file, what="a TextCaps file")
    groups: dict[str, Captions | Entry] = {}
    seen: set[tuple[str, str]] = set()
    for number, item in enumerate(items):
        identity: Any = None
        try:
            item = _object(item)
            picture = identify(item.get("image_id"), "image_id")
            identity = item.get("caption_id", picture)
            if "caption_id" in item:
                _refuse_double((picture, shown(identity)), seen)
        except Fault as fault:
            groups[f"item {number}"] = refused(identity, fault)
            continue
        group = groups.setdefault(f"picture {picture}", _textcaps_group(item, picture))
        assert isinstance(group, Captions)
        if item.get("caption_str") is not None:
            group.add(identity, item["caption_str"])
    return _source("textcaps", groups, images, files=[facts], options={})


def _textcaps_group(item: dict[str, Any], picture: str) -> Captions:
    # The zip unpacks to train_images/; image_path in the file says train/.
    folders = ("", "train_images/", "test_images/")
    return Captions(picture, tuple(f"{folder}{picture}.jpg" for folder in folders), url=item.get("flickr_original_url"))


def _official(pictures: list[Any], annotations: list[Any]) -> dict[str, Captions | Entry]:
    groups: dict[str, Captions | Entry] = {}

    def picture_group(item: dict[str, Any], identity: str) -> Captions:
        name = _name(item, "file_name")
        split = name.split("_")[1] if name.count("_") == 2 else ""
        return Captions(identity, (name, f"{split}/{name}"), url=item.get("coco_url"))

    for number, item in enumerate(pictures):
        _add_picture(groups, number, item, "id", picture_group)
    seen: set[tuple[str, str]] = set()
    for number, item in enumerate(annotations):
        identity: Any = None
        try:
            item = _object(item)
            identity = item.get("id")
            picture = identify(item.get("image_id"), "image_id")
            group = groups.get(f"picture {picture}")
            if not isinstance(group, Captions):
                raise Fault("missing-image", f"caption {shown(identity)} is of picture {picture}, which is not listed")
            _refuse_double(("", identify(identity, "id")), seen)
        except Fault as fault:
            groups[f"annotation {number}"] = refused(identity, fault)
            continue
        group.add(identity, item.get("caption"))
    return groups


def _karpathy(pictures: list[Any], splits: tuple[str, ...] | None) -> dict[str, Captions | Entry]:
    groups: dict[str, Captions | Entry] = {}

    def picture_group(item: dict[str, Any], identity: str) -> Captions:
        name = _name(item, "filename")
        folder = item.get("filepath")
        places = (f"{folder}/{name}", name) if isinstance(folder, str) and folder else (name, name)
        group = Captions(identity, places, split=item.get("split"))
        sentences = item.get("sentences")
        if not isinstance(sentences, list):
            raise Fault("wrong-type", f"sentences is {type(sentences).__name__}, not a list")
        for sentence in sentences:
            sentence = sentence if isinstance(sentence, dict) else {"raw": sentence}
            group.add(sentence.get("sentid", identity), sentence.get("raw"))
        return group

    for number, item in enumerate(pictures):
        if splits is None or not isinstance(item, dict) or item.get("split") in splits:
            _add_picture(groups, number, item, "cocoid" if "cocoid" in item else "imgid", picture_group)
    return groups


def _add_picture(
    groups: dict[str, Captions | Entry],
    number: int,
    item: Any,
    id_field: str,
    make: Callable[[dict[str, Any], str], Captions],
) -> None:
    identity: Any = None
    sentences = item.get("sentences") if isinstance(item, dict) else None
    try:
        item = _object(item)
        identity = item.get(id_field)
        picture = identify(identity, id_field)
        if f"picture {picture}" in groups:
            raise Fault("duplicate-id", f"picture {picture} stood in the file before; the first is kept")
        groups[f"picture {picture}"] = make(item, picture)
    except Fault as fault:
        groups[f"item {number}"] = refused(identity, fault, items=len(sentences) if isinstance(sentences, list) else 0)


def _source(kind: str, groups: dict[str, Captions | Entry], images: Path, **rest: Any) -> Source:
    layout = first_layout(images, (group.places for group in groups.values() if isinstance(group, Captions)))
    entries = [group.entry(layout) if isinstance(group, Captions) else group for group in groups.values()]
    return Source(kind=kind, unit="captions", entries=entries, **rest)


def _object(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise Fault("wrong-type", f"the item is {type(item).__name__}, not an object")
    return item


def _name(item: dict[str, Any], field: str) -> str:
    name = item.get(field)
    if not isinstance(name, str):
        raise Fault("wrong-type", f"{field} is {type(name).__name__}, not a file name")
    return name


def _refuse_double(identity: tuple[str, str], seen: set[tuple[str, str]]) -> None:
    if identity in seen:
        raise Fault("duplicate-id", f"caption {identity[1]} stood in the file before; the first is kept")
    seen.add(identity)
