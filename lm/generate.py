"""Generation: embeddings in, token ids out, one step at a time. Knows nothing of text or pictures."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visplice.lm.decoder import KVCache, Llama
from visplice.lm.masks import left_padded


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy: the likeliest token
    top_k: int | None = None  # draw from the k likeliest
    top_p: float | None = None  # draw from the likeliest that together reach this probability
    seed: int | None = None  # same seed, same tokens; None draws a new one

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it is at least 1")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it is 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it is at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is above 0 and at most 1")


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Next tokens `[B]` from logits `[B, V]`; every row has its own generator, so a batch draws what singles draw."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        kth = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    probabilities = scores.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # A token is dropped when those before it already reach top_p; the first always stays.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(dropped, 0.0))
    rows = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(rows)


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings `[S_i, D]` of unequal lengths to `[B, S, D]`, padded in front, and their lengths `[B]`."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    width = int(lengths.max())
    batch = torch.stack([torch.nn.functional.pad(row, (0, 0, width - len(row), 0)) for row in rows])
    return batch, lengths


@torch.inference_mode()
def generate(
    model: Llama,
    embeddings: Tensor,
    lengths: Tensor,
    sampling: Sampling,
    stop_ids: Collection[int],
    *,
    num_ids: int | None = None,
    keep_stops: bool = False,
    check_length: bool = True,
) -> Iterator[list[int | None]]:
    """Continues a batch of prompts.

    Args:
        model: the decoder.
        embeddings: `[B, S, D]`, padded on the left.
        lengths: `[B]`, positions of each row that are real; the last ones.
        sampling: how to draw.
        stop_ids: tokens that end a row.
        num_ids: the first ids, which alone may be drawn; tables are often padded past their tokenizer.
        keep_stops: hand out the token that ends a row, too.
        check_length: refuse more positions than the model was made for.
    Yields:
        Once a step, one token per row, None for rows that have ended.
    Raises:
        ValueError: the prompt and `max_new_tokens` do not fit into the model's positions.
    """
    batch, width, _ = embeddings.shape
    capacity = width + sampling.max_new_tokens
    longest, limit = int(lengths.max()), model.config.context_length
    if check_length and longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {longest} tokens and {sampling.max_new_tokens} new ones were asked for, "
            f"but the model has {limit} positions; shorten the prompt or max_new_tokens"
        )
    device = embeddings.device
    cache = KVCache(model.config, batch, capacity, device=device, dtype=embeddings.dtype)
    slots = torch.arange(capacity, device=device)
    padding = width - lengths  # [B]
    real = slots >= padding[:, None]  # [B, T]
    positions, mask = None, None
    if int(lengths.min()) < width:  # without padding, causal attention needs no mask, which grows with the square
        positions, mask = left_padded(lengths, width, capacity)
    hidden = model.hidden(embeddings, positions=positions, mask=mask, cache=cache, slots=slots[:width])
    logits = model.logits(hidden[:, -1].contiguous())

    # A generator's own seed(): torch.seed() would reseed the random numbers of everyone else.
    seed = torch.Generator().seed() if sampling.seed is None else sampling.seed
    generators = [torch.Generator(device=device).manual_seed(seed) for _ in range(batch)]
    ended = [False] * batch
    for step in range(sampling.max_new_tokens):
        tokens = draw(logits[:, :num_ids], sampling, generators)
        drawn: list[int] = tokens.tolist()
        stops = [token in stop_ids for token in drawn]
        silent = ended if keep_stops else [done or stop for done, stop in zip(ended, stops, strict=True)]
        ended = [done or stop for done, stop in zip(ended, stops, strict=True)]
        if all(silent):
            return
        yield [None if quiet else token for quiet, token in zip(silent, drawn, strict=True)]
        if all(ended) or step + 1 == sampling.max_new_tokens:
            return
        slot = slots[width + step : width + step + 1]
        hidden = model.hidden(
            model.tok_embeddings(tokens[:, None]),
            positions=slot - padding[:, None],
            mask=(real & (slots <= slot))[:, None, None],
            cache=cache,
            slots=slot,
        )
        logits = model.logits(hidden[:, -1])
