"""A LLaMA that sees: frozen encoder, projector and frozen decoder joined by the splice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visplice.lm.decoder import Llama
from visplice.lm.generate import Sampling, generate, pad_left
from visplice.lm.prompt import END, IGNORE, IMAGE, START, Prompt, PromptBuilder, Template, VisualTokens
from visplice.lm.splice import check_slots, count_slots, slots_differ, splice
from visplice.lm.tokenizer import StreamDecoder, Tokenizer
from visplice.projector.lora import adapters
from visplice.projector.mlp import Projector
from visplice.vision.encoder import VisionEncoder
from visplice.vision.image import Source, open_image


class VisionLlama(nn.Module):
    """Pictures and text in, text out. Only the projector and its sentinels can be trained."""

    def __init__(
        self, encoder: VisionEncoder, projector: Projector, lm: Llama, tokenizer: Tokenizer, template: Template
    ) -> None:
        """Joins the parts.

        Raises:
            ValueError: the projector's widths are not those of the encoder and the decoder.
        """
        super().__init__()
        for what, ours, theirs in (
            ("the encoder's features", projector.config.d_vision, encoder.dim),
            ("the decoder", projector.config.d_lm, lm.config.dim),
        ):
            if ours != theirs:
                raise ValueError(f"the projector was made for width {ours}, but that of {what} is {theirs}")
        self.encoder, self.projector = encoder, projector
        self.lm = lm.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.visual = VisualTokens(
            vocab_size=lm.config.vocab_size, count=encoder.num_tokens, sentinels=projector.config.sentinels
        )
        self.prompts = PromptBuilder(tokenizer, template, self.visual)

    @classmethod
    def from_pretrained(
        cls, folder: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> VisionLlama:
        """Opens an extension folder (`visplice.json` and `projector.safetensors`) with the backbones it names."""
        from visplice.lm.extension import load_extension

        return load_extension(folder, device=device, dtype=dtype)

    def train(self, mode: bool = True) -> VisionLlama:
        """The frozen parts stay in eval mode, but for adapters on the decoder."""
        super().train(mode)
        self.encoder.eval()
        self.lm.eval()
        for _, layer in adapters(self.lm):
            layer.dropout.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        return self.lm.device

    # --- pictures to tokens ---

    def pixels(self, images: Sequence[Source]) -> Tensor:
        """Opens and transforms images: `[M, 3, H, W]` on the model's device."""
        side = self.encoder.config.image_size
        if not images:
            return torch.zeros(0, 3, side, side, device=self.device)
        return torch.stack([self.encoder.transform(open_image(image)) for image in images]).to(self.device)

    def features(self, pixels: Tensor) -> Tensor:
        """Frozen features `[M, N, d_vision]` of the tokens that go into the prompt."""
        features = self.encoder(pixels.to(next(self.encoder.parameters()).dtype))
        return features[:, -self.visual.count :]

    def embed(self, ids: Tensor, features: Tensor) -> Tensor:
        """Embeddings `[B, S, D]` of ids `[B, S]` with the features `[M, N, d_vision]` projected and spliced in."""
        projected = self.projector(features.to(next(self.projector.parameters()).dtype))
        return splice(ids, self.lm.tok_embeddings.weight, self.projector.sentinels, projected, self.visual)

    def forward(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Logits `[B, S, V]` for ids `[B, S]` with image blocks, and the normalised pictures `[M, 3, H, W]` in them.

        Text alone takes the decoder's own path, bit by bit.

        Raises:
            ValueError: image blocks and pictures do not match.
        """
        count = 0 if pixels is None else len(pixels)
        starts = count_slots(ids, self.visual)
        if sum(starts) != count:
            raise ValueError(slots_differ("the batch", sum(starts), count))
        for number, (row, own) in enumerate(zip(ids.tolist(), starts, strict=True), 1):
            check_slots(row, self.visual, own, sample=f"row {number}")
        if pixels is None or not count:
            return self.lm(ids)
        return self.lm.logits(self.lm.hidden(self.embed(ids, self.features(pixels))))

    # --- talking ---

    def generate(
        self,
        images: Sequence[Source | Sequence[Source]],
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers a batch of prompts.

        Args:
            images: for each prompt one image or a list of them (any source that `open_image` takes).
            prompts: user texts; `<image>` marks where an image stands, images without a mark come first.
            sampling: how to draw; or its fields as keyword arguments.
        Returns:
            One answer per prompt.
        Raises:
            ValueError: images and prompts differ in number, or the marks and images of a prompt do.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} lists of images were given for {len(prompts)} prompts; give one each")
        if not prompts:
            return []
        conversations = []
        for number, (prompt, given) in enumerate(zip(prompts, images, strict=True), 1):
            own: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
            name = "prompt" if len(prompts) == 1 else f"prompt {number}"
            conversations.append([user_message(prompt, own, name=name)])
        return self.answer(conversations, _one_sampling(sampling, options))

    def answer(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], sampling: Sampling, *, until: Sequence[str] = ()
    ) -> list[str]:
        """Answers the last message of every conversation, all of them in one batch.

        Args:
            conversations: messages as for `chat`.
            sampling: how to draw.
            until: texts that end an answer and do not belong to it, beside the family's own stop tokens.
        Returns:
            One answer per conversation.
        """
        rows: list[list[int]] = [[] for _ in conversations]
        ended = [False] * len(rows)
        for step in self._steps(conversations, sampling):
            for number, token in enumerate(step):
                if token is None:
                    ended[number] = True
                elif not ended[number]:
                    rows[number].append(token)
                    ended[number] = bool(until) and any(end in self.tokenizer.decode(rows[number]) for end in until)
            if all(ended):
                break
        answers = [self.tokenizer.decode(row) for row in rows]
        return [min((text.split(end, 1)[0] for end in until), key=len, default=text) for text in answers]

    @torch.inference_mode()
    def log_probs(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[Tensor, Tensor]]:
        """How likely the model is to say what the assistant says in each conversation, all of them in one batch.

        Returns:
            For each conversation two tensors `[A]`, over the assistant's tokens and those that end its turns: their
            log-probabilities in float32, among the ids that `generate` draws from, and whether each is the likeliest.
        """
        built = [self.prompts.build(messages) for messages in conversations]
        rows = self._embed_prompts(built, [images_of(messages) for messages in conversations])
        # Padding stands behind the rows, where causal attention does not look.
        hidden = self.lm.hidden(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        known, found = sayable(self.tokenizer), []
        for row, prompt in zip(hidden, built, strict=True):
            labels = torch.tensor(prompt.labels[1:], device=row.device)
            places = (labels != IGNORE).nonzero()[:, 0]
            logits = self.lm.logits(row[places])[:, :known].float()
            said = labels[places]
            found.append((logits.log_softmax(-1).gather(-1, said[:, None])[:, 0], logits.argmax(-1) == said))
        return found

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Any] | None = None,
        **options: Any,
    ) -> str:
        """Answers the last message; image parts carry their source: `{"type": "image", "image": ...}`.

        With `tools`, in families that know them, the answer can be a call: `visplice.lm.tools.parse_tool_call`.
        """
        return "".join(self.stream(messages, sampling, tools=tools, **options))

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Any] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """`chat`, in pieces of complete characters as they are made."""
        decoder = StreamDecoder(self.tokenizer)
        for step in self._steps([messages], _one_sampling(sampling, options), tools):
            assert step[0] is not None
            if piece := decoder.push(step[0]):
                yield piece
        if piece := decoder.flush():
            yield piece

    def _steps(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        sampling: Sampling,
        tools: Sequence[Any] | None = None,
    ) -> Iterator[list[int | None]]:
        images = [images_of(messages) for messages in conversations]
        built = [self.prompts.build(messages, add_generation_prompt=True, tools=tools) for messages in conversations]
        rows = self._embed_prompts(built, images)
        embeddings, lengths = pad_left(rows)
        known = sayable(self.tokenizer)
        return generate(self.lm, embeddings, lengths, sampling, self.prompts.stop_ids, num_ids=known)

    @torch.inference_mode()
    def _embed_prompts(self, built: Sequence[Prompt], images: Sequence[Sequence[Source]]) -> list[Tensor]:
        for index, (prompt, own) in enumerate(zip(built, images, strict=True)):
            check_slots(
                prompt.ids, self.visual, len(own), sample="prompt" if len(built) == 1 else f"prompt {index + 1}"
            )
        # The same picture under several questions is opened and encoded once.
        distinct: dict[int, int] = {}
        sources: list[Source] = []
        for own in images:
            for source in own:
                if id(source) not in distinct:
                    distinct[id(source)] = len(sources)
                    sources.append(source)
        features = self.features(self.pixels(sources)) if sources else None
        rows = []
        for prompt, own in zip(built, images, strict=True):
            ids = torch.tensor([prompt.ids], device=self.device)
            picked = [distinct[id(source)] for source in own]
            if features is None or not picked:
                rows.append(self.lm.tok_embeddings(ids)[0])
            else:
                rows.append(self.embed(ids, features[picked])[0])
        return rows


def sayable(tokenizer: Tokenizer) -> int:
    """Ids that an answer is made of: an export has its sentinels and `<image>` behind them."""
    count, controls = tokenizer.vocab_size, tokenizer.controls
    if START in controls and END in controls:
        behind = {i for name, i in controls.items() if name in (START, END, IMAGE, f"<unused_{i}>")}
        while count - 1 in behind:
            count -= 1
    return count


def _one_sampling(sampling: Sampling | None, options: Mapping[str, Any]) -> Sampling:
    if sampling is not None and options:
        raise TypeError(f"sampling was given and {', '.join(options)} beside it; give one or the other")
    return sampling or Sampling(**options)


def user_message(text: str, images: Sequence[Source], *, name: str = "prompt") -> dict[str, Any]:
    """A user's message with its images: where `<image>` stands in the text, or in front when it stands nowhere.

    Raises:
        ValueError: the text has marks, but not one for each image; `name` says which text.
    """
    pieces = text.split(IMAGE)
    if len(pieces) == 1:
        pieces = [""] * len(images) + pieces
    if len(pieces) - 1 != len(images):
        raise ValueError(slots_differ(name, len(pieces) - 1, len(images)))
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image", "image": images[number - 1]})
        if piece := piece.strip("\n"):
            content.append({"type": "text", "text": piece})
    return {"role": "user", "content": content}


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[Source]:
    """Sources of all image parts, in order; a part without one counts as an image that was not given."""
    images: list[Source] = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") == "image" and part.get("image") is not None:
                images.append(part["image"])
    return images
