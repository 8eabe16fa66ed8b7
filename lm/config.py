"""The shape of a LLaMA decoder: everything that fixes its arithmetic, and the named members of the family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length a model was first trained for.

    linear: positions divided by `factor` (Chen et al., "Position Interpolation", 2023). dynamic: the base grows with
    the length once it passes `max_seq_len` (NTK-aware). llama3: only slow frequencies are divided (LLaMA 3.1). yarn:
    interpolation by frequency, with warmer attention (Peng et al., "YaRN", 2023).
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_seq_len: int = 8192  # llama3, yarn: length before stretching
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are divided by the factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high are left alone
    beta_fast: float = 32.0  # yarn: rotations over the original length above which a frequency is left alone
    beta_slow: float = 1.0  # yarn: rotations below which it is divided by the factor
    attention_factor: float | None = None  # yarn: scale of cosines and sines; None means 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn, as DeepSeek writes it: numerator and denominator of the scale
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the borders of the ramp to whole dimensions

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
            raise ValueError(f"rope kind is {self.kind!r}; it is default, linear, dynamic, llama3 or yarn")
        if not self.factor > 0:
            raise ValueError(f"rope factor is {self.factor}; it is positive")
        if self.kind == "llama3" and not self.high_freq_factor >= self.low_freq_factor > 0:
            raise ValueError(
                f"rope high_freq_factor is {self.high_freq_factor} and low_freq_factor {self.low_freq_factor}; "
                "both are positive, and the first is not the smaller"
            )
        if self.original_max_seq_len < 1:
            raise ValueError(f"rope original_max_seq_len is {self.original_max_seq_len}; it is at least 1")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Everything that fixes the arithmetic of a LLaMA; one row of numbers per member of the family."""

    vocab_size: int  # rows of the embedding table
    dim: int  # width of the residual stream, D
    num_layers: int
    num_heads: int  # query heads, H
    num_kv_heads: int  # key and value heads; divides num_heads (grouped-query attention)
    ffn_dim: int  # width inside the SwiGLU feed-forward of a dense layer
    head_dim: int | None = None  # width of one head; None means dim / num_heads
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope: RopeScaling = RopeScaling()
    max_seq_len: int = 2048  # positions the model was trained for
    tie_embeddings: bool = False  # output head shares the embedding table

    # LLaMA 4
    num_experts: int = 0  # routed experts of a sparse layer, E; 0 means that every layer is dense
    experts_per_token: int = 1
    expert_dim: int = 0  # width inside one expert, and inside the shared expert
    moe_layers: tuple[int, ...] = ()  # indices of the sparse layers
    nope_layers: tuple[int, ...] = ()  # indices of the layers without rotary positions; they see everything before
    attention_chunk: int | None = None  # the other layers look only at positions of the same chunk of this many
    qk_norm: bool = False  # queries and keys of layers with rotary positions are scaled to root-mean-square 1
    temperature_floor: int | None = None  # queries of layers without rotary positions grow with log(position / floor)
    temperature_scale: float = 0.1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
        if self.head_dim is None:
            if self.dim % self.num_heads:
                raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; set head_dim")
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        assert self.head_dim is not None
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        for name in ("moe_layers", "nope_layers"):
            if any(not 0 <= index < self.num_layers for index in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, but there are {self.num_layers} layers, from 0")
        if self.moe_layers and not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token} of num_experts {self.num_experts}")
        if self.moe_layers and self.expert_dim < 1:
            raise ValueError(f"expert_dim is {self.expert_dim}; it is at least 1 where there are moe_layers")
        if self.attention_chunk is not None and self.attention_chunk < 1:
            raise ValueError(f"attention_chunk is {self.attention_chunk}; it is at least 1")

    @property
    def context_length(self) -> int:
        """Positions that can be used: stretching by a factor is not always counted in `max_seq_len`."""
        if self.rope.kind in ("linear", "dynamic"):
            return int(self.max_seq_len * self.rope.factor)
        if self.rope.kind == "yarn":
            return max(self.max_seq_len, int(self.rope.original_max_seq_len * self.rope.factor))
        return self.max_seq_len

    @property
    def num_parameters(self) -> int:
        """Weights of the decoder; a tied head counts once."""
        assert self.head_dim is not None
        attention = 2 * self.dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        dense = 3 * self.dim * self.ffn_dim
        sparse = self.dim * self.num_experts + 3 * self.dim * self.expert_dim * (self.num_experts + 1)
        layers = self.num_layers * (attention + 2 * self.dim) + (self.num_layers - len(self.moe_layers)) * dense
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.dim
        return layers + len(self.moe_layers) * sparse + tables + self.dim


def _llama(size: tuple[int, int, int, int, int], **others: object) -> LlamaConfig:
    dim, num_layers, num_heads, num_kv_heads, ffn_dim = size
    shape = dict(dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads, ffn_dim=ffn_dim)
    return LlamaConfig(**{"vocab_size": 32_000, **shape, **others})  # type: ignore[arg-type]


