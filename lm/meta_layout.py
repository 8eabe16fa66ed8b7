"""Meta's own layout of a LLaMA: the fields of `params.json` and the names of the tensors in `consolidated.NN.pth`.

Rotary pairs are interleaved there. LLaMA 1 and 2 leave out the base, which is 10,000 for them, though Meta's later code
has another default; the length is nowhere in the file and follows from the rest.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from visplice.lm.config import LlamaConfig, RopeScaling
from visplice.lm.layout import Entry, plain, side_by_side, to_half_split, turned

_KNOWN = frozenset(
    """dim n_layers n_heads n_kv_heads head_dim vocab_size multiple_of ffn_dim_multiplier ffn_exp norm_eps rope_theta
    use_scaled_rope rope_scaling_factor rope_high_freq_factor max_seq_len max_batch_size attention_chunk_size
    nope_layer_interval use_qk_norm attn_temperature_tuning floor_scale attn_scale moe_args vision_args
    """.split()
)
_REQUIRED = ("dim", "n_layers", "n_heads")
_CROSS_ATTENTION = ("vision_chunk_size", "vision_num_cross_attention_layers", "vision_model")


def read_meta_config(
    raw: dict[str, Any], file: str, *, vocab_size: int, ffn_dim: int, ignore_fields: Collection[str] = ()
) -> LlamaConfig:
    """The shape that `params.json` describes.

    Args:
        raw: its fields.
        file: names it in messages.
        vocab_size: rows of the embedding table as stored; LLaMA 1 and 2 write -1 into the file.
        ffn_dim: width of the first dense feed-forward as stored, 0 where every layer is sparse.
        ignore_fields: unknown fields that are known to be harmless.
    Raises:
        ValueError: fields are missing, unknown, or ask for what is not built here.
    """
    if any(isinstance(raw.get(name), dict) or raw.get(name, -1) not in (-1, None) for name in _CROSS_ATTENTION):
        raise ValueError(
            f"{file}: LLaMA 3.2 Vision looks at pictures through cross-attention layers of its own, while visplice "
            "splices them into the prompt; of its Hugging Face folder the text layers can be opened"
        )
    unknown = sorted(name for name in raw if name not in _KNOWN and name not in ignore_fields and raw[name] is not None)
    if unknown:
        told = ", ".join(f"{name} = {raw[name]!r}" for name in unknown)
        raise ValueError(
            f"{file}: unknown here, so it may change the arithmetic: {told}; if you know it to be harmless, name it in "
            "ignore_fields (visplice import --ignore-field)"
        )
    missing = [name for name in _REQUIRED if raw.get(name) is None]
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(missing)}")
    if raw.get("vocab_size", -1) not in (-1, vocab_size):
        raise ValueError(f"{file}: vocab_size is {raw['vocab_size']}, but the embedding table has {vocab_size} rows")
    dim, heads = raw["dim"], raw["n_heads"]
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": raw["n_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("n_kv_heads") or heads,
        "head_dim": raw.get("head_dim") or dim // heads,
        "norm_eps": raw.get("norm_eps", 1e-5),
        "rope_theta": float(raw.get("rope_theta", 10_000.0)),
    }
    moe = raw.get("moe_args")
    values["ffn_dim"] = ffn_dim or _ffn_dim(4 * dim, raw)
    values["max_seq_len"] = _length(raw, bool(moe))
    if raw.get("use_scaled_rope"):
        factor = raw.get("rope_scaling_factor") or (16 if moe else _factor(dim))
        high = raw.get("rope_high_freq_factor") or (1 if moe else 4)
        values["rope"] = RopeScaling(kind="llama3", factor=float(factor), high_freq_factor=float(high))
    if moe:
        values |= _llama_4(raw, moe, dim)
    try:
        return LlamaConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _factor(dim: int) -> int:
    """LLaMA 3.2 of 1 and 3 B stretch by 32, all others by 8; Meta's files do not say so."""
    return 32 if dim in (2048, 3072) else 8


def _length(raw: dict[str, Any], sparse: bool) -> int:
    if raw.get("max_seq_len"):
        return raw["max_seq_len"]
    if sparse:
        return 10_485_760 if raw.get("use_scaled_rope") else 1_048_576
    if raw.get("use_scaled_rope"):
        return 131_072
    # LLaMA 3 and CodeLlama write their base; of the two without one, LLaMA 1 is the one that lived with 2048.
    return {500_000.0: 8192, 1_000_000.0: 16_384}.get(float(raw.get("rope_theta", 0)), 4096)


