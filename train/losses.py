"""The two training objectives."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from visplice.lm.decoder import Llama
from visplice.lm.prompt import IGNORE


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over a batch of pairs (van den Oord et al., 2018; Radford et al., "CLIP", 2021).

    Args:
        image: `[B, D]` projected pictures; pair i belongs to `text[i]`, all others are negatives.
        text: `[B, D]` caption embeddings.
        logit_scale: scalar, inverse temperature that the cosines are multiplied by.
    """
    cosines = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # [B, B]
    logits, targets = logit_scale * cosines, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def answer_loss(lm: Llama, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy, computed only where there are labels.

    Args:
        lm: the frozen decoder; its final norm and head see the supervised rows alone.
        hidden: `[B, S, D]`, the residual stream behind the last layer.
        labels: `[B, S]`, `IGNORE` where not supervised; position s predicts label s + 1.
    Returns:
        Mean loss over supervised tokens, and the share of them that greedy decoding gets right.
    """
    targets = labels[:, 1:]
    rows = targets != IGNORE
    logits = lm.logits(hidden[:, :-1][rows]).float()  # [N, V]
    wanted = targets[rows]
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()


def rank_share(count: int, device: torch.device) -> float:
    """What a rank's mean over `count` items is multiplied by, so that DDP's mean over ranks is that over all items.

    All ranks call it together. A short batch counts for no more than what is in it, an empty one for nothing.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return 1.0
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)
    return count * dist.get_world_size() / max(1.0, total.item())


def retrieval(image: Tensor, text: Tensor, k: int) -> float:
    """Share of pictures `[B, D]` whose own caption `[B, D]` is among the k nearest by cosine (R@k)."""
    cosines = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    rank = (cosines > cosines.diagonal()[:, None]).sum(-1)
    return (rank < k).float().mean().item()