#          dim, layers, heads, key-value heads, feed-forward
_7B = (4096, 32, 32, 32, 11_008)
_8B = (4096, 32, 32, 8, 14_336)
_13B = (5120, 40, 40, 40, 13_824)
_70B = (8192, 80, 64, 8, 28_672)
_LLAMA_1 = {"max_seq_len": 2048, "norm_eps": 1e-6}
_LLAMA_2 = {"max_seq_len": 4096}
_CODE = {"max_seq_len": 16_384, "rope_theta": 1e6, "vocab_size": 32_016}
_LLAMA_3 = {"max_seq_len": 8192, "rope_theta": 5e5, "vocab_size": 128_256}
_LLAMA_31 = _LLAMA_3 | {"max_seq_len": 131_072, "rope": RopeScaling(kind="llama3", factor=8.0)}
_LLAMA_32 = _LLAMA_31 | {"rope": RopeScaling(kind="llama3", factor=32.0), "tie_embeddings": True}
_LLAMA_4 = {
    "vocab_size": 202_048,
    "head_dim": 128,
    "rope_theta": 5e5,
    "expert_dim": 8192,
    "nope_layers": tuple(range(3, 48, 4)),
    "attention_chunk": 8192,
}

FAMILY: dict[str, LlamaConfig] = {
    "LLaMA 7B": _llama(_7B, **_LLAMA_1),
    "LLaMA 13B": _llama(_13B, **_LLAMA_1),
    "LLaMA 33B": _llama((6656, 60, 52, 52, 17_920), **_LLAMA_1),
    "LLaMA 65B": _llama((8192, 80, 64, 64, 22_016), **_LLAMA_1 | {"norm_eps": 1e-5}),
    "LLaMA 2 7B": _llama(_7B, **_LLAMA_2),
    "LLaMA 2 13B": _llama(_13B, **_LLAMA_2),
    "LLaMA 2 70B": _llama(_70B, **_LLAMA_2),
    "CodeLlama 7B": _llama(_7B, **_CODE),
    "CodeLlama 13B": _llama(_13B, **_CODE),
    "CodeLlama 34B": _llama((8192, 48, 64, 8, 22_016), **_CODE | {"vocab_size": 32_000}),
    "CodeLlama 70B": _llama(_70B, **_CODE),
    "LLaMA 3 8B": _llama(_8B, **_LLAMA_3),
    "LLaMA 3 70B": _llama(_70B, **_LLAMA_3),
    "LLaMA 3.1 8B": _llama(_8B, **_LLAMA_31),
    "LLaMA 3.1 or 3.3 70B": _llama(_70B, **_LLAMA_31),
    "LLaMA 3.1 405B": _llama((16_384, 126, 128, 8, 53_248), **_LLAMA_31),
    "LLaMA 3.2 1B": _llama((2048, 16, 32, 8, 8192), **_LLAMA_32),
    "LLaMA 3.2 3B": _llama((3072, 28, 24, 8, 8192), **_LLAMA_32),
    "LLaMA 4 Scout": _llama(
        (5120, 48, 40, 8, 16_384),
        **_LLAMA_4,
        num_experts=16,
        moe_layers=tuple(range(48)),
        qk_norm=True,
        temperature_floor=8192,
        rope=RopeScaling(kind="llama3", factor=16.0, high_freq_factor=1.0),
        max_seq_len=10_485_760,
    ),
    "LLaMA 4 Maverick": _llama(
        (5120, 48, 40, 8, 16_384),
        **_LLAMA_4,
        num_experts=128,
        moe_layers=tuple(range(1, 48, 2)),
        temperature_floor=8192,
        max_seq_len=1_048_576,
    ),
}

LLAMA_7B = FAMILY["LLaMA 7B"]


def family_of(config: LlamaConfig) -> str | None:
    """Name of the member that has this shape, whatever its vocabulary, context and rotary stretch; None for others.

    LLaMA 2 and CodeLlama of 7, 13 and 70 B differ from their neighbours only in those, so they decide between equals.
    """

    def size(c: LlamaConfig) -> LlamaConfig:
        return replace(
            c, vocab_size=1, max_seq_len=1, rope_theta=1.0, rope=RopeScaling(), norm_eps=1.0, tie_embeddings=False
        )

    equals = [name for name, shape in FAMILY.items() if size(shape) == size(config)]

    def likeness(name: str) -> tuple[bool, bool, bool, bool]:
        shape = FAMILY[name]
        return (
            shape.rope_theta == config.rope_theta,
            shape.rope == config.rope,
            shape.max_seq_len == config.max_seq_len,
            shape.norm_eps == config.norm_eps,
        )

    return max(equals, key=likeness, default=None)
