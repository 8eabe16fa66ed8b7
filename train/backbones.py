"""Rebuilds the two small backbones of the embedded default from a seed.

    python -m visplice.train.backbones --compile --out runs/backbones

Neither ever sees a combination of colour, shape and position that `visplice.train.scenes` holds out, nor a word or
number that `visplice.train.slips` does.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from visplice.train.backbone_slips import ROWS, SLIP_STEPS, train_slips
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
        nargs=len(COURSES) + 1,
        default=[*(course.steps for course in COURSES), SLIP_STEPS],
        help="of the courses on scenes, one after the other, and of that on slips; default: %(default)s",
    )
    parser.add_argument(
        "--start", type=Path, help="LLaMA folder to go on from, with 0 for the steps of the courses it had"
    )
    parser.add_argument(
        "--rows", type=int, nargs=3, default=ROWS, help="slips, grids and words in a step of it; default: %(default)s"
    )
    parser.add_argument("--lr", type=float, default=0.01, help="peak rate of it; default: %(default)s")
    parser.add_argument(
        "--noise", type=float, default=0.1, help="of the course on slips, the most; default: %(default)s"
    )
    parser.add_argument("--vary", type=float, default=0.0, help="of its grids; default: %(default)s")
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
        *of_scenes, of_slips = args.text_steps
        folder = args.out / "lm"
        if any(of_scenes):
            courses = [replace(course, steps=steps) for course, steps in zip(COURSES, of_scenes, strict=True)]
            train_text(folder, courses=courses, start=args.start, seed=args.seed, compiled=args.compile)
        if of_slips:
            start = folder if any(of_scenes) else args.start
            if start is None:
                parser.error("a course on slips goes on from a LLaMA; give --start, or steps to the courses before it")
            train_slips(
                folder,
                start=start,
                steps=of_slips,
                seed=args.seed,
                rows=args.rows,
                lr=args.lr,
                noise=args.noise,
                vary=args.vary,
                compiled=args.compile,
            )


if __name__ == "__main__":
    main()
