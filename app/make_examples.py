"""The example pictures of the chat page, drawn from fixed seeds: `python -m visplice.app.make_examples` writes them."""

import argparse
import random
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from PIL import Image

from visplice.train import scenes, slips


@dataclass(frozen=True)
class Example:
    """A picture with a question to begin with and its right answer."""

    name: str  # file in app/assets
    seed: int
    question: str
    answer: str
    slip: bool = False  # a slip, not a scene


EXAMPLES = (
    Example("example_1.png", 36, "What color is the star?", "red"),
    Example("example_2.png", 35, "What shape is at the bottom?", "triangle"),
    Example("example_3.png", 30, "How many stars are there?", "2"),
    Example("example_4.png", 13, "Where is the ring?", "bottom right"),
    Example("example_5.png", 41, "Is the yellow triangle smaller than the yellow ring?", "yes"),
    Example(
        "example_6.png",
        52,
        "Describe the picture.",
        "a small orange circle at the left and a small blue star in the center and a big blue circle at the bottom "
        "left and a small green circle at the bottom right on a gray background.",
    ),
    Example("example_7.png", 1, "How much is the STANYL?", "4.31", slip=True),
)


def assets() -> Path:
    """The folder of the shipped pictures and the style sheet."""
    return Path(str(files("visplice.app"))) / "assets"


def drawn(example: Example) -> tuple[scenes.Scene | slips.Slip, Image.Image]:
    """What an example shows and its picture, in 256 or 32 colours, which halves the file and cannot be seen."""
    rng = random.Random(f"example {example.seed}")
    if example.slip:
        slip = slips.sample_slip(rng, scenes.TEST)
        return slip, slips.render(slip, rng).quantize(32, dither=Image.Dither.NONE)
    scene = scenes.sample_scene(rng, scenes.TEST)
    return scene, scenes.render(scene, rng).quantize(256, dither=Image.Dither.NONE)


def main() -> None:
    """Writes the pictures."""
    parser = argparse.ArgumentParser(prog="python -m visplice.app.make_examples", description=__doc__)
    parser.add_argument("--out", type=Path, default=assets(), help="folder (default: %(default)s)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for example in EXAMPLES:
        drawn(example)[1].save(folder / example.name, optimize=True)
        print(folder / example.name)


if __name__ == "__main__":
    main()
