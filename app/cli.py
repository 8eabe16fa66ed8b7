"""The console script `visplice`: one verb per job. Heavy imports wait for the verb that needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from visplice.app.arguments import positive

_MODULES = {"import": "importing", "eval": "evaluate"}  # where a verb is no name for a module
_DATA_JOBS = {
    "convert": "published files and folders of images to shards",
    "merge": "one manifest for shards that several machines made",
    "check": "what is wrong with a data set",
    "curate": "leave out or clean samples, and undo it",
    "encode": "frozen features once, to train on them without the encoder",
}
_MEASURES = {
    "perplexity": "of the decoder on a text, with and without the extension",
    "choice": "multiple-choice questions by the likelihood of their choices",
}
_STAGES = {"align": "stage 1: align pictures with captions", "instruct": "stage 2: instruction tuning"}


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32"
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-layers-only", action="store_true", help="of LLaMA 3.2 Vision, leave out the cross-attention"
    )
    parser.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="a field of config.json that is unknown here and known to you to be harmless; again for several",
    )


def _add_llava(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vision-tower", metavar="DIR", default=None, help="of a LLaVA whose config only names its encoder: its folder"
    )
    parser.add_argument(
        "--model-base", metavar="DIR", default=None, help="of a LLaVA folder with the projector alone: the LLaMA"
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb; the arguments of the two stages are left to LightningCLI."""
    parser = argparse.ArgumentParser(prog="visplice", description="Gives a frozen LLaMA sight.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    demo = verbs.add_parser("demo", help="train and test the embedded model from nothing, then open the chat")
    demo.add_argument(
        "--out", default="runs/demo", help="folder for data, models, report and figures (default: %(default)s)"
    )
    demo.add_argument("--no-serve", action="store_true", help="stop before the chat")
    demo.add_argument("--long", action="store_true", help="train three times as long")
    demo.add_argument("--ablate", action="store_true", help="also without stage 1, and with broken parts")
    demo.add_argument(
        "--port", type=positive, default=7860, help="port of the chat on 127.0.0.1 (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="fixes data, weights and order (default: %(default)s)")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")

    chat = verbs.add_parser("chat", help="image chat in the browser")
    chat.add_argument(
        "--model", default="embedded", help="extension or LLaVA folder (default: the shipped small model)"
    )
    chat.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    chat.add_argument("--port", type=positive, default=7860, help="default: %(default)s")
    chat.add_argument("--open", action="store_true", help="open the page in the browser")
    chat.add_argument("--seed", type=int, default=None, help="fixes what sampling draws")
    _add_llava(chat)
    _add_device(chat)

    ask = verbs.add_parser("ask", help="one answer on the terminal")
    ask.add_argument("question", help="what to ask")
    ask.add_argument("--image", action="append", default=[], metavar="FILE", help="picture; again for several")
    ask.add_argument("--model", default="embedded", help="extension or LLaVA folder (default: the shipped small model)")
    ask.add_argument("--max-new-tokens", type=positive, default=64, help="default: %(default)s")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    ask.add_argument("--top-k", type=positive, default=None)
    ask.add_argument("--top-p", type=float, default=None)
    ask.add_argument("--seed", type=int, default=None, help="fixes what sampling draws")
    _add_llava(ask)
    _add_device(ask)

    bring = verbs.add_parser("import", help="a LLaMA from Meta's or Hugging Face's files to one folder of safetensors")
    bring.add_argument("source", metavar="SRC", help="folder, or owner/name on the Hugging Face hub")
    bring.add_argument("--out", required=True, metavar="DIR", help="new folder")
    bring.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default: as it is stored"
    )
    _add_checkpoint(bring)

    give = verbs.add_parser("export", help="a trained model as a folder that the LLaVA of transformers loads")
    give.add_argument("model", metavar="DIR", help="extension folder, or 'embedded'")
    give.add_argument("--to", choices=("hf-llava",), default="hf-llava", help="layout (default: %(default)s)")
    give.add_argument("--out", required=True, metavar="DIR", help="new folder")
    give.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    give.add_argument("--no-check", action="store_true", help="do not run both models side by side afterwards")

    show = verbs.add_parser("inspect", help="what a model is, or what a prompt with pictures becomes")
    show.add_argument("model", metavar="DIR", help="LLaMA, extension or LLaVA folder, hub name, or 'embedded'")
    show.add_argument("question", nargs="?", default=None, help="show the spliced sequence of this question instead")
    show.add_argument("--image", action="append", default=[], metavar="FILE", help="picture; again for several")
    show.add_argument("--answer", default=None, help="what the model is to say, to see the labels of training")
    show.add_argument("--yaml", action="store_true", help="show the config instead that trains on it in stage 2")
    show.add_argument("--template", default=None, help="prompt template (default: by the control tokens)")
    show.add_argument(
        "--visual-tokens",
        type=positive,
        default=257,
        help="tokens of one picture, where the folder names no encoder (default: %(default)s, ViT-L/14 at 224 pixels)",
    )
    _add_llava(show)
    _add_checkpoint(show)

    merge = verbs.add_parser("merge", help="a projector and its LoRA pack to one plain projector, or back")
    merge.add_argument("model", metavar="DIR", help="extension folder")
    merge.add_argument("--out", required=True, metavar="DIR", help="new folder")
    merge.add_argument("--undo", action="store_true", help="the projector as it was, to the bit, and the pack on top")

    for stage, text in _STAGES.items():
        verbs.add_parser(stage, help=f"{text} (fit or validate; --help lists all)", add_help=False)

    data = verbs.add_parser("data", help="published files to shards, and what is to be known and done about them")
    jobs = data.add_subparsers(dest="job", metavar="JOB", required=True)
    for job, text in _DATA_JOBS.items():
        import_module(f"visplice.app.data_{job}").add_arguments(jobs.add_parser(job, help=text))

    evaluate = verbs.add_parser("eval", help="a model's answers to a benchmark, their score and a report")
    import_module("visplice.app.evaluate").add_arguments(evaluate)
    _add_llava(evaluate)
    _add_device(evaluate)
    import_module("visplice.app.score").add_arguments(
        verbs.add_parser("score", help="the score of answers to a benchmark, as its official tool gives it")
    )

    import_module("visplice.app.compare").add_arguments(
        verbs.add_parser("compare", help="whether one model is better than another on the same questions")
    )
    for verb, text in _MEASURES.items():
        measure = verbs.add_parser(verb, help=text)
        import_module(f"visplice.app.{verb}").add_arguments(measure)
        _add_llava(measure)
        _add_device(measure)

    verbs.add_parser("doctor", help="versions, devices, what is missing")
    return parser


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    options, rest = parser.parse_known_args(words)
    if options.verb == "inspect" and options.question is None and len(rest) == 1 and not rest[0].startswith("-"):
        options.question = rest.pop()  # argparse takes an optional word only right behind the one before it
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status. What a user can cause ends in one line and status 2."""
    # Spinning threads starve each other as soon as one other process is busy; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    try:
        if words and words[0] in _STAGES:
            import_module("visplice.train.cli").run(words[0], words[1:])
            return 0
        options = _parse(parser, words)
        if options.verb is None:
            parser.print_help()
            return 2
        module = f"data_{options.job}" if options.verb == "data" else _MODULES.get(options.verb, options.verb)
        verb: Callable[[argparse.Namespace], int] = import_module(f"visplice.app.{module}").main
        return verb(options)
    except KeyboardInterrupt:
        print("\nvisplice: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        from visplice.train.stopped import TrainingStopped

        if not isinstance(error, TrainingStopped):
            raise
        if str(error):
            print(f"visplice: {' '.join(str(error).split())}", file=sys.stderr)
        # The process that started the others says how it went; Lightning would kill it for a child that failed.
        return 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"visplice: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
