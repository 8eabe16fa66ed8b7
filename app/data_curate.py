"""`visplice data curate`: leaves out or cleans samples of a data set, and takes that back."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from visplice.app.arguments import positive

_LIST = "A,B,..."
_OWN = (
    "verb",
    "job",
    "folder",
    "list",
    "undo",
    "later",
    "filter",
    "dry_run",
    "report",
    "workers",
)  # no filter's options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments behind the verb; each filter is a parser of its own, with its options."""
    parser.description = "Applies a filter to a local data set. Shards stay as they are; filters can be taken back."
    parser.add_argument("folder", metavar="DIR", help="data set, as `visplice data convert` makes it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="what is applied, with counts")
    what.add_argument("--undo", metavar="FILTER", help="take a filter back, or 'all'")
    parser.add_argument(
        "--later",
        choices=("undo", "redo"),
        help="with --undo: take filters that were applied after it back too, or apply them again without it",
    )
    filters = parser.add_subparsers(dest="filter", metavar="FILTER")

    def add(name: str, text: str, *, answers: bool = True) -> argparse.ArgumentParser:
        # What is not typed stays out, so that each default stands in one place: the filter itself.
        one = filters.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        one.add_argument("--dry-run", action="store_true", default=False, help="only report what would be removed")
        one.add_argument("--report", default=None, metavar="FILE", help="write the report as JSON, too")
        if name != "clip-score":
            one.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (default: 1)")
        if answers:
            one.add_argument(
                "--answers-are-captions",
                action="store_true",
                help="take the answer of a conversation of one pair as a caption, as LLaVA's data for stage 1 has them",
            )
        return one

    add("duplicate-urls", "drop samples whose picture has the address of one before")
    add(
        "duplicate-pictures", "drop samples whose picture is, byte by byte, one before and of which nothing new is said"
    )
    near = add("near-pictures", "the same for pictures that were saved again, resized or a little cropped")
    near.add_argument("--max-distance", type=int, metavar="BITS", help="of 64 of the perceptual hash (default: 8)")
    lines = add("duplicate-lines", "remove captions read before, and questions answered the same for the same picture")
    lines.add_argument("--keep", type=int, metavar="N", help="samples that may have the same caption (default: 1)")
    near = add("near-lines", "remove captions that are nearly one before")
    near.add_argument("--threshold", type=float, metavar="T", help="shared runs of 5 letters, 0.5 to 1 (default: 0.9)")
    near.add_argument("--keep", type=int, metavar="N", help="near-same captions that are kept (default: 1)")

    privacy = add("privacy", "put [email], [phone], [address], [ip] in the place of what they name", answers=False)
    privacy.add_argument("--kinds", type=_names, metavar=_LIST, help="default: email,ip,address,phone")
    privacy.add_argument(
        "--regions",
        type=_names,
        metavar=_LIST,
        help="countries whose national telephone numbers are known (default: US,GB,DE,FR,ES,IT,IN,JP,BR)",
    )
    privacy.add_argument("--fields", type=_names, metavar=_LIST, help="default: captions,conversations,questions")

    language = add("language", "keep captions and conversations in the given languages")
    language.add_argument("--keep", type=_names, required=True, metavar=_LIST, help="ISO 639-1 codes, such as en,de")
    language.add_argument(
        "--min-probability", type=float, metavar="P", help="of these languages, for a text to stay (default: 0.02)"
    )
    language.add_argument(
        "--min-letters", type=int, metavar="N", help="shorter texts are not judged, and stay (default: 20)"
    )
    language.add_argument("--fields", type=_names, metavar=_LIST, help="default: captions,conversations")

    length = add("length", "remove captions that are too short or too long")
    for unit in ("words", "characters", "tokens"):
        length.add_argument(f"--min-{unit}", type=positive, metavar="N")
        length.add_argument(f"--max-{unit}", type=positive, metavar="N")
    length.add_argument("--tokenizer", metavar="DIR", help="LLaMA folder or tokenizer file, to count tokens by")
    length.add_argument("--fields", type=_names, metavar=_LIST, help="captions,conversations (default: captions)")

    size = add("picture-size", "drop samples with pictures that are too small or too narrow", answers=False)
    size.add_argument("--min-side", type=int, metavar="PIXELS", help="of the shorter side")
    size.add_argument("--max-aspect", type=float, metavar="RATIO", help="of the longer side to the shorter")

    clip = add("clip-score", "remove captions that do not agree with their picture, by a CLIP model of open_clip")
    clip.add_argument(
        "--clip-model",
        dest="model",
        required=True,
        metavar="NAME",
        help="NAME or NAME.TAG of open_clip, such as ViT-B-32-quickgelu (OpenAI's weights need a name with quickgelu)",
    )
    clip.add_argument(
        "--clip-weights", dest="weights", required=True, metavar="FILE", help="weights, or a tag that open_clip knows"
    )
    clip.add_argument("--min-score", type=float, metavar="S", help="cosine (default: 0.2)")
    clip.add_argument("--batch-size", type=positive, metavar="N", help="pictures (default: 64)")
    clip.add_argument("--threads", type=positive, metavar="N", help="that decode pictures (default: 1)")
    clip.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def main(options: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    if options.filter is None:
        return _undo(options) if options.undo is not None else _list(options)
    if options.list or options.undo is not None or options.later is not None:
        raise ValueError(f"--list, --undo and --later stand without a filter; {options.filter} was given")
    from visplice.train.curate.curate import curate, make_filter
    from visplice.train.data.shards import write_json

    given = {name: value for name, value in vars(options).items() if name not in _OWN}
    if "device" in given:
        from visplice.app.device import pick_device

        given["device"] = str(pick_device(given["device"]))
    rule = make_filter(options.filter, given)
    report = curate(options.folder, rule, workers=getattr(options, "workers", 1), dry_run=options.dry_run)
    if options.report is not None:
        from pathlib import Path

        write_json(Path(options.report), report)
    if report.get("again"):
        print(f"{options.folder}: {options.filter} is applied with these options; nothing to do")
        return 0
    _print(report)
    if options.dry_run:
        print("dry run: nothing was changed")
    else:
        print(f"undo with: visplice data curate {options.folder} --undo {options.filter}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from visplice.train.curate.curate import applied
    from visplice.train.data.curation import load_curation

    if options.later is not None:
        raise ValueError("--later stands with --undo")
    entries = applied(options.folder)
    for entry in entries:
        counts = entry["counts"]
        print(
            f"{entry['filter']}: {counts['dropped']} dropped, {counts['edited']} changed ({_given(entry['options'])})"
        )
    load_curation(options.folder)  # says if they belong to other shards
    if not entries:
        print(f"{options.folder}: nothing is applied")
    if not options.list:
        print("give a filter, --list or --undo FILTER; --help lists the filters", file=sys.stderr)
        return 2
    return 0


def _given(options: dict[str, Any]) -> str:
    shown = {name: ",".join(value) if isinstance(value, list) else value for name, value in options.items()}
    said = [f"{name} {value}" for name, value in shown.items() if value not in (None, False)]
    return "; ".join(said) or "no options"


def _undo(options: argparse.Namespace) -> int:
    from visplice.train.curate.curate import undo

    names = undo(options.folder, options.undo, later=options.later)
    print(f"{options.folder}: {'took back ' + ', '.join(names) if names else 'nothing is applied'}")
    return 0


def _print(report: dict[str, Any]) -> None:
    counts = report["counts"]
    print(
        f"{report['filter']}: {counts['samples']} samples, {counts['dropped']} dropped, {counts['edited']} changed, "
        f"{counts['samples'] - counts['dropped']} left"
    )
    for reason, count in counts["removed"].items():
        print(f"  {reason}: {count}")
        for example in report["examples"][reason]:
            print(f"    {example['shard']} {example['key']}: {example['what']}")
    for title, what in (("not judged, or for information", "noted"), ("unreadable, left as they are", "unreadable")):
        if counts[what]:
            print(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in counts[what].items()))
