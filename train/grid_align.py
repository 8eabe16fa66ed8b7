"""Stage 1 for what is printed: each projected patch against the symbols that the LLaMA reads there.

The LLaMA learned slips and scenes as grids whose tokens are sums of symbol vectors (`train/backbone_slips.py`). These
ship beside it as `symbols.safetensors`. Here the projector learns from training pictures, and from what the code that
drew them says is in every patch, to speak in the same symbols. Answers come later, in stage 2.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from visplice.lm.vision_llama import VisionLlama
from visplice.train import scenes, slips
from visplice.train.backbone_vision import scene_labels
from visplice.train.grid_batches import SCENE_TABLES, TABLES
from visplice.train.grid_tables import Tables
from visplice.train.optim import OptimConfig
from visplice.train.slip_heads import DENSE


def pictures(seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless training pictures `[B, H, W, 3]`, half slips, their grids `[B, P, T]` and what the whole is `[B]`."""
    rng = random.Random(f"{seed} symbols")
    while True:
        drawn, grids, wholes = [], [], []
        for number in range(batch):
            grid = torch.zeros((scenes.IMAGE_SIZE // slips.PATCH) ** 2, len(TABLES), dtype=torch.long)
            if number < batch // 2:
                slip = slips.sample_slip(rng, scenes.TRAIN)
                picture, held, whole = slips.render(slip, rng), slips.grid_of(slip), 0
                for column, name in enumerate(DENSE):
                    grid[:, column] = torch.tensor(getattr(held, name))
            else:
                scene = scenes.sample_scene(rng, scenes.TRAIN)
                picture, dense = scenes.render(scene, rng), scene_labels(scene, scenes.IMAGE_SIZE // slips.PATCH)
                for column, name in enumerate(SCENE_TABLES, start=len(DENSE)):
                    grid[:, column] = dense[name]
                whole = 1 + int(dense["background"])
            drawn.append(np.asarray(picture))
            grids.append(grid)
            wholes.append(whole)
        yield torch.from_numpy(np.stack(drawn)), torch.stack(grids), torch.tensor(wholes)


def align_symbols(
    model: VisionLlama, symbols: Tables, *, steps: int, batch: int, seed: int, optim: OptimConfig
) -> list[float]:
    """Trains the projector and its sentinels towards the symbols; what is left, step by step."""
    projector = model.projector
    symbols = symbols.to(model.device)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=optim.lr, betas=(0.9, 0.98), weight_decay=0.0)
    transform, losses = model.encoder.transform, []
    mean, std = (torch.tensor(side, device=model.device).view(3, 1, 1) for side in (transform.mean, transform.std))
    for step, (drawn, grid, whole) in zip(
        tqdm(range(steps), desc="symbols", mininterval=1.0), pictures(seed, batch), strict=False
    ):
        pixels = (drawn.to(model.device).permute(0, 3, 1, 2).float() / 255 - mean) / std
        wanted = symbols(grid.to(model.device), whole.to(model.device))  # [B, 3 + P, D]: sentinels around the tokens
        said = projector(model.features(pixels))
        assert projector.sentinels is not None
        error = (said - wanted[:, 1:-1]).square().mean(-1)  # [B, 1 + P]
        held = error[:, 1:][grid.to(model.device).any(-1)]  # most patches hold nothing; the others count as much
        beside = (projector.sentinels - wanted[0, [0, -1]]).square().mean()
        loss = (error.mean() + held.mean() + beside) / wanted.var()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * optim.share(step, steps)
        optimizer.step()
        losses.append(loss.item())
    return losses
