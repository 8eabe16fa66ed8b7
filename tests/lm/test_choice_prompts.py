"""Where a question ends and its choices begin."""

import pytest

from visplice.lm.choice_prompts import chat_prompt, raw_prompt
from visplice.lm.prompt import PromptBuilder, VisualTokens
from visplice.lm.templates import template_named
from visplice.lm.vision_llama import user_message

CHOICES = ["red", "small blue", "the"]


@pytest.mark.parametrize("blanks", ["", " ", "  ", "\n"])
def test_raw_question_and_choice_are_the_text_as_a_whole(tokenizer, blanks):
    """Blanks at the end of the question belong to the choice, as in lm-evaluation-harness."""
    question = "what is the color?"
    prompt = raw_prompt(tokenizer, question + blanks, CHOICES)
    assert prompt.ids == [tokenizer.bos_id, *tokenizer.encode(question)]
    for choice, ids in zip(CHOICES, prompt.choices, strict=True):
        whole = tokenizer.encode(f"{question}{blanks} {choice}")
        assert [*prompt.ids[1:], *ids] == whole
        assert tokenizer.decode(whole).endswith(choice)


def builder(tokenizer, count=3):
    return PromptBuilder(tokenizer, template_named("turns"), VisualTokens(vocab_size=324, count=count))


def test_chat_choices_are_what_training_supervises_without_the_end(tokenizer):
    prompts = builder(tokenizer)
    message = user_message("what is <image>?", ["a.png"])
    prompt = chat_prompt(prompts, [message], CHOICES)
    assert prompt.ids == prompts.build([message], add_generation_prompt=True).ids
    for choice, ids in zip(CHOICES, prompt.choices, strict=True):
        trained = prompts.build([message, {"role": "assistant", "content": choice}])
        supervised = [token for token in trained.labels if token >= 0]
        assert supervised == [*ids, tokenizer.control("<|end|>")]
        assert prompt.ids + supervised == trained.ids


def test_choice_without_a_token_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode", lambda text: [7])
    with pytest.raises(ValueError, match=r"choices\[0\] 'red' adds no token"):
        raw_prompt(tokenizer, "what?", CHOICES)


def test_question_without_anything_before_the_choice_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "bos_id", None)
    with pytest.raises(ValueError, match="nothing stands before a choice"):
        raw_prompt(tokenizer, " ", CHOICES)
