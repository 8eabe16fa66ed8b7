"""What several verbs take on the command line."""

import argparse


def positive(text: str) -> int:
    """A whole number from 1 on, as a type of `add_argument`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value
