"""`visplice choice`: multiple-choice questions, answered by which choice the model finds likeliest."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from visplice.train.scoring.choice import Question

_LINE = '{"id"?: 7, "question": "...", "choices": ["...", "..."], "answer": 0, "image"?: "..."}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments behind the verb, but for those of a LLaVA and a device."""
    parser.description = (
        "Scores multiple-choice questions by the log-likelihood of their choices, as lm-evaluation-harness does: acc, "
        "acc_norm (per character) and acc_bytes (per byte), with chance level and intervals."
    )
    parser.add_argument(
        "--model", default="embedded", help="extension, LLaVA or LLaMA folder (default: the shipped small model)"
    )
    parser.add_argument("--questions", required=True, metavar="FILE", help=f"lines of {_LINE}")
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures (default: that of the questions)")
    parser.add_argument(
        "--chat", action="store_true", help="put questions through the prompt template; those with a picture always are"
    )
    parser.add_argument("--out", metavar="FILE", help="write a line of JSON per question, as visplice compare reads it")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing rounded")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals' draws (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    import json
    from pathlib import Path

    from tqdm import tqdm

    from visplice.train.scoring.choice import choice_report, choice_text, question_lines, read_questions

    file = read_questions(options.questions, options.images)  # a mistake is said before the model is loaded
    out = None if options.out is None else Path(options.out)
    if out is not None and out.resolve() == Path(options.questions).resolve():
        raise ValueError(f"--out {out} is the file of --questions; name another one to write")
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    answerer = _Answerer(options, pictured=any(question.image for question in file.questions))
    found = []
    for question in tqdm(file.questions, desc="answering", unit=" questions", disable=None):
        try:
            found.append(answerer.log_probabilities(question))
        except ValueError as error:
            raise ValueError(f"{options.questions}: line {question.line}: {error}") from error
    settings = {"model": options.model, "prompt": answerer.prompt, "dtype": options.dtype, "device": options.device}
    told = choice_report(file, found, seed=options.seed, settings=settings)
    if out is not None:
        out.write_text(question_lines(file, found), encoding="utf-8")
    print(json.dumps(told, indent=2) if options.json else choice_text(told))
    return 0


class _Answerer:
    """A model, and how questions are put to it."""

    def __init__(self, options: argparse.Namespace, *, pictured: bool) -> None:
        """Opens the model.

        Raises:
            ValueError: it cannot be opened, there are pictures and it sees none, or it has no template to chat with.
        """
        from visplice.app.device import pick_device, pick_dtype
        from visplice.app.named import extension_named, load_bare
        from visplice.lm.extension import load_extension
        from visplice.lm.prompt import PromptBuilder, VisualTokens
        from visplice.lm.templates import template_for

        on: Any = {"device": pick_device(options.device), "dtype": pick_dtype(options.dtype)}
        named = extension_named(options.model, options.vision_tower, options.model_base)
        self._chat = options.chat
        self._last: tuple[str, Tensor] | None = None  # a picture and its features
        if named is None:
            if pictured:
                raise ValueError(f"--model {options.model} is a LLaMA alone, but there are questions with a picture")
            bare = load_bare(options.model, **on)
            self._model, self._lm, self._tokenizer = None, bare.lm, bare.tokenizer
            if options.chat:
                visual = VisualTokens(vocab_size=bare.lm.config.vocab_size, count=1)
                self._prompts = PromptBuilder(bare.tokenizer, template_for(bare.tokenizer), visual)
        else:
            parts = {"vision_tower": options.vision_tower, "model_base": options.model_base}
            model = load_extension(options.model, **on, **parts)
            self._model, self._lm, self._tokenizer = model, model.lm, model.tokenizer
            self._prompts = model.prompts
        raw = "raw text, behind the begin token" if self._tokenizer.bos_id is not None else "raw text, no begin token"
        chat = f"template {self._prompts.template.name!r}" if options.chat or pictured else ""
        self.prompt = chat if options.chat else f"{raw}{f'; with a picture {chat}' if pictured else ''}"

    def log_probabilities(self, question: Question) -> list[float]:
        """Of each choice, behind the question."""
        import torch

        from visplice.lm.choice_prompts import chat_prompt, raw_prompt
        from visplice.lm.likelihood import choice_log_probabilities
        from visplice.lm.vision_llama import user_message

        if self._chat or question.image is not None:
            images = [] if question.image is None else [question.image]
            message = user_message(question.question, images, name="the question")
            prompt = chat_prompt(self._prompts, [message], question.choices)
        else:
            prompt = raw_prompt(self._tokenizer, question.question, question.choices)
        ids = torch.tensor([prompt.ids], device=self._lm.device)
        with torch.inference_mode():
            if self._model is not None and question.image is not None:
                prefix = self._model.embed(ids, self._seen(question.image))[0]
            else:
                prefix = self._lm.tok_embeddings(ids)[0]
        return choice_log_probabilities(self._lm, prefix, prompt.choices)

    def _seen(self, image: str) -> Tensor:
        """Features of a picture; the last is kept, since questions about one stand together."""
        assert self._model is not None
        if self._last is None or self._last[0] != image:
            self._last = (image, self._model.features(self._model.pixels([image])))
        return self._last[1]
