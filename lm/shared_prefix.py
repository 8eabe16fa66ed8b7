"""Greedy answers to many questions about few pictures: each picture's prefix is computed once.

A row of the batch is a picture. In front stands what its prompts share, up to and with the picture; behind it lie its
questions side by side, each of which sees the prefix and itself and counts its positions on from the prefix. So every
question has the logits of a prompt of its own, and neither the encoder nor the decoder looks at a picture twice.

Shape letters: R rows (pictures), P positions of the longest prefix, W of all questions of a row, k questions in a row,
T slots of the cache = P + W + k per step, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visplice.lm.decoder import KVCache
from visplice.lm.generate import pad_left
from visplice.lm.masks import left_padded
from visplice.lm.vision_llama import VisionLlama, sayable

_PADDING = -1  # owner of a slot that nobody looks at


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Prompts about the same pictures."""

    prompts: Sequence[Sequence[int]]  # ids of each, with the image blocks in place
    features: Tensor  # [M, N, d_vision], of the blocks in every prompt


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said."""

    ids: list[int]
    complete: bool  # it ended by itself, not at the limit


@torch.inference_mode()
def answer(
    model: VisionLlama, asked: Sequence[Asked], *, max_new_tokens: int, at_once: int | None = None
) -> list[list[Answer]]:
    """Greedy answers, as one prompt at a time gives them.

    Args:
        model: the model.
        asked: one for each picture.
        max_new_tokens: where an answer is cut off.
        at_once: questions of one picture that are answered at the same time; None takes all.
    Returns:
        For each of `asked`, an answer to each of its prompts.
    Raises:
        ValueError: a prompt and its answer do not fit into the model's positions, or nothing was asked.
        FloatingPointError: the logits are no numbers.
    """
    longest = max((len(ids) for one in asked for ids in one.prompts), default=0)
    if not asked or not all(one.prompts and all(one.prompts) for one in asked):
        raise ValueError("there is a picture without a prompt, or a prompt without a token")
    limit = model.lm.config.context_length
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt has {longest} tokens and {max_new_tokens} new ones were asked for, but the model has {limit} "
            "positions; shorten the prompt or the answer"
        )
    most = max(len(one.prompts) for one in asked)
    step = min(most, at_once or most)
    rows = _Rows(model, asked, max_new_tokens, step)
    answers: list[list[Answer]] = [[] for _ in asked]
    for first in range(0, most, step):
        chosen = [one.prompts[first : first + step] for one in asked]
        for own, found in zip(answers, rows.answer(chosen), strict=True):
            own += found
    return answers


def shared_length(prompts: Sequence[Sequence[int]], vocab_size: int) -> int:
    """How many ids all prompts begin with, at most to the end of their image blocks; each has one or more behind them.

    No block is cut: one that not all prompts have at the same place belongs to each of them.
    """
    visual = [place for place, token in enumerate(prompts[0]) if token >= vocab_size]
    length = min(visual[-1] + 1 if visual else len(prompts[0]), min(map(len, prompts)) - 1)
    for ids in prompts[1:]:
        length = next((place for place in range(length) if ids[place] != prompts[0][place]), length)
    return min(length, visual[0]) if visual and length <= visual[-1] else length


class _Rows:
    """The prefixes of a batch in a cache, and the questions that are put behind them."""

    def __init__(self, model: VisionLlama, asked: Sequence[Asked], max_new_tokens: int, at_once: int) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens
        prefixes, self.behind = [], []
        for one in asked:
            length = shared_length(one.prompts, model.visual.vocab_size)
            prefixes.append(self._embed(one.prompts[0][:length], one.features))
            self.behind.append((length, one.features))
        self.prefix, self.lengths = pad_left(prefixes)
        self.width = self.prefix.shape[1]
        widest = max(
            sum(len(ids) - length for ids in one.prompts[first : first + at_once])
            for one, (length, _) in zip(asked, self.behind, strict=True)
            for first in range(0, len(one.prompts), at_once)
        )
        capacity = self.width + widest + at_once * max_new_tokens
        self.slots = torch.arange(capacity, device=model.device)
        self.cache = KVCache(model.lm.config, len(asked), capacity, device=model.device, dtype=self.prefix.dtype)
        if self.width:
            positions, mask = None, None
            if int(self.lengths.min()) < self.width:
                positions, mask = left_padded(self.lengths, self.width, capacity)
            model.lm.hidden(
                self.prefix, positions=positions, mask=mask, cache=self.cache, slots=self.slots[: self.width]
            )

    def _embed(self, ids: Sequence[int], features: Tensor) -> Tensor:
        row = torch.tensor([list(ids)], dtype=torch.long, device=self.model.device)
        if row.numel() and int(row.max()) >= self.model.visual.vocab_size:
            return self.model.embed(row, features)[0]
        return self.model.lm.tok_embeddings(row)[0]

    def answer(self, prompts: Sequence[Sequence[Sequence[int]]]) -> list[list[Answer]]:
        """Answers to some prompts of each row, none for a row without."""
        model, device = self.model, self.model.device
        num_rows, most = len(prompts), max(map(len, prompts))
        parts = [
            [self._embed(ids[length:], features) for ids in own]
            for own, (length, features) in zip(prompts, self.behind, strict=True)
        ]
        width = max(sum(map(len, own)) for own in parts)
        embeddings = self.prefix.new_zeros(num_rows, width, self.prefix.shape[2])
        owners = torch.full((num_rows, width), _PADDING, dtype=torch.long)
        steps = torch.zeros(num_rows, width, dtype=torch.long)
        ends = torch.zeros(num_rows, most, dtype=torch.long)  # where in a row a question's last token stands
        counts = torch.zeros(num_rows, most, dtype=torch.long)
        for row, own in enumerate(parts):
            begin = 0
            for number, part in enumerate(own):
                end = begin + len(part)
                embeddings[row, begin:end] = part
                owners[row, begin:end] = number + 1
                steps[row, begin:end] = torch.arange(len(part))
                ends[row, number], counts[row, number] = end - 1, len(part)
                begin = end
        owners, steps, ends, counts = (side.to(device) for side in (owners, steps, ends, counts))
        branches = torch.arange(1, most + 1, device=device).expand(num_rows, most)
        in_prefix = torch.where(self.slots[: self.width] < self.width - self.lengths[:, None], _PADDING, 0)
        drawn = branches.repeat(1, self.max_new_tokens)
        owner_of = torch.cat([in_prefix, owners, drawn], dim=1)  # [R, T], 0 in the prefix, then 1, 2, ...
        used = self.slots[: owner_of.shape[1]]

        def mask(first: int, count: int) -> Tensor:
            """`[R, 1, count, T]` for the queries in `count` slots from `first`."""
            queries = used[first : first + count, None]
            own = owner_of[:, first : first + count, None]
            keys = owner_of[:, None, :]
            seen = ((keys == 0) | (keys == own)) & (keys != _PADDING) & (used <= queries)
            return self._padded((seen | (used == queries))[:, None])

        hidden = model.lm.hidden(
            embeddings,
            positions=self.lengths[:, None] + steps,
            mask=mask(self.width, width),
            cache=self.cache,
            slots=self.slots[self.width : self.width + width],
        )
        last = hidden.gather(1, ends[:, :, None].expand(-1, -1, hidden.shape[2]))
        return self._draw(prompts, last, self.lengths[:, None] + counts, self.width + width, mask)

    def _padded(self, mask: Tensor) -> Tensor:
        """Widened to the whole cache, whose last slots a narrower pass leaves alone."""
        return torch.nn.functional.pad(mask, (0, len(self.slots) - mask.shape[3]))

    def _draw(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        last: Tensor,
        positions: Tensor,
        first_slot: int,
        mask: Callable[[int, int], Tensor],
    ) -> list[list[Answer]]:
        model = self.model
        stops, known = set(model.prompts.stop_ids), sayable(model.tokenizer)
        found = [[Answer(ids=[], complete=False) for _ in own] for own in prompts]
        open_ = [[True] * len(own) for own in prompts]
        most = last.shape[1]
        for step in range(self.max_new_tokens):
            logits = model.lm.logits(last)[..., :known]  # [R, k, V]
            if step == 0 and not torch.isfinite(logits).all():
                raise FloatingPointError(
                    f"the logits are no numbers in {logits.dtype}; try --dtype bfloat16 or float32"
                )
            tokens = logits.argmax(-1)  # [R, k]
            for row, drawn in enumerate(tokens.tolist()):
                for number in range(len(prompts[row])):
                    if not open_[row][number]:
                        continue
                    if drawn[number] in stops:
                        open_[row][number] = False
                        found[row][number] = Answer(ids=found[row][number].ids, complete=True)
                    else:
                        found[row][number].ids.append(drawn[number])
            if step + 1 == self.max_new_tokens or not any(map(any, open_)):
                return found
            begin = first_slot + step * most
            hidden = model.lm.hidden(
                model.lm.tok_embeddings(tokens),
                positions=positions + step,
                mask=mask(begin, most),
                cache=self.cache,
                slots=self.slots[begin : begin + most],
            )
            last = hidden
        return found
