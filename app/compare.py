"""`visplice compare`: whether one model is better than another on the same questions."""

from __future__ import annotations

import argparse

from visplice.app.score import METRICS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments behind the verb."""
    parser.description = (
        "Compares two sides question by question. Each is a folder with scores.jsonl, a file of lines as visplice "
        "score --per-question and visplice choice --out write them, or a submission in the official layout."
    )
    parser.add_argument("a", metavar="A", help="one side")
    parser.add_argument("b", metavar="B", help="the other; is it better?")
    parser.add_argument("--metric", choices=METRICS, help="of submissions: whose rule and file layouts")
    parser.add_argument("--annotations", metavar="FILE", help="of submissions: official file of the right answers")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing rounded")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals' draws (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=None, help="score from which on an answer is right, for McNemar (0.5)"
    )


def main(options: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    import json
    import platform
    from importlib.metadata import version

    from visplice.train.scoring.compare import compare, comparison_text, verdict
    from visplice.train.scoring.sides import read_side

    a, b = (read_side(path, metric=options.metric, annotations=options.annotations) for path in (options.a, options.b))
    if (options.metric or options.annotations) and not {"annotations"} & (a.files.keys() | b.files.keys()):
        raise ValueError(
            "--metric and --annotations are for submissions, and both sides are scores already; leave them out"
        )
    told = compare(a, b, seed=options.seed, threshold=options.threshold)
    if options.json:
        versions = {"python": platform.python_version()} | {name: version(name) for name in ("visplice", "numpy")}
        print(json.dumps(told | {"verdict": verdict(told), "versions": versions}, indent=2))
    else:
        print(comparison_text(told))
    return 0
