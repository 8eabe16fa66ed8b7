"""The vision backbone of the embedded default: a small ViT in CLIP's layout, taught by dense labels.

What lies under every patch, what is centred in it, and for CLS what the whole picture holds. It sees pictures only; the
heads that read the labels are thrown away.
"""

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visplice.train import scenes, slips
from visplice.train.backbone_optim import optimizers, schedule, step_all
from visplice.train.slip_heads import SlipHeads, slip_labels
from visplice.vision.encoder import EncoderConfig, build_vit

VISION_STEPS = (3000, 6000)  # of the course of scenes alone, and of that of scenes and slips
VISION = EncoderConfig(
    model="vit_base_patch16_clip_quickgelu_224",
    weights=None,
    image_size=scenes.IMAGE_SIZE,
    resize="squash",
    overrides={"patch_size": 14, "embed_dim": 192, "depth": 6, "num_heads": 3},
)
_NUM = scenes.NUM_ATTRIBUTES
_PAIRS = (("color", "region"), ("shape", "region"), ("size", "region"), ("color", "shape"))


def scene_labels(scene: scenes.Scene, grid: int) -> dict[str, Tensor]:
    """What the vision backbone is taught about a picture with `grid` x `grid` patches.

    `centre.*` `[P]`: attribute of the object whose centre lies in the patch, 0 for none. `cover.*` `[P]`: of the
    topmost object under the patch's middle. `pair.*`: which pairs of attributes occur, for CLS. `background`, and
    `count.*`: how many objects have each colour and each shape, for CLS.
    """
    rows = [dict(zip(_NUM, scenes.attributes(item), strict=True)) for item in scene.objects]
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
    labels["background"] = torch.tensor(list(scenes.BACKGROUNDS).index(scene.background))
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
        sizes["background"] = len(scenes.BACKGROUNDS)
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


@dataclass(frozen=True)
class _Batch:
    """Drawn pictures, scenes before slips, and the labels of both."""

    pixels: Tensor  # [B, 3, H, W], 0 to 1
    scenes: dict[str, Tensor]
    slips: dict[str, Tensor]


def _draw(rng: random.Random, num_scenes: int, num_slips: int) -> _Batch:
    pictures, scene_rows, slip_rows = [], [], []
    for _ in range(num_scenes):
        scene = scenes.sample_scene(rng, scenes.TRAIN)
        pictures.append(np.asarray(scenes.render(scene, rng)))
        scene_rows.append(scene_labels(scene, scenes.IMAGE_SIZE // 14))
    for _ in range(num_slips):
        slip = slips.sample_slip(rng, scenes.TRAIN)
        pictures.append(np.asarray(slips.render(slip, rng)))
        slip_rows.append(slip_labels(slip))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    stacked = [
        {name: torch.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())}
        for rows in (scene_rows, slip_rows)
    ]
    return _Batch(pixels, *stacked)


def train_vision(
    out: Path,
    *,
    steps: Sequence[int] = VISION_STEPS,
    start: Path | None = None,
    seed: int,
    batch: int = 64,
    compiled: bool = False,
) -> None:
    """Trains the small ViT on labelled pictures and writes `encoder.safetensors` to `out`.

    Args:
        steps: of the course of scenes alone, and of the course behind it, of whose pictures three in eight are scenes
            and the others slips.
        start: an `encoder.safetensors` to go on from.
    """
    torch.manual_seed(seed)
    model = build_vit(VISION)
    if start is not None:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(start).items()})
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for block in model.blocks if compiled else ():
        block.attn.fused_attn = False  # in bf16 on a CPU, three times slower than the plain matrices
        block.compile(dynamic=False)
    for number, (of_course, num_slips) in enumerate(zip(steps, (0, batch * 5 // 8), strict=True)):
        rng = random.Random(seed + 2 + number)
        _teach(model, rng, of_course, batch - num_slips, num_slips, out=out, compiled=compiled)


def _teach(
    model: Any, rng: random.Random, steps: int, num_scenes: int, num_slips: int, *, out: Path, compiled: bool
) -> None:
    """One course of as many scenes and slips a step; writes the encoder as it goes."""
    kinds = [SceneHeads] + ([SlipHeads] if num_slips else [])
    # For the block before the last, and the last.
    heads = nn.ModuleList(nn.ModuleList(kind(model.embed_dim) for kind in kinds) for _ in range(2))
    named = [*model.named_parameters(), *heads.named_parameters(prefix="heads")]
    hidden = [p for n, p in named if p.dim() == 2 and n.startswith("blocks.")]
    others = [p for n, p in named if not (p.dim() == 2 and n.startswith("blocks."))]
    optimizer_list = optimizers(hidden, others, lr=0.02)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    started, before_last = time.time(), len(model.blocks) - 2
    for step in range(steps):
        drawn = _draw(rng, num_scenes, num_slips)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compiled):
            last, taps = model.forward_intermediates(
                (drawn.pixels - mean) / std, indices=[before_last], return_prefix_tokens=True, output_fmt="NLC"
            )
        patches, prefix = taps[0]
        streams = ((prefix[:, 0].float(), patches.float()), (last[:, 0].float(), last[:, 1:].float()))
        loss, shares = torch.zeros(()), []
        for readers, (cls, patches) in zip(heads, streams, strict=True):
            parts = (slice(num_scenes), drawn.scenes), (slice(num_scenes, None), drawn.slips)
            each: Iterable[Any] = cast(nn.ModuleList, readers)
            for reader, (rows, labels) in zip(each, parts, strict=False):
                own, right = reader(cls[rows], patches[rows], labels)
                loss = loss + own
                shares.append(f"{right.item():.4f}")
        loss.backward()
        step_all(optimizer_list, schedule(step, steps))
        if step % 50 == 0 or step == steps - 1:
            read = ", ".join(shares[: len(kinds)])  # centres of objects, signs of slips
            print(f"step {step} loss {loss.item():.3f} read right {read} {time.time() - started:.0f}s", flush=True)
        if step % 500 == 499 or step == steps - 1:
            out.mkdir(parents=True, exist_ok=True)
            state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
            save_file(state, str(out / "encoder.safetensors"), metadata={"format": "pt"})
