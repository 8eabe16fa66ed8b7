"""`visplice data merge`: one data set out of the parts that several machines converted."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments behind the verb."""
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder that convert --part i/n wrote into")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the whole; may be the one that all parts are in"
    )


def main(options: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    from pathlib import Path

    from visplice.app.data_convert import summary
    from visplice.train.convert.merge import merge

    out = Path(options.out)
    print(summary(merge([Path(folder) for folder in options.folders], out), str(out)))
    return 0
