"""`visplice data check`: what is wrong with a data set, what is odd about it, and how long its texts are."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from visplice.app.arguments import positive


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments behind the verb."""
    parser.description = "Reads every sample and decodes every picture. Exit status 1 when something is wrong."
    parser.add_argument("folder", metavar="DIR", help="data set, any folder of tar files, or one of those")
    parser.add_argument("--strict", action="store_true", help="what is only odd is wrong, too")
    parser.add_argument("--json", metavar="FILE", help="write the whole report")
    parser.add_argument(
        "--examples", type=_not_negative, default=5, metavar="N", help="shown of each kind (default: 5)"
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one for each CPU)")
    lengths = parser.add_argument_group("lengths")
    lengths.add_argument("--tokenizer", metavar="PATH", help="folder or file (default: that of the embedded model)")
    lengths.add_argument("--template", metavar="NAME", help="of the prompt (default: by the tokenizer)")
    lengths.add_argument(
        "--visual-tokens", type=positive, default=257, metavar="N", help="of one picture (default: 257)"
    )
    lengths.add_argument("--max-length", type=positive, metavar="N", help="positions that training allows")
    same = parser.add_argument_group("near-same pictures")
    same.add_argument("--max-distance", type=int, metavar="BITS", help="of 64 of the perceptual hash (default: 8)")
    same.add_argument("--no-near", action="store_true", help="leave the search out")
    test = parser.add_argument_group("test data that must not be in it")
    test.add_argument(
        "--against", action="append", default=[], metavar="DIR", help="data set or tar file; again for several"
    )
    test.add_argument("--against-questions", metavar="FILE", help="questions of a VQA test set, as published")
    test.add_argument("--against-annotations", metavar="FILE", help="their answers, where in a file of their own")


def main(options: argparse.Namespace) -> int:
    """Runs it; returns the exit status: 0 when nothing is wrong, else 1."""
    from pathlib import Path

    from tqdm import tqdm

    from visplice.lm.extension import embedded_folder
    from visplice.train.check.check import HeldOut, check
    from visplice.train.check.shard import TokenCounter
    from visplice.train.data.near_pictures import MAX_DISTANCE
    from visplice.train.data.shards import write_json
    from visplice.train.data.workers import usable_cpus

    if options.against_annotations and not options.against_questions:
        raise ValueError("--against-annotations needs --against-questions: answers belong to questions")
    if "://" in options.folder:
        raise ValueError(f"{options.folder}: check reads local folders; copy the data set here first")
    against = None
    if options.against or options.against_questions:
        questions, annotations = (
            Path(file) if file else None for file in (options.against_questions, options.against_annotations)
        )
        against = HeldOut(paths=[Path(path) for path in options.against], questions=questions, annotations=annotations)
    counter = TokenCounter(
        tokenizer=Path(options.tokenizer) if options.tokenizer else embedded_folder("lm"),
        template=options.template,
        visual_tokens=options.visual_tokens,
        max_length=options.max_length,
    )
    counter.check()
    distance = MAX_DISTANCE if options.max_distance is None else options.max_distance
    with tqdm(desc="checking", unit="shard", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = check(
            Path(options.folder),
            counter=counter,
            max_distance=None if options.no_near else distance,
            against=against,
            strict=options.strict,
            workers=options.workers or usable_cpus(),
            progress=progress,
        )
    if options.json:
        write_json(Path(options.json), report)
    print("\n".join(summary(report, options.examples)))
    return 0 if report["clean"] else 1


def summary(report: dict[str, Any], num_examples: int) -> Iterator[str]:
    """A report in lines for people."""
    shards = f"{report['shards']:,} shard{'s' * (report['shards'] != 1)}"
    yield (
        f"{report['data']}: {report['samples']:,} samples in {shards}, "
        f"{report['bytes'] / 1e6:,.1f} MB; {report['usable']:,} usable, with {report['pictures']:,} pictures"
        + (f", {report['text_alone']:,} of text alone" if report["text_alone"] else "")
    )
    if dropped := report["curation"]["dropped"]:
        filters = ", ".join(entry["filter"] for entry in report["curation"]["filters"])
        yield f"left out by curation, and not checked: {dropped:,} ({filters})"
    if "test" in report:
        yield f"compared with {report['test']['pictures']:,} test pictures"
    for title, part in (("wrong", report["problems"]), ("odd", report["notes"])):
        if part:
            yield f"{title}:"
        for name, found in part.items():
            yield f"  {found['count']:>9,} {name:19} {found['meaning']}"
            for example in found["found"][:num_examples]:
                yield "            " + ": ".join(filter(None, example.values()))
            if (more := found["count"] - min(num_examples, len(found["found"]))) and num_examples:
                yield f"            and {more:,} more"
    for title, unit in (("captions", "tokens"), ("conversations", "positions, pictures included")):
        lengths = {int(length): count for length, count in report["tokens"][title].items()}
        if lengths:
            yield from _histogram(title, unit, lengths)
    yield "clean" if report["clean"] else "not clean"


def _histogram(title: str, unit: str, lengths: dict[int, int]) -> Iterator[str]:
    """Counts of lengths in up to twelve steps; what is longer than nearly all shares the last."""
    total, shortest, longest = sum(lengths.values()), min(lengths), max(lengths)
    yield (
        f"{total:,} {title}, {unit}: shortest {shortest:,}, half up to {_quantile(lengths, 0.5):,}, 95 % up to "
        f"{_quantile(lengths, 0.95):,}, longest {longest:,}"
    )
    usual = _quantile(lengths, 0.99)
    step = next(step for step in _steps() if usual // step - shortest // step < 12)
    bins: dict[int, int] = {}
    for length, count in lengths.items():
        at = min(length, usual) // step
        bins[at] = bins.get(at, 0) + count
    most = max(bins.values())
    for at in range(shortest // step, usual // step + 1):
        count = bins.get(at, 0)
        last = longest if at == usual // step else (at + 1) * step - 1
        yield f"  {at * step:>7,} to {last:>7,} {count:>9,} {'#' * -(-count * 40 // most)}".rstrip()


def _steps() -> Iterator[int]:
    for power in itertools.count():
        yield from (10**power, 2 * 10**power, 5 * 10**power)


def _quantile(lengths: dict[int, int], part: float) -> int:
    """The length that this part of all does not exceed."""
    left = part * sum(lengths.values())
    for length in sorted(lengths):
        left -= lengths[length]
        if left <= 0:
            return length
    return max(lengths)
