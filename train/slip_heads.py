"""What the vision backbone is taught about slips: which signs lie in every patch, and where in the slip they stand.

It never sees a question or an answer. Training slips alone are drawn, so no word and no number of the test slips.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visplice.train import slips

KINDS = (slips.RECEIPT, slips.LABEL)
# Labels of every patch and how many values each has; `cell` and `line` are 0 where nothing is printed.
DENSE = {
    "left": len(slips.SIGNS) + 1,
    "right": len(slips.SIGNS) + 1,
    "cell": max(size.most_cells for size in slips.SIZES.values()) + 1,
    "line": max(size.most_lines for size in slips.SIZES.values()) + 1,
}
WHOLE = {"kind": len(KINDS), "size": len(slips.SIZES), "lines": DENSE["line"]}  # labels of the whole slip, for CLS


def slip_labels(slip: slips.Slip) -> dict[str, Tensor]:
    """Labels of a slip: `[P]` those of the patches (`slips.Grid`), and for CLS its kind, size and number of lines."""
    grid = slips.grid_of(slip)
    whole = {"kind": KINDS.index(slip.kind), "size": list(slips.SIZES).index(slip.size), "lines": len(slip.lines)}
    return {name: torch.tensor(getattr(grid, name)) for name in DENSE} | {
        name: torch.tensor(value) for name, value in whole.items()
    }


class SlipHeads(nn.Module):
    """Linear readers of these labels behind a LayerNorm; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in (DENSE | WHOLE).items()})

    def forward(self, cls: Tensor, patches: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss, and the share of signs that are read right."""
        cls, patches = self.norm(cls), self.norm(patches)
        loss, right = cls.new_zeros(()), []
        for name in DENSE:
            logits, label = self.heads[name](patches), labels[name]
            losses = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none").view_as(label)
            printed = label > 0
            # Most patches hold nothing; those with something count as much as all together.
            loss = loss + losses.mean() + losses[printed].mean()
            if name in ("left", "right"):
                right.append((logits.argmax(-1) == label)[printed])
        for name in WHOLE:
            loss = loss + 0.1 * F.cross_entropy(self.heads[name](cls), labels[name])
        return loss, torch.cat(right).float().mean()
