"""Batches of slips and scenes as grids, for the text backbone: symbols where the picture will stand, and questions."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visplice.lm.prompt import IGNORE, TURNS, PromptBuilder, VisualTokens
from visplice.lm.tokenizer import Tokenizer
from visplice.train import scene_words, scenes, slip_words, slips
from visplice.train.backbone_text import COURSES
from visplice.train.backbone_vision import scene_labels
from visplice.train.slip_heads import DENSE

NUM_PATCHES = (scenes.IMAGE_SIZE // slips.PATCH) ** 2
# What a patch token tells of, 0 for nothing: slips, then what is centred in a patch of a scene.
SCENE_TABLES = {f"centre.{name}": size + 1 for name, size in scenes.NUM_ATTRIBUTES.items()}
TABLES = DENSE | SCENE_TABLES
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
        for column, name in enumerate(SCENE_TABLES, start=len(DENSE)):
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
