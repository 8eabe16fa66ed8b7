"""How the small backbones are optimized: Muon (Jordan et al., 2024) for hidden matrices, AdamW for the rest."""

from collections.abc import Iterable

import torch
from torch import nn


def optimizers(
    hidden: Iterable[nn.Parameter], others: Iterable[nn.Parameter], lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for embeddings, heads, norms and biases."""
    return [
        torch.optim.Muon(hidden, lr=lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr / 8, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate: a short warm-up, a plateau, a linear way down over the last 40 %."""
    return min(1.0, (step + 1) / 50, max(0.0, (steps - step) / (0.4 * steps)))


def step_all(optimizer_list: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizer_list:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
