"""The ids of a question and of each of its choices, so that the choices share what stands before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from visplice.lm.prompt import PromptBuilder
from visplice.lm.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ChoicePrompt:
    """One question: what its choices share, and each of them."""

    ids: list[int]  # with the image blocks of pictures
    choices: list[list[int]]


def raw_prompt(tokenizer: Tokenizer, question: str, choices: Sequence[str]) -> ChoicePrompt:
    """The question, a blank and a choice as plain text behind the begin token, as lm-evaluation-harness has them.

    Blanks that the question ends with move to the choice, since tokens begin with them. A choice is what the ids of
    both together have beyond those of the question alone.

    Raises:
        ValueError: a choice has no id of its own.
    """
    context = question.rstrip()
    between = question[len(context) :] + " "
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    before = tokenizer.encode(context)
    behind = [tokenizer.encode(context + between + choice)[len(before) :] for choice in choices]
    _refuse_without_ids(behind, choices)
    if not begin and not before:
        raise ValueError(
            "the question has no token and the tokenizer no begin token, so nothing stands before a choice"
        )
    return ChoicePrompt(ids=begin + before, choices=behind)


def chat_prompt(builder: PromptBuilder, messages: Sequence[Mapping[str, Any]], choices: Sequence[str]) -> ChoicePrompt:
    """The messages up to where the model speaks, and each choice as what it says, without the end of its turn.

    Raises:
        ValueError: a choice has no id of its own, or as for `PromptBuilder.build`.
    """
    open_ended = PromptBuilder(builder.tokenizer, replace(builder.template, end=()), builder.visual)
    before = builder.build(messages, add_generation_prompt=True).ids
    answers = ({"role": "assistant", "content": choice} for choice in choices)
    behind = [open_ended.build([*messages, answer]).ids[len(before) :] for answer in answers]
    _refuse_without_ids(behind, choices)
    return ChoicePrompt(ids=before, choices=behind)


def _refuse_without_ids(ids: Sequence[Sequence[int]], choices: Sequence[str]) -> None:
    for number, (own, choice) in enumerate(zip(ids, choices, strict=True)):
        if not own:
            raise ValueError(f"choices[{number}] {choice!r} adds no token to the question; there is nothing to score")
