"""The symbols of the grids that the small LLaMA reads: tables whose entries add up to the token of a patch."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visplice.train import scenes
from visplice.train.grid_batches import TABLES

SYMBOLS_FILE = "symbols.safetensors"


class Tables(nn.Module):
    """The vectors of a grid's tokens, with those of CLS and the sentinels: `[B, 3 + P, D]`."""

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
        gains = 1 - vary * torch.rand(len(parts), len(grid), 1, 1, device=parts.device)
        patches = (parts * gains).sum(0)
        moved = torch.randn(len(grid), 1, patches.shape[-1], device=parts.device)
        patches = patches + vary * 0.5 * patches.detach().std() * moved
        start, end = (sentinel.expand(len(grid), 1, -1) for sentinel in self.sentinels)
        return torch.cat((start, self.whole(whole)[:, None], patches, end), dim=1)


def save_symbols(tables: Tables, folder: Path) -> None:
    """Writes the symbols in half precision."""
    state = {name: tensor.detach().half().contiguous() for name, tensor in tables.state_dict().items()}
    save_file(state, str(folder / SYMBOLS_FILE), metadata={"format": "pt"})


def load_symbols(folder: Path) -> Tables:
    """The symbols of a LLaMA that learned grids; nothing of them is trained.

    Raises:
        OSError: there are none in this folder.
    """
    state = {name: tensor.float() for name, tensor in load_file(folder / SYMBOLS_FILE).items()}
    tables = Tables(state["sentinels"].shape[1], 1.0)
    tables.load_state_dict(state)
    return tables.requires_grad_(False)
