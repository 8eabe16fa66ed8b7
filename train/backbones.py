"""Rebuilds the two small backbones of the embedded default from a seed.

    python -m visplice.train.backbones --compile --out runs/backbones

Neither ever sees a combination of colour, shape and position that `visplice.train.scenes` holds out.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from visplice.train.backbone_text import COURSES, train_text
from visplice.train.backbone_vision import VISION_STEPS, train_vision


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m visplice.train.backbones", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("part", nargs="?", choices=("text", "vision", "both"), default="both")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/backbones"), help="gets lm/ and vision/ (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--text-steps",
        type=int,
        nargs=len(COURSES),
        default=[course.steps for course in COURSES],
        help="of the courses, one after the other; default: %(default)s",
    )
    parser.add_argument(
        "--start", type=Path, help="LLaMA folder to go on from, with 0 for the steps of the courses it had"
    )
    parser.add_argument(
        "--vision-steps",
        type=int,
        nargs=len(VISION_STEPS),
        default=list(VISION_STEPS),
        help="of scenes alone, and of scenes with slips; default: %(default)s",
    )
    parser.add_argument("--start-vision", type=Path, help="encoder.safetensors to go on from, likewise")
    parser.add_argument(
        "--compile", action="store_true", help="compile, and multiply in bfloat16: needs a C++ compiler"
    )
    args = parser.parse_args()
    if args.part in ("vision", "both"):
        train_vision(
            args.out / "vision",
            steps=args.vision_steps,
            start=args.start_vision,
            seed=args.seed,
            compiled=args.compile,
        )
    if args.part in ("text", "both"):
        train_text(
            args.out / "lm",
            courses=[replace(course, steps=steps) for course, steps in zip(COURSES, args.text_steps, strict=True)],
            start=args.start,
            seed=args.seed,
            compiled=args.compile,
        )


if __name__ == "__main__":
    main()
