"""Conversations about a picture, one per tab of the chat page; nothing of the page is known here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from visplice.lm.generate import Sampling
from visplice.lm.vision_llama import VisionLlama, user_message

WAITING, NO_ANSWER = "…", "(no answer)"  # shown where an answer has no text yet, or never got any


@dataclass(eq=False)
class Turn:
    """A question and as much of its answer as there is."""

    question: str
    sampling: Sampling = field(default_factory=Sampling)
    answer: str = ""


@dataclass
class Session:
    """One tab: its picture, its conversation, and the turn that waits for its answer or is being answered."""

    image: Image.Image | None = None
    turns: list[Turn] = field(default_factory=list)
    current: Turn | None = None


def start_over(session: Session) -> None:
    """Forgets the conversation, not the picture; an answer under way ends at its next token."""
    session.current, session.turns = None, []


def set_picture(session: Session, image: Image.Image | None) -> None:
    """Another picture, or none, begins a new conversation."""
    start_over(session)
    session.image = image


def ask(session: Session, question: str, sampling: Sampling) -> bool:
    """Takes a question up unless it is blank or another one is being answered; says whether it did."""
    if session.current is not None or not question.strip():
        return False
    session.current = Turn(question.strip(), sampling)
    session.turns.append(session.current)
    return True


def stop(session: Session) -> None:
    """Ends the answer under way at its next token; what there is of it stays."""
    session.current = None


def messages_of(session: Session) -> list[dict[str, Any]]:
    """What the model is sent: the picture and all turns so far, without those that got no answer."""
    messages: list[dict[str, Any]] = []
    for turn in session.turns:
        if turn.answer or turn is session.current:
            images = [session.image] if session.image is not None and not messages else []
            messages.append(user_message(turn.question, images))
            messages.append({"role": "assistant", "content": turn.answer})
    return messages[:-1]


def answer(model: VisionLlama, session: Session) -> Iterator[None]:
    """Answers the current turn; yields after every piece. A turn that fails is forgotten.

    Raises:
        ValueError: the conversation does not fit into the model, or its `<image>` marks do not fit its picture.
    """
    turn = session.current
    if turn is None:  # stopped while it waited for another tab
        return
    try:
        for piece in model.stream(messages_of(session), turn.sampling):
            if session.current is not turn:
                return
            turn.answer += piece
            yield
    except Exception:
        session.turns = [other for other in session.turns if other is not turn]
        raise
    finally:
        if session.current is turn:
            session.current = None


def shown(session: Session) -> list[dict[str, str]]:
    """The conversation as the page shows it."""
    rows = []
    for turn in session.turns:
        rows.append({"role": "user", "content": turn.question})
        missing = WAITING if turn is session.current else NO_ANSWER
        rows.append({"role": "assistant", "content": turn.answer or missing})
    return rows


def explain(error: Exception, turns: int) -> str:
    """One message for the page; `turns` is how many came before."""
    if not isinstance(error, ValueError):
        return f"{type(error).__name__}: {error}. The terminal says more."
    hint = " All turns so far are sent along; “New conversation” begins without them." if turns else ""
    return f"{error}.{hint}"
