"""The text backbone of the embedded default: a small LLaMA that reads descriptions of scenes and answers questions.

It sees text only. Beside the answers it is taught, by heads that are thrown away, which words belong together: behind
the last word of a phrase the attributes of the object, and where an answer begins those of the object it is about.
From answers alone, that binding stays out of reach for hours; said outright, it is there after minutes.
"""

import itertools
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from visplice.lm.checkpoint import load_llama, save_llama
from visplice.lm.config import LlamaConfig
from visplice.lm.decoder import Llama
from visplice.lm.prompt import IGNORE, TURNS, PromptBuilder, VisualTokens
from visplice.lm.tokenizer import Tokenizer
from visplice.train import scene_words, scenes
from visplice.train.backbone_optim import optimizers, schedule, step_all


@dataclass(frozen=True, kw_only=True)
class Course:
    """One course of training, from the peak of the learning rate down to nothing."""

    steps: int
    lr: float
    kinds: tuple[str, ...] = scene_words.QUESTION_TYPES  # what is asked, a kind named twice twice as often
    easy: float = 0.0  # share of the steps until scenes are as full and as variously told as they get


# What is still weak after the even mixture is asked more often: for the rest a share is enough to keep it.
_REST = ("background", "color", "shape", "existence", "position")
COURSES = (
    Course(steps=3200, lr=0.01, easy=0.2),
    Course(steps=1200, lr=0.006, kinds=("comparison",) * 4 + ("count",) * 2 + _REST),
    Course(steps=900, lr=0.006, kinds=("comparison",) * 6 + ("count",) * 3 + ("background",) + _REST),
)
BINDING_LAYER = 2  # behind which the last word of a phrase has to carry what the phrase tells of
FINDING_LAYER = 4  # behind which it has to be known what a question is about
TEXT_SHAPE: dict[str, Any] = {"dim": 256, "num_layers": 5, "num_heads": 8, "num_kv_heads": 4, "ffn_dim": 512}
CONTROLS = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")


