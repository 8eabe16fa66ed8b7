"""Requests of lmms-eval, answered by a `VisionLlama`. Nothing of lmms-eval is imported.

A request has `args`, a tuple; its last three find the document: `docs[task][split][doc_id]`.

    generate_until, simple   context, gen_kwargs, doc_to_visual, doc_id, task, split
    generate_until, chat     context, doc_to_messages, gen_kwargs, doc_id, task, split
    loglikelihood            context, continuation, doc_to_visual, doc_id, task, split

Every request is looked up by its own task: those of one batch may come from several.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from visplice.lm.generate import Sampling
from visplice.lm.prompt import IMAGE
from visplice.lm.vision_llama import VisionLlama, user_message
from visplice.vision.image import open_image

Messages = list[dict[str, Any]]

PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_NEW_TOKENS = 1024  # where a task says nothing, as in lmms-eval's own models
# lmms-eval puts its separator of few-shot examples here for every task that names no stop. Taken at its word it would
# cut descriptions and reasoning behind their first paragraph.
FILLER = ["\n\n"]
READ = ("until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "seed")


@dataclass(frozen=True)
class Decoding:
    """How one request wants its answer made."""

    sampling: Sampling
    until: tuple[str, ...] = ()


def read_decoding(options: Mapping[str, Any], seed: int) -> Decoding:
    """A task's `generation_kwargs`; those that are not `READ` are left to the caller.

    Raises:
        ValueError: beams were asked for, or a value is out of range.
    """
    if (beams := options.get("num_beams") or 1) != 1:
        raise ValueError(f"num_beams is {beams}, but visplice has no beam search; give --gen_kwargs num_beams=1")
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    temperature = options.get("temperature")
    if temperature is None:
        temperature = 1.0 if options.get("do_sample") else 0.0
    if options.get("do_sample") is False:
        temperature = 0.0
    most = options.get("max_new_tokens")
    sampling = Sampling(
        max_new_tokens=MAX_NEW_TOKENS if most is None else int(most),
        temperature=float(temperature),
        top_k=options.get("top_k") or None,
        top_p=options.get("top_p") or None,
        seed=int(options.get("seed", seed)),
    )
    if sampling.temperature == 0:  # so that all greedy requests of one length share their batches
        sampling = Sampling(max_new_tokens=sampling.max_new_tokens)
    return Decoding(sampling, () if stops == FILLER else tuple(stop for stop in stops if stop))


# --- documents to conversations ---


def simple_messages(context: str, visuals: Any, where: str) -> Messages:
    """One question about what `doc_to_visual` gave."""
    if visuals is None:
        visuals = []
    elif not isinstance(visuals, list | tuple):
        visuals = [visuals]
    return [_placed(context, [_picture(visual, where) for visual in visuals])]


def chat_messages(messages: Any, where: str) -> Messages:
    """What `doc_to_messages` gave, in the form of `VisionLlama.chat`."""
    written: Messages = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts: list[dict[str, Any]] = []
        for part in content:
            kind = part.get("type")
            if kind == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif kind == "image":
                parts.append({"type": "image", "image": _picture(part.get("url", part.get("image")), where)})
            else:
                raise ValueError(_not_a_picture(f"{kind} ({part.get('url')!r:.80})", where))
        pictures = [part["image"] for part in parts if part["type"] == "image"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if message["role"] == "user" and len(texts) == 1 and parts[-1]["type"] == "text":
            written.append(_placed(texts[0], pictures))
        else:
            written.append({"role": message["role"], "content": parts if pictures else "".join(texts)})
    return written


def _placed(text: str, pictures: list[Image.Image]) -> dict[str, Any]:
    """The user's message: pictures at the marks in its text, in front where the marks are not one for each."""
    if text.count(IMAGE) in (0, len(pictures)):
        return user_message(text, pictures)
    front: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*front, {"type": "text", "text": text}]}


