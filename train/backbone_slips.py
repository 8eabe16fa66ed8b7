"""The course in which the small LLaMA learns to read grids, behind those on scenes in words.

A slip stands in a prompt as 64 tokens, as its picture will: each the sum of entries of tables, one for the sign in
either cell, one for where in the line it is, one for the line. Scenes stand there likewise, by what is centred in every
patch. No picture is drawn for it. The tables are thrown away; the projector has to find vectors like them.

Beside the answers it is taught, by heads that are thrown away as well, what a line is about and where its value stands,
and for every sign of an answer where it is to be read.
"""

import itertools
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visplice.lm.checkpoint import load_llama, save_llama
from visplice.lm.config import LlamaConfig
from visplice.lm.decoder import Llama
from visplice.lm.prompt import IGNORE, TURNS, PromptBuilder, VisualTokens
from visplice.lm.rope import rotate
from visplice.lm.tokenizer import Tokenizer
from visplice.train import scene_words, scenes, slip_words, slips
from visplice.train.backbone_optim import optimizers, schedule, step_all
from visplice.train.backbone_text import BINDING_LAYER, COURSES, FINDING_LAYER, AttributeHeads, TextBatches
from visplice.train.backbone_vision import scene_labels
from visplice.train.slip_heads import DENSE

SLIP_STEPS = 5000
NUM_PATCHES = (scenes.IMAGE_SIZE // slips.PATCH) ** 2
# What a patch token tells of, 0 for nothing: slips, then what is centred in a patch of a scene.
_SCENE = {f"centre.{name}": size + 1 for name, size in scenes.NUM_ATTRIBUTES.items()}
TABLES = DENSE | _SCENE
TABLES_FILE = "tables.pt"
ROLES = (*slips.KEYS, slips.SHOP, slips.ITEM)
LONGEST = 11  # signs in a value, and one for its end
# Of every patch of a slip: what its line is, the line's first sign, and which sign of the value stands in either cell,
# 1 + index. The same heads read, where an answer's next sign is due, what is sought: so that the two can meet.
LINE_LABELS = {
    "role": len(ROLES) + 1,
    "initial": DENSE["left"],
    "value_left": LONGEST + 1,
    "value_right": LONGEST + 1,
}
READ_LABELS = {"line": DENSE["line"], "cell": DENSE["cell"]}  # of an answer's next sign: where it stands
LINE_LAYER, READ_LAYER, SIGN_LAYER = 2, 3, 4  # behind which these, and the sign, have to be known
BLOCK = slice(2, 2 + 3 + NUM_PATCHES)  # behind begin and user: VIS_START, CLS, patches, VIS_END
PATCHES = slice(BLOCK.start + 2, BLOCK.stop - 1)


@dataclass
class GridBatch:
    """Sequences of a grid and questions about it."""

    ids: Tensor  # [B, S]; the block of the picture holds padding
    labels: Tensor  # [B, S], answers and their end
    grid: Tensor  # [B, P, T], entries of the tables
    whole: Tensor  # [B], 0 for a slip, 1 + background of a scene
    lines: Tensor  # [B, S, 4], LINE_LABELS of patches and of what is sought; IGNORE elsewhere
    reads: Tensor  # [B, S, 2], READ_LABELS where an answer's next sign is read, else IGNORE
    signs: Tensor  # [B, S, 1], there the sign itself, 1 + its index
    looks: Tensor  # [B, S, 2], there where to look for a first and for a second sign of a patch: at it, or at begin
    asked: Tensor  # [B, S, K], where an answer about something in a scene begins: what it is, else IGNORE


class GridBatches:
    """Endless batches of slips and scenes as grids, slips first."""

    def __init__(
        self, tokenizer: Tokenizer, seed: int, *, num_slips: int, num_scenes: int, width: int, easy: int
    ) -> None:
        visual = VisualTokens(vocab_size=tokenizer.vocab_size, count=1 + NUM_PATCHES)
        self._builder = PromptBuilder(tokenizer, TURNS, visual)
        self._assistant, self._end, self._pad = (
            tokenizer.control(f"<|{name}|>") for name in ("assistant", "end", "pad")
        )
        self._rng, self._easy, self._width = random.Random(seed), easy, width
        self._num_slips, self._num_scenes = num_slips, num_scenes

    def _prompt(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels, and where each answer begins, of as many turns as fit."""
        messages: list[dict[str, Any]] = []
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in turns:
            content = [{"type": "text", "text": question}]
            if not messages:
                content.insert(0, {"type": "image"})
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            prompt = self._builder.build(messages)
            if len(prompt.ids) > self._width:
                break
            ids, labels = prompt.ids, prompt.labels
        return ids, labels, [place for place, token in enumerate(ids) if token == self._assistant]

    def _slip(self, batch: GridBatch, row: int, most_lines: int) -> None:
        rng = self._rng
        slip = slips.sample_slip(rng, scenes.TRAIN, most_lines=most_lines)
        questions = slip_words.ask(slip, rng, 7)
        ids, labels, starts = self._prompt([(q.text, q.answer) for q in questions])
        self._fill(batch, row, ids, labels)
        grid = slips.grid_of(slip)
        for column, name in enumerate(DENSE):
            batch.grid[row, :, column] = torch.tensor(getattr(grid, name))
        batch.lines[row, PATCHES] = 0
        for patch, (number, cell) in enumerate(zip(grid.line, grid.cell, strict=True)):
            if number:
                line = slip.lines[number - 1]
                value = [c - line.start + 1 for c in (cell - 1, cell)]
                inside = [v if 1 <= v <= len(line.value) else 0 for v in value]
                known = [ROLES.index(line.role) + 1, slips.SIGNS.index(line.text.lstrip()[0]) + 1, *inside]
                batch.lines[row, PATCHES.start + patch] = torch.tensor(known)
        for start, question in zip(starts, questions, strict=False):
            line = slip.lines[question.line]
            # One token is one sign, but for the blank in front, which has a token of its own or none.
            count = next(i for i in itertools.count(1) if labels[start + i] == self._end) - 1
            blank = count - len(line.value)
            initial = IGNORE if line.role == slips.SHOP else slips.SIGNS.index(line.text[0]) + 1  # not to be guessed
            for offset in range(count + 1):
                sign = max(0, offset - blank)
                sought = [ROLES.index(line.role) + 1, initial, sign + 1, sign + 1]
                batch.lines[row, start + offset] = torch.tensor(sought)
                if offset == count:  # the end of the answer, for which there is nothing to read
                    break
                cell = line.start + sign + 1
                patch = slips.patch_of(slip, question.line, cell - 1)
                slot = cell - grid.cell[patch]
                batch.reads[row, start + offset] = torch.tensor([question.line + 1, cell])
                looks = [PATCHES.start + patch, 0]
                batch.looks[row, start + offset] = torch.tensor(looks[::-1] if slot else looks)
                batch.signs[row, start + offset] = slips.SIGNS.index(line.value[sign]) + 1

    def _scene(self, batch: GridBatch, row: int, most: int) -> None:
        rng = self._rng
        scene = scenes.sample_scene(rng, scenes.TRAIN, most=most)
        questions = scene_words.ask(scene, rng, 12, COURSES[1].kinds if rng.random() < 0.5 else COURSES[0].kinds)
        if rng.random() < 0.25:
            told = rng.choice(
                (
                    (rng.choice(scene_words.DESCRIBE), scene_words.caption(scene)),
                    (scene_words.TELL, scene_words.facts(scene, rng, 8)),
                )
            )
            questions.insert(rng.randrange(3), scene_words.Question(*told, "description", "other"))
        ids, labels, starts = self._prompt([(q.text, q.answer) for q in questions])
        self._fill(batch, row, ids, labels)
        dense = scene_labels(scene, scenes.IMAGE_SIZE // slips.PATCH)
        for column, name in enumerate(_SCENE, start=len(DENSE)):
            batch.grid[row, :, column] = dense[name]
        batch.whole[row] = 1 + int(dense["background"])
        for start, question in zip(starts, questions, strict=False):
            if question.about is not None:
                batch.asked[row, start] = torch.tensor([*scenes.attributes(question.about), IGNORE])
            if question.about_background:
                batch.asked[row, start, -1] = int(dense["background"])

    def _fill(self, batch: GridBatch, row: int, ids: list[int], labels: list[int]) -> None:
        known = torch.tensor(ids)
        batch.ids[row, : len(ids)] = torch.where(known < self._builder.visual.vocab_size, known, self._pad)
        batch.labels[row, : len(labels)] = torch.tensor(labels)

    def __iter__(self) -> Iterator[GridBatch]:
        rows, width = self._num_slips + self._num_scenes, self._width
        for number in itertools.count():
            ease = max(0.0, 1 - number / self._easy)
            batch = GridBatch(
                ids=torch.full((rows, width), self._pad),
                labels=torch.full((rows, width), IGNORE),
                grid=torch.zeros(rows, NUM_PATCHES, len(TABLES), dtype=torch.long),
                whole=torch.zeros(rows, dtype=torch.long),
                lines=torch.full((rows, width, len(LINE_LABELS)), IGNORE),
                reads=torch.full((rows, width, len(READ_LABELS)), IGNORE),
                signs=torch.full((rows, width, 1), IGNORE),
                looks=torch.full((rows, width, 2), IGNORE),
                asked=torch.full((rows, width, len(scenes.NUM_ATTRIBUTES) + 1), IGNORE),
            )
            for row in range(rows):
                if row < self._num_slips:
                    self._slip(batch, row, round(7 - 4 * ease))
                else:
                    self._scene(batch, row, round(4 - 2 * ease))
            yield batch


class Tables(nn.Module):
    """The vectors of a grid's tokens, with those of CLS and the sentinels: `[B, 3 + P, D]`; thrown away."""

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in TABLES.values())
        self.whole = nn.Embedding(1 + len(scenes.BACKGROUNDS), width)
        self.sentinels = nn.Parameter(torch.empty(2, width))  # VIS_START, VIS_END
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def forward(self, grid: Tensor, whole: Tensor, *, vary: float = 0.0) -> Tensor:
        """`vary` is the share that each table's part of a picture may lack; all tokens are moved alike, then, too."""
        parts = torch.stack([table(grid[..., i]) for i, table in enumerate(self.tables)])  # [T, B, P, D]
        gains = 1 - vary * torch.rand(len(parts), len(grid), 1, 1)
        patches = (parts * gains).sum(0)
        patches = patches + vary * 0.5 * patches.detach().std() * torch.randn(len(grid), 1, patches.shape[-1])
        start, end = (sentinel.expand(len(grid), 1, -1) for sentinel in self.sentinels)
        return torch.cat((start, self.whole(whole)[:, None], patches, end), dim=1)


class LabelHeads(nn.Module):
    """Linear readers of several labels of one token; thrown away after training."""

    def __init__(self, width: int, sizes: dict[str, int]) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes.values())

    def forward(self, stream: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy where `labels` `[B, S, K]` say something about `stream` `[B, S, D]`."""
        rows = (labels != IGNORE).any(-1)
        hidden, wanted = self.norm(stream[rows]), labels[rows]
        return torch.stack([F.cross_entropy(head(hidden), wanted[:, i]) for i, head in enumerate(self.heads)]).mean()


def looking(model: Llama, stream: Tensor, looks: Tensor) -> Tensor:
    """How far the attention of SIGN_LAYER is from where it has to look, as cross-entropy.

    The first half of its heads looks for first signs of patches, the other for second ones; one head of each group of
    keys and values is told where.
    """
    layer, context = model.layers[SIGN_LAYER - 1], model.context(stream)
    attention, x = layer.attention, layer.attention_norm(stream)
    shape = (*x.shape[:2], -1, attention.head_dim)
    sides = (attention.wq(x).view(shape).transpose(1, 2), attention.wk(x).view(shape).transpose(1, 2))
    q, k = (rotate(side, context.cos, context.sin).float() for side in sides)
    q = q[:, :: attention.num_heads // attention.num_kv_heads]  # one of every group
    scores = q @ k.transpose(-1, -2) / attention.head_dim**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)  # [B, K, S, S]
    wanted = looks.transpose(1, 2).repeat_interleave(attention.num_kv_heads // 2, dim=1)  # [B, K, S]
    return F.cross_entropy(scores.flatten(0, 2), wanted.flatten(), ignore_index=IGNORE)


def train_slips(
    out: Path,
    *,
    start: Path,
    steps: int = SLIP_STEPS,
    seed: int,
    rows: tuple[int, int, int] = (6, 3, 4),
    width: int = 160,
    lr: float = 0.01,
    noise: float = 0.1,
    vary: float = 0.0,
    compiled: bool = False,
) -> None:
    """Goes on from the LLaMA in `start` and writes it, with its tokenizer, to `out`.

    Args:
        rows: of a step: slips, scenes as grids, scenes in words.
        width: tokens of a row.
        noise: the most on the embeddings of a grid, in their standard deviation; the least, and that of words, is 0.1.
        vary: how much the vectors of a grid vary (`Tables`): a projector hits them but roughly, at first above all.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    if start != out:
        shutil.copyfile(start / "tokenizer.json", out / "tokenizer.json")
    tokenizer = Tokenizer.from_pretrained(out)
    model = load_llama(start, dtype=torch.float32).train().requires_grad_(True)
    config: LlamaConfig = model.config
    num_slips, num_grids, num_words = rows
    easy = 1 if (start / TABLES_FILE).is_file() else max(1, steps // 10)
    grids = GridBatches(tokenizer, seed + 11, num_slips=num_slips, num_scenes=num_grids, width=width, easy=easy)
    words = TextBatches(tokenizer, seed + 13, num_words, width, 1, COURSES[2].kinds)
    tables = Tables(config.dim, 0.5 * float(model.tok_embeddings.weight.detach().std()))
    if (start / TABLES_FILE).is_file():  # the LLaMA had such a course already
        tables.load_state_dict(torch.load(start / TABLES_FILE, weights_only=True))
    heads = nn.ModuleDict(
        {
            "lines": LabelHeads(config.dim, LINE_LABELS),
            "reads": LabelHeads(config.dim, READ_LABELS),
            "holds": LabelHeads(config.dim, {"left": DENSE["left"], "right": DENSE["right"]}),
            "signs": LabelHeads(config.dim, {"sign": DENSE["left"]}),
            "objects": AttributeHeads(config.dim),
            "asked": AttributeHeads(config.dim),
        }
    )
    named = [*model.named_parameters(), *heads.named_parameters(prefix="heads"), *tables.named_parameters(prefix="t")]
    hidden = [p for n, p in named if p.dim() == 2 and n.startswith("layers.")]
    others = [p for n, p in named if not (p.dim() == 2 and n.startswith("layers."))]
    optimizer_list = optimizers(hidden, others, lr=lr)

    def streams(embeddings: Tensor) -> list[Tensor]:
        """The stream behind every layer."""
        context, taps = model.context(embeddings), [embeddings]
        for layer in model.layers:
            taps.append(layer(taps[-1], context))
        return taps

    run = torch.compile(streams, dynamic=False) if compiled else streams
    pad, started = tokenizer.control("<|pad|>"), time.time()
    for step, grid, told in zip(range(steps), grids, words, strict=False):
        ids, labels = torch.cat((grid.ids, told.ids)), torch.cat((grid.labels, told.labels))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compiled):
            embeddings = model.tok_embeddings(ids)
            seen = tables(grid.grid, grid.whole, vary=vary)
            picture = torch.cat(
                (embeddings[: len(seen), : BLOCK.start], seen, embeddings[: len(seen), BLOCK.stop :]), 1
            )
            embeddings = torch.cat((picture, embeddings[len(seen) :]))
            # Noise on the embeddings (Jain et al., "NEFTune", 2023) makes the reader forgiving. Of grids some are hardly
            # to be read through it, as what a projector says at first.
            level = torch.full((len(ids), 1, 1), 0.1)
            level[: len(seen)] *= (noise / 0.1) ** torch.rand(len(seen), 1, 1)
            embeddings = embeddings + embeddings.detach().std() * level * torch.randn_like(embeddings)
            taps = run(embeddings)
            logits = model.logits(taps[-1][:, :-1]).float()
        targets, answers = ids[:, 1:], labels[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        supervised, text = answers != IGNORE, (targets != pad) & (answers == IGNORE)
        parts = [slice(num_slips), slice(num_slips, num_slips + num_grids), slice(num_slips + num_grids, None)]
        of_answers = [losses[part][supervised[part]].mean() for part in parts]
        lines = heads["lines"](taps[LINE_LAYER][: len(seen), PATCHES].float(), grid.lines[:, PATCHES])
        sought = heads["lines"](taps[LINE_LAYER][: len(seen), BLOCK.stop :].float(), grid.lines[:, BLOCK.stop :])
        reads = heads["reads"](taps[READ_LAYER][: len(seen)].float(), grid.reads)
        # The stream grows forty times as long as the embeddings; what a patch holds has to be kept in it on purpose.
        held = grid.grid[:num_slips, :, :2].masked_fill(grid.grid[:num_slips, :, 3:4] == 0, IGNORE)
        holds = heads["holds"](taps[SIGN_LAYER - 1][:num_slips, PATCHES].float(), held)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compiled):
            looks = looking(model, taps[SIGN_LAYER - 1][:num_slips], grid.looks[:num_slips])
        signs = heads["signs"](taps[SIGN_LAYER][: len(seen)].float(), grid.signs)
        binding = heads["objects"](taps[BINDING_LAYER][len(seen) :].float(), told.objects)
        finding = heads["asked"](taps[FINDING_LAYER].float(), torch.cat((grid.asked, told.asked)))
        loss = 2 * of_answers[0] + of_answers[1] + of_answers[2] + 0.1 * losses[text].mean()
        loss = loss + 2 * lines + 2 * sought + 2 * reads + 2 * holds + looks + signs + binding + finding
        loss.backward()
        step_all(optimizer_list, schedule(step, steps))
        if step % 50 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == answers).float()
            shares = " ".join(f"{right[part][supervised[part]].mean().item():.4f}" for part in parts)
            print(
                f"step {step} loss {loss.item():.3f} lines {lines.item():.3f} sought {sought.item():.3f} "
                f"reads {reads.item():.3f} holds {holds.item():.3f} looks {looks.item():.3f} signs {signs.item():.3f} "
                f"binding {binding.item():.3f} finding {finding.item():.3f} right {shares} "
                f"{time.time() - started:.0f}s",
                flush=True,
            )
        if step % 500 == 499 or step == steps - 1:
            save_llama(model, out, dtype=torch.float16)
            torch.save(tables.state_dict(), out / TABLES_FILE)  # to read without pictures; not part of the LLaMA