def _ffn_dim(width: float, raw: dict[str, Any], shrink: float = 1.0) -> int:
    """Two thirds of `width`, times the multiplier, rounded up to `multiple_of`."""
    inner = int(int(2 * int(width) / 3) * (raw.get("ffn_dim_multiplier") or 1.0))
    inner, multiple = int(inner / shrink), raw.get("multiple_of", 256)
    return -(-inner // multiple) * multiple


def _llama_4(raw: dict[str, Any], moe: dict[str, Any], dim: int) -> dict[str, Any]:
    step, interval = moe.get("interleave_moe_layer_step", 1), raw.get("nope_layer_interval")
    layers = range(raw["n_layers"])
    shrink = moe.get("capacity_factor", 1.0) + 1 if moe.get("auto_scale_F", True) else 1.0
    return {
        "expert_dim": _ffn_dim((raw.get("ffn_exp") or 4.0) * dim, raw, shrink),
        "num_experts": moe["num_experts"],
        "experts_per_token": moe.get("top_k", 1),
        "moe_layers": tuple(layer for layer in layers if (layer + 1) % step == 0),
        "nope_layers": tuple(layer for layer in layers if interval and (layer + 1) % interval == 0),
        "attention_chunk": raw.get("attention_chunk_size"),
        "qk_norm": raw.get("use_qk_norm", False),
        "temperature_floor": int(raw.get("floor_scale", 8192)) if raw.get("attn_temperature_tuning") else None,
        "temperature_scale": raw.get("attn_scale", 0.1),
    }


def meta_entries(config: LlamaConfig, names: Collection[str]) -> list[Entry]:
    """The stored tensors; `names` tell which of the spellings of LLaMA 4 a checkpoint has."""
    entries = [plain(f"{name}.weight", f"{name}.weight") for name in ("tok_embeddings", "norm")]
    if not config.tie_embeddings:
        entries.append(plain("output.weight", "output.weight"))
    for index in range(config.num_layers):
        layer = f"layers.{index}."
        entries += _attention(config, layer, names)
        norm = (f"{layer}{name}" for name in ("feed_forward.norm.weight", "feed_forward.mlp.layer_norm_weight"))
        stored = next((name for name in norm if name in names), f"{layer}ffn_norm.weight")
        entries.append(plain(stored, f"{layer}ffn_norm.weight"))
        entries += _feed_forward(layer, names, sparse=index in config.moe_layers)
    return entries


def _attention(config: LlamaConfig, layer: str, names: Collection[str]) -> list[Entry]:
    attention = f"{layer}attention."
    wq, wk, wv = (f"{attention}{name}.weight" for name in ("wq", "wk", "wv"))
    fused, norm = f"{attention}wqkv.weight", f"{attention}wqkv.layer_norm_weight"
    entries = [
        plain(norm if norm in names else f"{layer}attention_norm.weight", f"{layer}attention_norm.weight"),
        plain(f"{attention}wo.weight", f"{attention}wo.weight"),
    ]
    if fused not in names:
        return [*entries, turned(wq, wq, config.num_heads), turned(wk, wk, config.num_kv_heads), plain(wv, wv)]
    assert config.head_dim is not None
    sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]

    def read(tensor: Tensor) -> tuple[Tensor, ...]:
        if tensor.shape[0] != sum(sizes):
            raise ValueError(f"{fused} has {tensor.shape[0]} rows, params.json says {sum(sizes)}")
        q, k, v = tensor.split(sizes)
        return to_half_split(q, config.num_heads), to_half_split(k, config.num_kv_heads), v

    return [*entries, Entry(stored=fused, weights=(wq, wk, wv), read=read)]


def _feed_forward(layer: str, names: Collection[str], *, sparse: bool) -> list[Entry]:
    ffn = f"{layer}feed_forward."
    w1, w2, w3 = (f"{ffn}{name}" for name in ("w1", "w2", "w3"))
    if not sparse:
        if f"{ffn}mlp.fc1_weight" in names:
            return [
                side_by_side(f"{ffn}mlp.fc1_weight", (f"{w1}.weight", f"{w3}.weight"), 0),
                plain(f"{ffn}mlp.fc2_weight", f"{w2}.weight"),
            ]
        return [plain(f"{weight}.weight", f"{weight}.weight") for weight in (w1, w2, w3)]
    shared = f"{ffn}shared_expert."
    router = Entry(stored=f"{ffn}router_DE", weights=(f"{ffn}router.weight",), read=lambda tensor: (tensor.T,))
    return [
        router,
        plain(f"{ffn}experts.moe_w_in_eD_F", w1),
        plain(f"{ffn}experts.moe_w_out_eF_D", w2),
        plain(f"{ffn}experts.moe_w_swiglu_eD_F", w3),
        plain(f"{ffn}w_in_shared_FD.weight", f"{shared}w1.weight"),
        plain(f"{ffn}w_out_shared_DF.weight", f"{shared}w2.weight"),
        plain(f"{ffn}w_swiglu_FD.weight", f"{shared}w3.weight"),
    ]
