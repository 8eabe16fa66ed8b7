"""A LLaMA decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, static key-value cache.

Follows Touvron et al., "LLaMA" (2023) and "Llama 2" (2023). Weights carry Meta's names (tok_embeddings, wq, wk, wv,
wo, w1, w2, w3, norm, output); the rotary embedding turns half-split pairs, as Hugging Face checkpoints store them.

Shape letters: B batch, S new positions, T cached positions, D width of the residual stream, H query heads, K key and
value heads, d width of one head, V vocabulary, N answer rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visplice.lm.config import LlamaConfig


def rotary(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, 1, S, d]` of the angles at `positions` `[B, S]`.

    Computed from the config at every call rather than stored: nothing to lose on the meta device, and one table
    serves all layers of a forward pass.
    """
    assert config.head_dim is not None
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None, :, None].float() * config.rope_theta**-exponents  # [B, 1, S, d/2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs `(i, i + d/2)` of `x` `[B, H, S, d]`."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class KVCache:
    """Keys and values of every layer in two tensors of fixed size, so that a decode step has static shapes."""

    def __init__(
        self, config: LlamaConfig, batch: int, length: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        assert config.head_dim is not None
        shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # [L, B, K, T, d]
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def length(self) -> int:
        """Positions that fit."""
        return self.keys.shape[3]

    def update(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values `[B, K, S, d]` of `layer` at `slots` `[S]`; returns all `[B, K, T, d]`."""
        self.keys[layer].index_copy_(2, slots, keys)
        self.values[layer].index_copy_(2, slots, values)
        return self.keys[layer], self.values[layer]


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values (Ainslie et al., "GQA", 2023)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.wq = nn.Linear(config.dim, self.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, self.num_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, self.num_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.num_heads * self.head_dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        layer: int,
        slots: Tensor | None,
    ) -> Tensor:
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)  # [B, H, S, d]
        k = self.wk(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)  # [B, K, S, d]
        v = self.wv(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            assert slots is not None
            k, v = cache.update(layer, slots, k, v)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.num_heads != self.num_kv_heads
        )
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each behind an RMSNorm and added to the stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *context)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Decoder from token ids or embeddings to logits."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype

    def hidden(
        self,
        embeddings: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """The residual stream behind the last layer, before the final norm.

        Args:
            embeddings: `[B, S, D]`.
            positions: `[B, S]`, default 0, 1, 2, ...
            mask: boolean `[B, 1, S, T]`, true where a query may look; default causal over S. Needed with a cache.
            cache: keys and values of earlier positions; written at `slots`.
            slots: `[S]`, cache slots of the new positions.
        Returns:
            `[B, S, D]`.
        """
        batch, length, _ = embeddings.shape
        if positions is None:
            positions = torch.arange(length, device=embeddings.device).expand(batch, length)
        cos, sin = rotary(positions, self.config, embeddings.dtype)
        x = embeddings
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, cache, index, slots)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` residual stream to `[..., V]` logits; pass only the rows that are wanted."""
        return self.output(self.norm(hidden))

    def forward(self, ids: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits `[B, S, V]` for int64 ids `[B, S]`; positions and mask as in `hidden`."""
        return self.logits(self.hidden(self.tok_embeddings(ids), positions=positions, mask=mask))
