"""`visplice data convert`: published files and folders of images to shards."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from visplice.train.convert.sources import Source

_VQA = ("questions", "annotations", "images")
# The flags that a source needs, and those that it may have.
_NEEDED = {
    "llava": ("json",),
    "coco-captions": ("json", "images"),
    "textcaps": ("json", "images"),
    "vqav2": _VQA,
    "okvqa": _VQA,
    "textvqa": ("questions", "images"),
    "docvqa": ("questions", "images"),
    "pairs": (),
}
_ALLOWED = {
    "llava": ("images", "captions"),
    "coco-captions": ("split",),
    "textcaps": (),
    **{name: ("suffix",) for name in ("vqav2", "okvqa", "textvqa", "docvqa")},
    "pairs": ("table", "images", "image_column", "caption_column"),
}
_OF_SOURCES = ("json", *_VQA, "table", "image_column", "caption_column", "suffix", "split", "captions")
_USAGE = """
llava           --json F [--images DIR] [--captions]
coco-captions   --json F --images DIR [--split train|val|test|all]
textcaps        --json F --images DIR
vqav2, okvqa    --questions F --annotations F --images DIR [--suffix TEXT]
textvqa, docvqa --questions F --images DIR [--suffix TEXT]
pairs           --table F.csv|.tsv|.parquet [--images DIR] [--image-column NAME] [--caption-column NAME]
pairs           --images DIR, with a .txt beside each picture

Killed or interrupted, the same command goes on behind the shards that are finished; the result is the same to the byte.
"""


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 1 to n, such as 3/8")
    return int(match[1]), int(match[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments behind the verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _USAGE
    parser.add_argument("source", metavar="SOURCE", choices=_NEEDED, help=", ".join(_NEEDED))
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards, new or to go on with")
    parser.add_argument("--json", metavar="F", help="LLaVA's .json or .jsonl; captions of COCO, Karpathy or TextCaps")
    parser.add_argument("--questions", metavar="F", help="questions as published")
    parser.add_argument("--annotations", metavar="F", help="answers as published, where they are in their own file")
    parser.add_argument("--images", metavar="DIR", help="folder that the names of pictures count from")
    parser.add_argument("--table", metavar="F", help=".csv, .tsv or .parquet of names and captions")
    parser.add_argument("--image-column", metavar="NAME", help="default: image, filepath, file_name, filename or path")
    parser.add_argument("--caption-column", metavar="NAME", help="default: caption, text or title")
    parser.add_argument("--suffix", metavar="TEXT", help=r"appended to each question; \n is a new line (default: none)")
    parser.add_argument("--split", choices=("train", "val", "test", "all"), help="of Karpathy's JSON (default: train)")
    parser.add_argument("--captions", action="store_true", help="of llava, take answers as captions, for stage 1")
    parser.add_argument(
        "--per-shard", type=_at_least_one, default=1000, metavar="N", help="entries of a shard (default: %(default)s)"
    )
    parser.add_argument("--workers", type=_at_least_one, metavar="N", help="processes (default: one for each CPU)")
    parser.add_argument("--strict", action="store_true", help="skip odd pictures too (CMYK, turned by EXIF, ...)")
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="i/n", help="every n-th shard from the i-th on; then data merge"
    )


def check_flags(options: argparse.Namespace) -> None:
    """Refuses flags that are missing for the source, and those that it has no use for.

    Raises:
        ValueError: there are such.
    """
    source = options.source
    needed, allowed = _NEEDED[source], {*_NEEDED[source], *_ALLOWED[source]}
    given = [name for name in _OF_SOURCES if getattr(options, name) not in (None, False)]
    line = "; ".join(line.strip() for line in _USAGE.splitlines() if source in re.split(r"[,\s]+", line)[:2])
    missing = [f"--{name}" for name in needed if name not in given]
    needless = [f"--{name.replace('_', '-')}" for name in given if name not in allowed]
    if missing:
        raise ValueError(f"{source} needs {' and '.join(missing)}: {line}")
    if needless:
        raise ValueError(f"{source} has no use for {' and '.join(needless)}: {line}")
    if source == "pairs" and options.table is None:
        if options.images is None:
            raise ValueError(f"pairs needs --table or --images: {line}")
        if options.image_column or options.caption_column:
            raise ValueError("--image-column and --caption-column are of a --table; none was given")


def open_source(options: argparse.Namespace) -> tuple[Source, Path | None]:
    """Reads the published files.

    Returns:
        What is in them, and the folder of pictures.
    Raises:
        ValueError, OSError: one is missing, or is another than it should be.
    """
    from pathlib import Path

    from visplice.train.convert.captions import coco_source, textcaps_source
    from visplice.train.convert.llava import llava_source
    from visplice.train.convert.pairs import folder_source, table_source
    from visplice.train.convert.vqa import vqa_source

    file = Path(options.json or options.questions or options.table or "")
    images = Path(options.images) if options.images else file.parent if options.table else None
    if options.source == "llava":
        return llava_source(file, captions=options.captions), images
    assert images is not None
    if options.source == "coco-captions":
        return coco_source(file, images, split=options.split), images
    if options.source == "textcaps":
        return textcaps_source(file, images), images
    if options.source == "pairs":
        columns = {"image_column": options.image_column, "caption_column": options.caption_column}
        return table_source(file, images, **columns) if options.table else folder_source(images), images
    suffix = (options.suffix or "").replace(r"\n", "\n")
    annotations = Path(options.annotations) if options.annotations else None
    return vqa_source(options.source, file, annotations, images, suffix=suffix), images


def main(options: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    check_flags(options)

    from pathlib import Path

    from tqdm import tqdm

    from visplice.train.convert.convert import convert
    from visplice.train.convert.sources import many_objects
    from visplice.train.data.workers import usable_cpus

    with many_objects():
        source, images = open_source(options)
    out = Path(options.out)
    with tqdm(total=len(source.entries), unit=" entries", desc=options.source, disable=None) as bar:
        report = convert(
            source,
            out,
            images=images,
            per_shard=options.per_shard,
            workers=options.workers or usable_cpus(),
            strict=options.strict,
            part=options.part,
            progress=bar.update,
        )
    number, parts = options.part
    if parts == 1 or "part" not in report:
        print(summary(report, str(out)))
    else:
        print(summary(report, f"{out} (part {number} of {parts})"))
        print(f"when all {parts} parts are there: visplice data merge {out} --out DIR")
    return 0


def summary(report: dict[str, Any], name: str) -> str:
    """What became of a source, in lines for people."""
    unit = report["source"]["unit"]
    items = report[unit]
    lines = [
        f"{name}: {'already complete: ' if report['complete'] else ''}{report['samples']:,} samples with "
        f"{report['images']:,} pictures in {report['shards']:,} shard{'s'[: report['shards'] != 1]}, "
        f"{report['bytes'] / 1e6:,.1f} MB",
        f"{unit}: {items['read']:,} read, {items['written']:,} written, {items['skipped']:,} skipped",
    ]
    for title, part in (("skipped", report["skipped"]), ("kept, though odd", report["oddities"])):
        if part:
            lines.append(f"{title}:")
            lines += [f"  {found['count']:>9,} {fault:18} {_told(found, unit)}" for fault, found in part.items()]
    if report["skipped"] and "part" not in report:
        lines.append("each skipped one is in skipped.jsonl, counts and examples in report.json")
    return "\n".join(lines)


def _told(found: dict[str, Any], unit: str) -> str:
    """What a fault is, and how many of the published units went with it where it is not one each."""
    items = found.get("items", found["count"])
    return found["meaning"] + (f" ({items:,} {unit})" if items != found["count"] else "")
