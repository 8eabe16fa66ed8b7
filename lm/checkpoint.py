"""A LLaMA on disk: the Hugging Face folder layout, `config.json` beside `model.safetensors`."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visplice.lm.config import LlamaConfig
from visplice.lm.decoder import Llama

# Ours on the left, Hugging Face's on the right; {} is the layer.
_KEYS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}


def _theirs(name: str) -> str:
    layer = re.search(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".{}.", name, count=1)
    return _KEYS[pattern].format(layer.group(1) if layer else "")


def read_config(folder: str | Path) -> LlamaConfig:
    """The shape written in `config.json`.

    Raises:
        ValueError: the file is missing or broken, is not a LLaMA's, or changes the arithmetic in a way not built here.
    """
    file = Path(folder) / "config.json"
    try:
        raw: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: no such file; a LLaMA folder holds config.json and model.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object but {type(raw).__name__}")
    if raw.get("model_type") != "llama":
        raise ValueError(f"{file}: model_type is {raw.get('model_type')!r}; only 'llama' can be read")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError(f"{file}: rope scaling {scaling} is not supported; only unscaled rotary positions are")
    for field, supported in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if raw.get(field, supported) != supported:
            raise ValueError(f"{file}: {field} is {raw[field]!r}; only {supported!r} is supported")
    if "rope_theta" not in raw and "rope_theta" in rope:
        raw["rope_theta"] = rope["rope_theta"]
    required = {"vocab_size", "dim", "num_layers", "num_heads", "ffn_dim"}
    missing = [_FIELDS[ours] for ours in sorted(required) if _FIELDS[ours] not in raw]
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(missing)}")
    values = {ours: raw[theirs] for ours, theirs in _FIELDS.items() if raw.get(theirs) is not None}
    # What transformers takes these for when the file leaves them out.
    values.setdefault("num_kv_heads", values["num_heads"])
    values.setdefault("norm_eps", 1e-6)
    return LlamaConfig(**values)


def load_llama(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Llama:
    """Builds a decoder from a folder and reads its weights one tensor at a time.

    Raises:
        ValueError: a file is missing or broken, or tensors are missing, unknown or of another shape.
    """
    config = read_config(folder)
    file = Path(folder) / "model.safetensors"
    with torch.device("meta"):
        model = Llama(config)
    expected = {_theirs(name): name for name in model.state_dict()}
    if config.tie_embeddings:
        del expected["lm_head.weight"]
    state: dict[str, Tensor] = {}
    try:
        with safe_open(str(file), framework="pt") as tensors:
            found = set(tensors.keys())
            missing, unknown = sorted(expected.keys() - found), sorted(found - expected.keys())
            if missing or unknown:
                raise ValueError(
                    f"{file}: does not fit its config.json; missing {missing or 'nothing'}, "
                    f"unknown {unknown or 'nothing'}"
                )
            for theirs, ours in expected.items():
                tensor, shape = tensors.get_tensor(theirs), model.get_parameter(ours).shape
                if tensor.shape != shape:
                    raise ValueError(f"{file}: {theirs} is {list(tensor.shape)}, config.json says {list(shape)}")
                state[ours] = tensor.to(device=device, dtype=dtype)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; a LLaMA folder holds config.json and model.safetensors") from None
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def save_llama(model: Llama, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes `config.json` and `model.safetensors` as transformers' `LlamaForCausalLM` reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    raw |= {_FIELDS[field.name]: getattr(model.config, field.name) for field in fields(LlamaConfig)}
    raw["torch_dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    state = {
        _theirs(name): tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()
    }
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable for its owner alone
