"""`visplice data curate`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments behind the verb."""


def main(options: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    raise ValueError("being built")
