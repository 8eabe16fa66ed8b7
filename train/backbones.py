"""The two small backbones of the embedded default, rebuilt from a seed: `python -m visplice.train.backbones`.

The text backbone is a LLaMA that reads descriptions of scenes and answers questions about them; it sees text only. The
vision backbone is a ViT with dense labels: what lies under every patch, and what is centred in it; it sees pictures
only. Neither sees a combination of colour, shape and position that `visplice.train.scenes` holds out.

    python -m visplice.train.backbones --compile --out runs/backbones

Hidden matrices are trained by Muon (Jordan et al., 2024), the rest by AdamW; weights are stored in half precision.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from visplice.lm.checkpoint import save_llama
from visplice.lm.config import LlamaConfig
from visplice.lm.decoder import Llama
from visplice.lm.prompt import IGNORE, TURNS, PromptBuilder, VisualTokens
from visplice.lm.tokenizer import Tokenizer
from visplice.train import scenes
from visplice.vision.encoder import EncoderConfig, build_vit

# --- shared ----------------------------------------------------------------------------------------------------------


def optimizers(
    hidden: Iterable[nn.Parameter], others: Iterable[nn.Parameter], lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for embeddings, heads, norms and biases."""
    return [
        torch.optim.Muon(hidden, lr=lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr / 8, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate: a short warm-up, a plateau, a linear way down over the last half."""
    return min(1.0, (step + 1) / 50, max(0.0, (steps - step) / (0.5 * steps)))


def step_all(optimizer_list: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizer_list:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# --- text ------------------------------------------------------------------------------------------------------------

TEXT_STEPS, VISION_STEPS = 3600, 3000
TEXT_SHAPE = {"dim": 256, "num_layers": 5, "num_heads": 8, "num_kv_heads": 4, "ffn_dim": 512}
CONTROLS = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")


def build_tokenizer(path: Path, seed: int) -> Tokenizer:
    """A byte-level BPE over the task's words, written as `tokenizer.json`; any other text falls apart into bytes."""
    rng = random.Random(seed)

    def corpus() -> Iterator[str]:
        for _ in range(20_000):
            scene = scenes.sample_scene(rng, scenes.TRAIN)
            yield scenes.description(scene, rng)
            yield scenes.caption(scene)
            for question in scenes.ask(scene, rng, 6):
                yield question.text
                yield question.answer
            yield scenes.facts(scene, rng, 10)
        for text in (*scenes.DESCRIBE, scenes.TELL):
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


class TextBatches:
    """Endless batches of one description and several questions each; ids and labels `[B, S]`."""

    def __init__(self, tokenizer: Tokenizer, seed: int, batch: int, questions: int, easy: int) -> None:
        self._builder = PromptBuilder(tokenizer, TURNS, VisualTokens(vocab_size=tokenizer.vocab_size, count=0))
        self._pad = tokenizer.control("<|pad|>")
        self._rng, self._batch, self._questions, self._easy = random.Random(seed), batch, questions, easy

    def _sequence(self, ease: float) -> tuple[list[int], list[int]]:
        rng = self._rng
        scene = scenes.sample_scene(rng, scenes.TRAIN, most=round(4 - 2 * ease))
        turns = [(q.text, q.answer) for q in scenes.ask(scene, rng, self._questions)]
        turns.insert(0, (scenes.TELL, scenes.facts(scene, rng, 10)))
        if rng.random() < 0.2:
            turns.insert(rng.randrange(len(turns) + 1), (rng.choice(scenes.DESCRIBE), scenes.caption(scene)))
        messages = []
        for number, (question, answer) in enumerate(turns):
            texts = [scenes.description(scene, rng, variety=1 - ease), question] if number == 0 else [question]
            messages.append({"role": "user", "content": [{"type": "text", "text": t} for t in texts]})
            messages.append({"role": "assistant", "content": answer})
        prompt = self._builder.build(messages)
        return prompt.ids, prompt.labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Few objects in one wording first: which words belong together is learnt there, and then carries over.
        for number in itertools.count():
            ease = max(0.0, 1 - number / self._easy)
            rows = [self._sequence(ease) for _ in range(self._batch)]
            width = math.ceil(max(len(ids) for ids, _ in rows) / 64) * 64  # few widths, so few compilations
            ids = torch.tensor([r + [self._pad] * (width - len(r)) for r, _ in rows])
            labels = torch.tensor([r + [IGNORE] * (width - len(r)) for _, r in rows])
            yield ids, labels


def init_llama(model: Llama) -> None:
    """Normal weights of 0.02, smaller where a layer writes into the stream (GPT-2)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * model.config.num_layers) if writes else 1.0))


def train_text(
    out: Path, *, steps: int, seed: int, batch: int = 32, questions: int = 6, compiled: bool = False
) -> None:
    """Trains the small LLaMA and writes it, with its tokenizer, to `out`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(out / "tokenizer.json", seed)
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, max_seq_len=1024, tie_embeddings=True, **TEXT_SHAPE)
    model = Llama(config)
    init_llama(model)
    print(f"vocabulary {config.vocab_size}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("layers.")]
    others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and n.startswith("layers."))]
    optimizer_list = optimizers(hidden, others, lr=0.015)
    stream = torch.compile(model.hidden, dynamic=False) if compiled else model.hidden
    started, pad = time.time(), tokenizer.control("<|pad|>")
    for step, (ids, labels) in zip(
        range(steps), TextBatches(tokenizer, seed + 1, batch, questions, easy=steps // 5), strict=False
    ):
        share = schedule(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compiled):
            embeddings = model.tok_embeddings(ids)
            # Noise on the embeddings (Jain et al., "NEFTune", 2023) makes the reader forgiving.
            embeddings = embeddings + embeddings.detach().std() * 0.1 * torch.randn_like(embeddings)
            logits = model.logits(stream(embeddings)[:, :-1]).float()
        targets, answers = ids[:, 1:], labels[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        supervised = answers != IGNORE
        text = (targets != pad) & ~supervised
        loss = losses[supervised].mean() + 0.1 * losses[text].mean()
        loss.backward()
        step_all(optimizer_list, share)
        if step % 50 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == answers)[supervised].float().mean().item()
            print(
                f"step {step} answers {losses[supervised].mean().item():.4f} text {losses[text].mean().item():.4f} "
                f"right {right:.4f} {time.time() - started:.0f}s",
                flush=True,
            )
        if step % 500 == 499 or step == steps - 1:
            save_llama(model, out, dtype=torch.float16)


# --- vision ----------------------------------------------------------------------------------------------------------

VISION = EncoderConfig(
    model="vit_base_patch16_clip_quickgelu_224",
    weights=None,
    image_size=scenes.IMAGE_SIZE,
    resize="squash",
    overrides={"patch_size": 14, "embed_dim": 192, "depth": 6, "num_heads": 3},
)
_COLORS, _BACKGROUNDS = list(scenes.COLORS), list(scenes.BACKGROUNDS)
_NUM = {"color": len(_COLORS), "shape": len(scenes.SHAPES), "size": len(scenes.SIZES), "region": len(scenes.POSITIONS)}
_PAIRS = (("color", "region"), ("shape", "region"), ("size", "region"), ("color", "shape"))


def scene_labels(scene: scenes.Scene, grid: int) -> dict[str, Tensor]:
    """What the vision backbone is taught about a picture with `grid` x `grid` patches.

    `centre.*` `[P]`: attribute of the object whose centre lies in the patch, 0 for none. `cover.*` `[P]`: of the
    topmost object under the patch's middle. `pair.*`: which pairs of attributes occur, for CLS. `background`, and
    `count.*`: how many objects have each colour and each shape, for CLS.
    """
    rows = [
        {
            "color": _COLORS.index(o.color),
            "shape": scenes.SHAPES.index(o.shape),
            "size": list(scenes.SIZES).index(o.size),
            "region": o.region,
        }
        for o in scene.objects
    ]
    middle = (torch.arange(grid) + 0.5) / grid
    labels = {f"centre.{name}": torch.zeros(grid * grid, dtype=torch.long) for name in _NUM}
    labels |= {f"cover.{name}": torch.zeros(grid, grid, dtype=torch.long) for name in ("color", "shape")}
    labels |= {f"pair.{a}.{b}": torch.zeros(_NUM[a], _NUM[b]) for a, b in _PAIRS}
    labels |= {f"count.{name}": torch.zeros(_NUM[name], dtype=torch.long) for name in ("color", "shape")}
    for item, row in zip(scene.objects, rows, strict=True):
        patch = int(item.y * grid) * grid + int(item.x * grid)
        inside = (middle[None, :] - item.x) ** 2 + (middle[:, None] - item.y) ** 2 < item.radius**2
        for name in _NUM:
            labels[f"centre.{name}"][patch] = row[name] + 1
        for name in ("color", "shape"):
            labels[f"cover.{name}"][inside] = row[name] + 1
            labels[f"count.{name}"][row[name]] += 1
        for a, b in _PAIRS:
            labels[f"pair.{a}.{b}"][row[a], row[b]] = 1
    labels["background"] = torch.tensor(_BACKGROUNDS.index(scene.background))
    return {name: label.flatten() if name.startswith("cover") else label for name, label in labels.items()}


class SceneHeads(nn.Module):
    """Linear readers of the labels above, one for every kind, behind a LayerNorm; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        sizes = {f"centre.{name}": size + 1 for name, size in _NUM.items()}
        sizes |= {f"cover.{name}": _NUM[name] + 1 for name in ("color", "shape")}
        sizes |= {f"pair.{a}.{b}": _NUM[a] * _NUM[b] for a, b in _PAIRS}
        sizes |= {f"count.{name}": _NUM[name] * 5 for name in ("color", "shape")}
        sizes["background"] = len(_BACKGROUNDS)
        self.heads = nn.ModuleDict({name.replace(".", "_"): nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, cls: Tensor, patches: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss, and the share of object centres whose colour, shape, size and position are all read off right."""
        cls, patches = self.norm(cls), self.norm(patches)
        loss, centred, right = cls.new_zeros(()), labels["centre.color"] > 0, []
        for name, label in labels.items():
            head, kind = self.heads[name.replace(".", "_")], name.split(".")[0]
            if kind in ("centre", "cover"):
                logits = head(patches)
                losses = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
                loss = loss + losses.mean()
                if kind == "centre":  # few patches hold a centre; they count as much as all the others together
                    loss = loss + losses[centred.flatten()].mean()
                    right.append((logits.argmax(-1) == label)[centred])
            elif kind == "pair":
                loss = loss + 5 * F.binary_cross_entropy_with_logits(head(cls), label.flatten(1))
            else:
                logits = head(cls).unflatten(-1, (label[0].numel(), -1)).flatten(0, 1)
                loss = loss + F.cross_entropy(logits, label.flatten())
        return loss, torch.stack(right).all(0).float().mean()


def train_vision(out: Path, *, steps: int, seed: int, batch: int = 64, compiled: bool = False) -> None:
    """Trains the small ViT on labelled pictures and writes `encoder.safetensors` to `out`."""
    torch.manual_seed(seed)
    rng = random.Random(seed + 2)
    model: Any = build_vit(VISION)
    heads = nn.ModuleList(SceneHeads(model.embed_dim) for _ in range(2))  # for the block before the last, and the last
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for block in model.blocks if compiled else ():
        block.attn.fused_attn = False  # in bf16 on a CPU, three times slower than the plain matrices
        block.compile(dynamic=False)
    named = [*model.named_parameters(), *heads.named_parameters(prefix="heads")]
    hidden = [p for n, p in named if p.dim() == 2 and n.startswith("blocks.")]
    others = [p for n, p in named if not (p.dim() == 2 and n.startswith("blocks."))]
    optimizer_list = optimizers(hidden, others, lr=0.02)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    started, grid, before_last = time.time(), scenes.IMAGE_SIZE // 14, len(model.blocks) - 2
    for step in range(steps):
        drawn = [scenes.sample_scene(rng, scenes.TRAIN) for _ in range(batch)]
        pictures = np.stack([np.asarray(scenes.render(scene, rng)) for scene in drawn])
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std
        rows = [scene_labels(scene, grid) for scene in drawn]
        labels = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compiled):
            last, taps = model.forward_intermediates(
                pixels, indices=[before_last], return_prefix_tokens=True, output_fmt="NLC"
            )
        patches, prefix = taps[0]
        loss, right = heads[0](prefix[:, 0].float(), patches.float(), labels)
        loss = loss + heads[1](last[:, 0].float(), last[:, 1:].float(), labels)[0]
        loss.backward()
        step_all(optimizer_list, schedule(step, steps))
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step} loss {loss.item():.3f} centres {right.item():.4f} {time.time() - started:.0f}s",
                flush=True,
            )
        if step % 500 == 499 or step == steps - 1:
            out.mkdir(parents=True, exist_ok=True)
            state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
            save_file(state, str(out / "encoder.safetensors"), metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m visplice.train.backbones", description=__doc__.split("\n\n")[0])
    parser.add_argument("part", nargs="?", choices=("text", "vision", "both"), default="both")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/backbones"), help="gets lm/ and vision/ (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS, help="default: %(default)s")
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS, help="default: %(default)s")
    parser.add_argument(
        "--compile", action="store_true", help="compile, and multiply in bfloat16: needs a C++ compiler"
    )
    args = parser.parse_args()
    if args.part in ("vision", "both"):
        train_vision(args.out / "vision", steps=args.vision_steps, seed=args.seed, compiled=args.compile)
    if args.part in ("text", "both"):
        train_text(args.out / "lm", steps=args.text_steps, seed=args.seed, compiled=args.compile)


if __name__ == "__main__":
    main()
