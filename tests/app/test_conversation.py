"""Conversations with a stand-in model that repeats what it was asked."""

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from visplice.app import conversation
from visplice.lm.generate import Sampling


class Echo:
    """Answers word by word with the last question; `sent` is what it was given."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.sent: list[list[dict[str, Any]]] = []
        self.failure = failure

    def stream(self, messages: list[dict[str, Any]], sampling: Sampling) -> Iterator[str]:
        self.sent.append(messages)
        yield "you "
        if self.failure:
            raise self.failure
        yield "said "
        yield messages[-1]["content"][-1]["text"]


def asked(session: conversation.Session, question: str, model: Any) -> None:
    assert conversation.ask(session, question, Sampling())
    for _ in conversation.answer(model, session):
        pass


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_first_question_carries_the_picture_and_later_ones_all_turns() -> None:
    image = Image.new("RGB", (8, 8))
    session, model = conversation.Session(image=image), Echo()
    asked(session, "one?", model)
    asked(session, " two?\n", model)
    first = {"role": "user", "content": [{"type": "image", "image": image}, text("one?")]}
    assert model.sent == [
        [first],
        [first, {"role": "assistant", "content": "you said one?"}, {"role": "user", "content": [text("two?")]}],
    ]
    assert [(row["role"], row["content"]) for row in conversation.shown(session)] == [
        ("user", "one?"),
        ("assistant", "you said one?"),
        ("user", "two?"),
        ("assistant", "you said two?"),
    ]


def test_text_alone_is_answered() -> None:
    session, model = conversation.Session(), Echo()
    asked(session, "hello", model)
    assert model.sent == [[{"role": "user", "content": [text("hello")]}]]


def test_answer_comes_piece_by_piece() -> None:
    session = conversation.Session()
    conversation.ask(session, "now?", Sampling())
    assert conversation.shown(session)[-1]["content"] == conversation.WAITING
    seen = [conversation.shown(session)[-1]["content"] for _ in conversation.answer(Echo(), session)]
    assert seen == ["you ", "you said ", "you said now?"]
    assert session.current is None


def test_stop_keeps_the_partial_answer_and_sends_it_along() -> None:
    session, model = conversation.Session(), Echo()
    conversation.ask(session, "one?", Sampling())
    steps = conversation.answer(model, session)
    next(steps)
    conversation.stop(session)
    assert list(steps) == []
    assert conversation.shown(session)[-1] == {"role": "assistant", "content": "you "}
    asked(session, "two?", model)
    assert model.sent[-1][1] == {"role": "assistant", "content": "you "}


def test_stop_before_the_first_piece_never_asks_the_model() -> None:
    session, model = conversation.Session(), Echo()
    conversation.ask(session, "one?", Sampling())
    conversation.stop(session)
    assert list(conversation.answer(model, session)) == [] and model.sent == []
    assert conversation.shown(session)[-1]["content"] == conversation.NO_ANSWER
    asked(session, "two?", model)
    assert model.sent == [[{"role": "user", "content": [text("two?")]}]]  # turns still alternate


@pytest.mark.parametrize("question", ["", " \n"])
def test_blank_question_is_not_taken_up(question: str) -> None:
    session = conversation.Session()
    assert not conversation.ask(session, question, Sampling())
    assert conversation.shown(session) == []


def test_second_question_waits_for_the_first_answer() -> None:
    session = conversation.Session()
    assert conversation.ask(session, "one?", Sampling())
    assert not conversation.ask(session, "two?", Sampling())


def test_new_picture_begins_a_new_conversation_and_ends_the_answer_under_way() -> None:
    session, model = conversation.Session(), Echo()
    conversation.ask(session, "one?", Sampling())
    steps = conversation.answer(model, session)
    next(steps)
    conversation.set_picture(session, Image.new("RGB", (8, 8)))
    conversation.ask(session, "two?", Sampling())
    assert list(steps) == []
    assert session.current is not None, "the old answer must not end the new turn"
    assert [row["content"] for row in conversation.shown(session)] == ["two?", conversation.WAITING]


def test_failed_turn_is_forgotten_and_the_session_stays_usable() -> None:
    session = conversation.Session()
    asked(session, "one?", Echo())
    with pytest.raises(ValueError, match="too long"):
        asked(session, "two?", Echo(ValueError("too long")))
    assert len(conversation.shown(session)) == 2
    asked(session, "three?", Echo())
    assert conversation.shown(session)[-1]["content"] == "you said three?"


def test_image_marks_without_a_picture_are_refused() -> None:
    session = conversation.Session()
    with pytest.raises(ValueError, match="1 image slot"):
        asked(session, "<image> what?", Echo())
    assert session.current is None and session.turns == []


def test_tab_that_closes_in_mid_answer_frees_its_session() -> None:
    session = conversation.Session()
    conversation.ask(session, "one?", Sampling())
    steps = conversation.answer(Echo(), session)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert session.current is None


def test_messages_for_the_page() -> None:
    assert conversation.explain(ValueError("too long"), 0) == "too long."
    assert "New conversation" in conversation.explain(ValueError("too long"), 1)
    assert conversation.explain(RuntimeError("out of memory"), 1).startswith("RuntimeError: out of memory")