def build_tokenizer(path: Path, seed: int) -> Tokenizer:
    """A byte-level BPE over the task's words, written as `tokenizer.json`; any other text falls apart into bytes."""
    rng = random.Random(seed)

    def corpus() -> Iterator[str]:
        for _ in range(20_000):
            scene = scenes.sample_scene(rng, scenes.TRAIN)
            yield scene_words.describe(scene, rng).text
            yield scene_words.caption(scene)
            for question in scene_words.ask(scene, rng, 6):
                yield question.text
                yield question.answer
            yield scene_words.facts(scene, rng, 10)
        for text in (*scene_words.DESCRIBE, scene_words.TELL):
            yield from [text] * 200

    tokenizer = tokenizers.Tokenizer(models.BPE())
    # A word gets the same id at the start of a text and inside it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=200,
        initial_alphabet=sorted(alphabet),
        special_tokens=list(CONTROLS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return Tokenizer(path)


_KNOWN = (*scenes.NUM_ATTRIBUTES.values(), len(scenes.BACKGROUNDS))  # attributes of an object, and the background


def _known(what: scenes.SceneObject | str) -> list[int]:
    """The K labels of an object, or of a background."""
    if isinstance(what, str):
        return [IGNORE] * len(scenes.NUM_ATTRIBUTES) + [list(scenes.BACKGROUNDS).index(what)]
    return [*scenes.attributes(what), IGNORE]


@dataclass(frozen=True)
class TextBatch:
    """Sequences of a description and questions about it, with what the reader must know where."""

    ids: Tensor  # [B, S]
    labels: Tensor  # [B, S], answers and their end
    objects: Tensor  # [B, S, K], behind the last word on an object or the background: what it is, else IGNORE
    asked: Tensor  # [B, S, K], behind an object's name and where an answer about something begins: the same


class TextBatches:
    """Endless batches; every sequence is filled up with questions about its scene."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int,
        batch: int,
        width: int,
        easy: int,
        kinds: Sequence[str] = scene_words.QUESTION_TYPES,
    ) -> None:
        self._builder = PromptBuilder(tokenizer, TURNS, VisualTokens(vocab_size=tokenizer.vocab_size, count=0))
        self.pad, self._assistant = tokenizer.control("<|pad|>"), tokenizer.control("<|assistant|>")
        self._rng, self._batch, self._width, self._easy = random.Random(seed), batch, width, easy
        self._kinds = kinds

    def _sequence(self, ease: float) -> tuple[list[int], list[int], dict[int, list[int]], dict[int, list[int]]]:
        rng, encode = self._rng, self._builder.tokenizer.encode
        scene = scenes.sample_scene(rng, scenes.TRAIN, most=round(4 - 2 * ease))
        told = scene_words.describe(scene, rng, variety=1 - ease)
        turns = scene_words.ask(scene, rng, 12, self._kinds)
        if rng.random() < 0.15:
            describe = rng.choice(scene_words.DESCRIBE)
            turns.insert(
                rng.randrange(3), scene_words.Question(describe, scene_words.caption(scene), "description", "other")
            )
        if rng.random() < 0.15:
            told_again = scene_words.facts(scene, rng, 8)
            turns.insert(rng.randrange(3), scene_words.Question(scene_words.TELL, told_again, "description", "other"))
        messages: list[dict[str, Any]] = []
        ids: list[int] = []
        labels: list[int] = []
        for question in turns:
            texts = [question.text] if messages else [told.text, question.text]
            parts = [{"type": "text", "text": text} for text in texts]
            messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": question.answer}]
            prompt = self._builder.build(messages)
            if len(prompt.ids) > self._width:
                break
            ids, labels = prompt.ids, prompt.labels
        # Begin and user tokens stand in front; words never merge over a span's end, so prefixes count its tokens.
        objects = {1 + len(encode(told.text[:end])): _known(item) for _, end, item in told.spans}
        objects[1 + len(encode(told.text[: told.background_end]))] = _known(scene.background)
        starts = [position for position, token in enumerate(ids) if token == self._assistant]
        asked: dict[int, list[int]] = {}
        for start, question in zip(starts, turns, strict=False):
            if question.about is not None:
                asked[start] = _known(question.about)
            if question.about_background:
                asked[start] = _known(scene.background)
            for end, item in question.mentions:
                behind = len(encode(question.text)) - len(encode(question.text[:end]))
                asked[start - behind - 1] = _known(item)
        return ids, labels, objects, asked

    def __iter__(self) -> Iterator[TextBatch]:
        # Few objects in one wording first: which words belong together is learnt there, and then carries over.
        for number in itertools.count():
            ease = max(0.0, 1 - number / self._easy)
            shape = (self._batch, self._width)
            ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORE)
            objects, asked = (torch.full((*shape, len(_KNOWN)), IGNORE) for _ in range(2))
            for row in range(self._batch):
                row_ids, row_labels, row_objects, row_asked = self._sequence(ease)
                ids[row, : len(row_ids)] = torch.tensor(row_ids)
                labels[row, : len(row_labels)] = torch.tensor(row_labels)
                for target, known in ((objects, row_objects), (asked, row_asked)):
                    for position, values in known.items():
                        target[row, position] = torch.tensor(values)
            yield TextBatch(ids, labels, objects, asked)


class AttributeHeads(nn.Module):
    """Linear readers of an object's four attributes, and of the background; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in _KNOWN)

    def forward(self, stream: Tensor, known: Tensor) -> Tensor:
        """Cross-entropy where `known` `[B, S, K]` says something about `stream` `[B, S, D]`; of one object the mean."""
        rows = (known != IGNORE).any(-1)
        hidden, wanted = self.norm(stream[rows]), known[rows]
        losses = [
            F.cross_entropy(head(hidden), wanted[:, i], ignore_index=IGNORE, reduction="sum")
            / (wanted[:, i] != IGNORE).sum().clamp(min=1)
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum() / len(scenes.NUM_ATTRIBUTES)


def init_llama(model: Llama) -> None:
    """Normal weights of 0.02, smaller where a layer writes into the stream (GPT-2)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * model.config.num_layers) if writes else 1.0))


def train_text(
    out: Path,
    *,
    courses: Sequence[Course] = COURSES,
    start: Path | None = None,
    seed: int,
    batch: int = 12,
    width: int = 192,
    compiled: bool = False,
) -> None:
    """Trains the small LLaMA and writes it, with its tokenizer, to `out`; `start` is one that had its first courses."""
    torch.manual_seed(seed)
    if start is not None:
        model = load_llama(start, dtype=torch.float32).train().requires_grad_(True)
        config = model.config
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(start / "tokenizer.json", out / "tokenizer.json")
        tokenizer = Tokenizer.from_pretrained(out)
    else:
        tokenizer = build_tokenizer(out / "tokenizer.json", seed)
        config = LlamaConfig(vocab_size=tokenizer.vocab_size, max_seq_len=1024, tie_embeddings=True, **TEXT_SHAPE)
        model = Llama(config)
        init_llama(model)
    print(f"vocabulary {config.vocab_size}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    heads = nn.ModuleDict({"objects": AttributeHeads(config.dim), "asked": AttributeHeads(config.dim)})
    for number, course in enumerate(courses):
        easy = max(1, int(course.easy * course.steps))
        batches = TextBatches(tokenizer, seed + 1 + 2 * number, batch, width, easy, course.kinds)
        teach(model, heads, batches, course, out=out, compiled=compiled)


def streams(model: Llama, *, compiled: bool) -> Callable[[Tensor], list[Tensor]]:
    """A function from embeddings `[B, S, D]` to the stream in front of the first layer and behind every one."""

    def run(embeddings: Tensor) -> list[Tensor]:
        context, taps = model.context(embeddings), [embeddings]
        for layer in model.layers:
            taps.append(layer(taps[-1], context))
        return taps

    return torch.compile(run, dynamic=False) if compiled else run


def teach(
    model: Llama, heads: nn.ModuleDict, batches: TextBatches, course: Course, *, out: Path, compiled: bool
) -> None:
    """One course; writes the model as it goes."""
    steps = course.steps
    named = [*model.named_parameters(), *heads.named_parameters(prefix="heads")]
    hidden = [p for n, p in named if p.dim() == 2 and n.startswith("layers.")]
    others = [p for n, p in named if not (p.dim() == 2 and n.startswith("layers."))]
    optimizer_list = optimizers(hidden, others, lr=course.lr)

    run = streams(model, compiled=compiled)
    started, pad = time.time(), batches.pad
    for step, drawn in zip(range(steps), batches, strict=False):
        share = schedule(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compiled):
            embeddings = model.tok_embeddings(drawn.ids)
            # Noise on the embeddings (Jain et al., "NEFTune", 2023) makes the reader forgiving.
            embeddings = embeddings + embeddings.detach().std() * 0.1 * torch.randn_like(embeddings)
            taps = run(embeddings)
            logits = model.logits(taps[-1][:, :-1]).float()
        targets, answers = drawn.ids[:, 1:], drawn.labels[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        supervised = answers != IGNORE
        text = (targets != pad) & ~supervised
        # Which words belong together is hard to find from answers alone; said outright, it is learnt in minutes.
        binding = heads["objects"](taps[BINDING_LAYER].float(), drawn.objects)
        finding = heads["asked"](taps[FINDING_LAYER].float(), drawn.asked)
        loss = losses[supervised].mean() + 0.1 * losses[text].mean() + binding + finding
        loss.backward()
        step_all(optimizer_list, share)
        if step % 100 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == answers)[supervised].float().mean().item()
            print(
                f"step {step} answers {losses[supervised].mean().item():.4f} text {losses[text].mean().item():.4f} "
                f"binding {binding.item():.3f} finding {finding.item():.3f} right {right:.4f} "
                f"{time.time() - started:.0f}s",
                flush=True,
            )
        if step % 500 == 499 or step == steps - 1:
            save_llama(model, out, dtype=torch.float16)
