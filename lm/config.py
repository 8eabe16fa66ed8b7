"""The shape of a LLaMA decoder."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Everything that fixes the arithmetic of a LLaMA; one row of numbers per member of the family."""

    vocab_size: int  # rows of the embedding table
    dim: int  # width of the residual stream, D
    num_layers: int
    num_heads: int  # query heads, H
    num_kv_heads: int  # key and value heads; divides num_heads (grouped-query attention)
    ffn_dim: int  # width inside the SwiGLU feed-forward
    head_dim: int | None = None  # width of one head; None means dim / num_heads
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    max_seq_len: int = 2048  # positions the model was trained for
    tie_embeddings: bool = False  # output head shares the embedding table

    def __post_init__(self) -> None:
        if self.head_dim is None:
            if self.dim % self.num_heads:
                raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; set head_dim")
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        assert self.head_dim is not None
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")


LLAMA_7B = LlamaConfig(
    vocab_size=32_000, dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, ffn_dim=11_008, max_seq_len=2048
)
