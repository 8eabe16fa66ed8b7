"""Rotary positions (Su et al., "RoFormer", 2021) and the ways in which LLaMAs stretch them over longer texts.

The formulas and the order of their operations are those of transformers' `modeling_rope_utils`: at position 100,000 the
last bit of a frequency turns a pair by a hundredth of a radian.

Shape letters: B batch, S positions, d width of one head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visplice.lm.config import LlamaConfig, RopeScaling


def _base_frequencies(base: float | Tensor, head_dim: int, device: torch.device) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return 1.0 / (base**exponents)  # [..., d/2]


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    slowest, fastest = (
        scaling.original_max_seq_len / share for share in (scaling.low_freq_factor, scaling.high_freq_factor)
    )
    stretched = torch.where(wavelengths > slowest, frequencies / scaling.factor, frequencies)
    if slowest == fastest:  # no band between the two, as in LLaMA 4 Scout
        return stretched
    smooth = (scaling.original_max_seq_len / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where((wavelengths >= fastest) & (wavelengths <= slowest), between, stretched)


def _yarn(base: float, head_dim: int, scaling: RopeScaling, device: torch.device) -> Tensor:
    def dimension(rotations: float) -> float:
        """The dimension that turns so often within the original length."""
        turns = scaling.original_max_seq_len / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    powers = base ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_scale(scaling: RopeScaling) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def rotary(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, 1, S, d]` of the angles at `positions` `[B, S]`.

    Computed from the config at every call rather than stored: nothing to lose on the meta device, and one table
    serves all layers of a forward pass. `dynamic` frequencies follow the last position of each row; as in transformers,
    keys that a cache holds keep the frequencies of the step that made them.
    """
    assert config.head_dim is not None
    scaling, scale = config.rope, 1.0
    if scaling.kind == "yarn":
        frequencies = _yarn(config.rope_theta, config.head_dim, scaling, positions.device)
        scale = _yarn_scale(scaling)
    elif scaling.kind == "dynamic":
        reach = (positions.amax(1) + 1).clamp(min=config.max_seq_len).float()[:, None]  # [B, 1]
        growth = scaling.factor * reach / config.max_seq_len - (scaling.factor - 1)
        base = config.rope_theta * growth ** (config.head_dim / (config.head_dim - 2))
        frequencies = _base_frequencies(base, config.head_dim, positions.device)[:, None, None]  # [B, 1, 1, d/2]
    else:
        frequencies = _base_frequencies(config.rope_theta, config.head_dim, positions.device)
        if scaling.kind == "linear":
            frequencies = frequencies / scaling.factor
        elif scaling.kind == "llama3":
            frequencies = _llama3(frequencies, scaling)
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, S, d/2]
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs `(i, i + d/2)` of `x` `[B, H, S, d]`."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
