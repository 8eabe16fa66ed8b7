"""`visplice eval`: answers to a benchmark, a submission file, the score and a report."""

from __future__ import annotations

import argparse

from visplice.app.arguments import positive

TASKS = ("vqav2", "okvqa", "textvqa", "docvqa", "textcaps", "coco")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments behind the verb."""
    parser.description = (
        "Answers the questions of a benchmark, greedily and in batches. Killed and run again with the same arguments, "
        "it goes on where it stopped. Several processes: torchrun --nproc-per-node N -m visplice.app.cli eval ..."
    )
    parser.add_argument("task", choices=TASKS, help="whose file layouts, prompt and rule")
    parser.add_argument("--model", required=True, metavar="DIR", help="extension or LLaVA folder, or 'embedded'")
    parser.add_argument("--questions", required=True, metavar="FILE", help="official file of questions")
    parser.add_argument("--images", required=True, metavar="DIR", help="the pictures, or the folder above their splits")
    parser.add_argument("--out", required=True, metavar="DIR", help="predictions, submission and report")
    parser.add_argument(
        "--annotations", metavar="FILE", help="official file of answers (default: --questions, where it holds them)"
    )
    parser.add_argument(
        "--prompt", help="what the model is asked, {question} in it (default: the usual prompt of the task, printed)"
    )
    parser.add_argument("--max-new-tokens", type=positive, help="where an answer is cut off (default: the task's)")
    parser.add_argument(
        "--blind",
        choices=("blank", "shuffled"),
        nargs="+",
        default=[],
        help="also without the right picture: an empty one, or that of other questions; the report compares",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="questions at once (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=positive, default=4, metavar="N", help="threads that open pictures (default: %(default)s)"
    )
    parser.add_argument("--features", metavar="DIR", help="keep what the encoder makes of pictures, for further runs")
    parser.add_argument(
        "--skip-bad-images", action="store_true", help="answer with '' where a picture is missing or broken"
    )
    parser.add_argument("--seed", type=int, default=0, help="of shuffling and intervals (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    from visplice.app.device import pick_device, pick_dtype
    from visplice.train.evaluate.run import EvalConfig, evaluate
    from visplice.train.scoring.result import table

    config = EvalConfig(
        task=options.task,
        model=options.model,
        questions=options.questions,
        images=options.images,
        out=options.out,
        annotations=options.annotations,
        prompt=None if options.prompt is None else options.prompt.replace("\\n", "\n"),
        max_new_tokens=options.max_new_tokens,
        blind=tuple(dict.fromkeys(options.blind)),
        seed=options.seed,
        batch_size=options.batch_size,
        workers=options.workers,
        features=options.features,
        skip_bad_images=options.skip_bad_images,
        device=pick_device(options.device),
        dtype=pick_dtype(options.dtype),
        vision_tower=options.vision_tower,
        model_base=options.model_base,
    )
    told = evaluate(config)
    if told is None:  # another process tells it
        return 0
    if "score" in told:
        print(table(told["score"]))
    if told.get("vision"):
        for shown, score in told["controls"].items():
            print(f"{shown} pictures: {score['score']:.4f}, {score['interval'][0]:.4f} to {score['interval'][1]:.4f}")
        print(told["vision"]["verdict"])
    print(f"report: {config.out}/report.html, submission: {config.out}/submission.json")
    return 0
