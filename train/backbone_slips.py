"""The course in which the small LLaMA learns to read grids, behind those on scenes in words.

A slip stands in a prompt as 64 tokens, as its picture will: each the sum of entries of tables, one for the sign in
either cell, one for where in the line it is, one for the line. Scenes stand there likewise, by what is centred in every
patch. No picture is drawn for it. The tables are no part of the LLaMA; the projector has to find
vectors like their entries.

Beside the answers it is taught, by heads that are thrown away as well, what a line is about and where its value stands,
and for every sign of an answer where it is to be read.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visplice.lm.checkpoint import load_llama, save_llama
from visplice.lm.decoder import Llama
from visplice.lm.prompt import IGNORE
from visplice.lm.rope import rotate
from visplice.lm.tokenizer import Tokenizer
from visplice.train.backbone_optim import optimizers, schedule, step_all
from visplice.train.backbone_text import BINDING_LAYER, COURSES, FINDING_LAYER, AttributeHeads, TextBatches, streams
from visplice.train.grid_batches import BLOCK, LINE_LABELS, PATCHES, READ_LABELS, GridBatches
from visplice.train.grid_tables import SYMBOLS_FILE, Tables, load_symbols, save_symbols
from visplice.train.slip_heads import DENSE

SLIP_STEPS = 5000
ROWS = (6, 3, 4)  # of a step: slips, scenes as grids, scenes in words
LINE_LAYER, READ_LAYER, SIGN_LAYER = 2, 3, 4  # behind which these, and the sign, have to be known


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
    layer: Any = model.layers[SIGN_LAYER - 1]
    context = model.context(stream)
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
    rows: Sequence[int] = ROWS,
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
    config = model.config
    num_slips, num_grids, num_words = rows
    easy = 1 if (start / SYMBOLS_FILE).is_file() else max(1, steps // 10)
    grids = GridBatches(tokenizer, seed + 11, num_slips=num_slips, num_scenes=num_grids, width=width, easy=easy)
    words = TextBatches(tokenizer, seed + 13, num_words, width, 1, COURSES[2].kinds)
    tables = Tables(config.dim, 0.5 * float(model.tok_embeddings.weight.detach().std()))
    if (start / SYMBOLS_FILE).is_file():  # the LLaMA had such a course already
        tables.load_state_dict(load_symbols(start).state_dict())
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

    run = streams(model, compiled=compiled)
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
            # Noise makes a forgiving reader (Jain et al., "NEFTune", 2023): a projector's first words are mostly noise.
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
            save_symbols(tables, out)