def _picture(given: Any, where: str) -> Image.Image:
    if isinstance(given, str | Path) and not str(given).lower().endswith(PICTURE_FILES):
        raise ValueError(_not_a_picture(f"video or sound ({str(given)!r:.80})", where))
    if not isinstance(given, str | Path | Image.Image):
        raise ValueError(_not_a_picture(type(given).__name__, where))
    try:
        return open_image(given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _not_a_picture(what: str, where: str) -> str:
    return f"{where} shows the model {what}; visplice sees pictures alone, so leave the task out"


# --- answers ---


def generate_until(
    model: VisionLlama,
    requests: Sequence[Any],
    docs: Mapping[str, Any],
    *,
    chat: bool,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> list[str]:
    """Answers in the order of the requests; which of them share a batch changes nothing.

    An answer ends where the model's positions do. Where not even the prompt fits it is empty, and the request is named
    on standard error.

    Raises:
        ValueError: a request wants what is not built, or its messages cannot be written in the model's template.
    """
    groups: dict[Decoding, list[int]] = {}
    repeated: Counter[tuple[Any, ...]] = Counter()
    unread: set[str] = set()
    for number, request in enumerate(requests):
        options = request.args[2 if chat else 1] or {}
        unread |= set(options) - set(READ)
        decoding = read_decoding(options, seed)
        if decoding.sampling.seed is not None:  # a question that is asked again has to be drawn anew
            place = request.args[3:]
            again = replace(decoding.sampling, seed=decoding.sampling.seed + repeated[place])
            decoding, repeated[place] = replace(decoding, sampling=again), repeated[place] + 1
        groups.setdefault(decoding, []).append(number)
    if unread and progress:
        print(f"visplice: generation_kwargs that were not read: {', '.join(sorted(unread))}", file=sys.stderr)

    answers = [""] * len(requests)
    rooms = _Rooms(model)
    with tqdm(total=len(requests), desc="visplice", unit="answer", disable=not progress) as bar:
        for decoding, numbers in groups.items():
            wanted = decoding.sampling.max_new_tokens
            # The longest come first: what does not fit into memory says so at once.
            numbers.sort(key=lambda number: -len(str(requests[number].args[0])))
            for batch in _cut(numbers, batch_size):
                conversations = {number: _conversation(requests[number], docs, chat=chat) for number in batch}
                by_room: dict[int, list[int]] = {}
                for number, messages in conversations.items():
                    if room := rooms.of(messages, wanted, _where(requests[number]), answering=True):
                        by_room.setdefault(room, []).append(number)
                for room, together in by_room.items():
                    said = model.answer(
                        [conversations[number] for number in together],
                        replace(decoding.sampling, max_new_tokens=room),
                        until=decoding.until,
                    )
                    for number, text in zip(together, said, strict=True):
                        answers[number] = text
                bar.update(len(batch))
    rooms.report()
    return answers


def loglikelihood(
    model: VisionLlama,
    requests: Sequence[Any],
    docs: Mapping[str, Any],
    *,
    batch_size: int = 1,
    mean: bool = True,
    progress: bool = True,
) -> list[tuple[float, bool]]:
    """The loss of every continuation as the answer to its context, and whether greedy decoding would say just that.

    It is a loss and no likelihood, smaller where the continuation is likelier: of the choices lmms-eval takes the one
    with the smallest value. The token that ends the answer counts, and blanks around the continuation do not.

    Args:
        mean: the mean over the tokens, else their sum.
    Raises:
        ValueError: a request wants what is not built.
    """
    found: list[tuple[float, bool]] = []
    rooms = _Rooms(model)
    with tqdm(total=len(requests), desc="visplice", unit="choice", disable=not progress) as bar:
        for batch in _cut(range(len(requests)), batch_size):
            shown: dict[tuple[Any, ...], Any] = {}  # choices of one question share its pictures, encoded once
            fitting: list[Messages] = []
            fits: list[bool] = []
            for number in batch:
                args = requests[number].args
                if len(args) != 6:
                    raise ValueError(
                        f"a loglikelihood request has {len(args)} arguments where 6 are due; "
                        "the metric acc_mutual_info, which asks so, is not built"
                    )
                context, continuation, _, *place = args
                said = continuation if isinstance(continuation, str) else str(continuation(_document(place, docs)))
                key = (context, *place)
                if key not in shown:
                    shown[key] = _conversation(requests[number], docs, chat=False)
                messages = [*shown[key], {"role": "assistant", "content": said.strip()}]
                fits.append(bool(rooms.of(messages, 0, _where(requests[number]), answering=False)))
                if fits[-1]:
                    fitting.append(messages)
            scores = iter(model.log_probs(fitting) if fitting else [])
            for fit in fits:
                if not fit:
                    found.append((float("inf"), False))
                    continue
                log_probs, likeliest = next(scores)
                loss = -(log_probs.mean() if mean else log_probs.sum())
                found.append((float(loss), bool(likeliest.all())))
            bar.update(len(batch))
    rooms.report()
    return found


class _Rooms:
    """What the model's positions leave behind a prompt, and how often that was too little."""

    def __init__(self, model: VisionLlama) -> None:
        self._model, self._limit = model, model.lm.config.context_length
        self._without = self._shortened = 0

    def of(self, messages: Messages, wanted: int, where: str, *, answering: bool) -> int:
        """Tokens that may be made; one where nothing is answered and all fits; 0 where the prompt does not."""
        try:
            length = len(self._model.prompts.build(messages, add_generation_prompt=answering).ids)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        room = self._limit - length
        if not answering:
            wanted, room = 1, room + 1
        if room < 1:
            self._without += 1
            tqdm.write(
                f"visplice: {where}: the prompt has {length} tokens, the model {self._limit} positions; "
                "it stays without an answer",
                file=sys.stderr,
            )
            return 0
        self._shortened += room < wanted
        return min(wanted, room)

    def report(self) -> None:
        if self._without:
            print(f"visplice: {self._without} requests did not fit and stay without an answer", file=sys.stderr)
        if self._shortened:
            print(
                f"visplice: {self._shortened} requests allow longer answers than {self._limit} positions hold",
                file=sys.stderr,
            )


def _conversation(request: Any, docs: Mapping[str, Any], *, chat: bool) -> Messages:
    context, second, third, *place = request.args
    where, doc = _where(request), _document(place, docs)
    if chat:
        return chat_messages(second(doc), where)
    if not isinstance(context, str):
        raise ValueError(f"{where}: the context is {context!r:.80}; visplice reads one text")
    return simple_messages(context, None if third is None else third(doc), where)


def _document(place: Sequence[Any], docs: Mapping[str, Any]) -> Any:
    doc_id, task, split = place
    return docs[task][split][doc_id]


def _where(request: Any) -> str:
    doc_id, task, _ = request.args[3:]
    return f"task {task}, document {doc_id}"


def _cut(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]
