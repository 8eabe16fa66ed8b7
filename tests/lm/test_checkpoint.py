import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from visplice.lm.checkpoint import load_llama, read_config, save_llama
from visplice.lm.config import LlamaConfig

MINIMAL = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.fixture
def folder(make_llama, tmp_path):
    save_llama(make_llama(), tmp_path / "llama")
    return tmp_path / "llama"


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, spoil):
    state = load_file(folder / "model.safetensors")
    spoil(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"head_dim": 12, "rope_theta": 5e5, "norm_eps": 1e-6}]
)
def test_saved_decoder_comes_back_whole(make_llama, tmp_path, changes):
    model = make_llama(**changes)
    save_llama(model, tmp_path)
    loaded = load_llama(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tied = loaded.output.weight is loaded.tok_embeddings.weight
    assert tied == model.config.tie_embeddings


def test_dtype_is_converted_on_the_way_out_and_on_the_way_in(make_llama, tmp_path):
    model = make_llama()
    save_llama(model, tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"
    loaded = load_llama(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.norm.weight, model.norm.weight.half().bfloat16())


def test_without_a_dtype_the_stored_one_stays_and_odd_tensors_follow_the_table(folder):
    state = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    state["model.norm.weight"] = state["model.norm.weight"].float()
    save_file(state, folder / "model.safetensors")
    loaded = load_llama(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_fields_that_config_json_leaves_out_are_what_hugging_face_takes_them_for(tmp_path):
    from transformers import LlamaConfig as TheirConfig

    (tmp_path / "config.json").write_text(json.dumps(MINIMAL))
    theirs, ours = TheirConfig.from_pretrained(tmp_path), read_config(tmp_path)
    assert ours == LlamaConfig(
        vocab_size=100,
        dim=32,
        num_layers=2,
        num_heads=4,
        ffn_dim=48,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        norm_eps=theirs.rms_norm_eps,
        rope_theta=theirs.rope_parameters["rope_theta"],
        max_seq_len=theirs.max_position_embeddings,
        tie_embeddings=theirs.tie_word_embeddings,
    )


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({}, 1e4),
    ],
    ids=["transformers 4", "no scaling", "transformers 5", "left out"],
)
def test_rope_theta_is_read_wherever_it_stands(tmp_path, rope, theta):
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL | rope))
    assert read_config(tmp_path).rope_theta == theta


def test_missing_folder_config_and_weights_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        load_llama(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"llama: no checkpoint"):
        load_llama(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"llama/config\.json: no such file; a LLaMA folder holds config\.json"):
        load_llama(folder)


def test_file_in_place_of_the_folder_is_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"model\.safetensors: a file; expected the folder"):
        load_llama(folder / "model.safetensors")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00{", b"[]", b'"llama"'])
def test_config_that_is_no_json_object_is_refused_by_name(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"llama/config\.json: not (a )?JSON"):
        load_llama(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; what can be read is llama"),
        ({"model_type": None}, "model_type is None; what can be read is llama"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not built"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}, "rope_type 'linear' with odd is not built"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3' lacks low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": 4.0}, "rope_scaling is 4.0; it is an object"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is \{'bits': 4\}; that cannot be read"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is .* cannot be read"),
        ({"sliding_window": 4096}, "unknown here, so it may change the arithmetic: sliding_window = 4096"),
        (
            {"logits_scaling": 8.0, "residual_multiplier": 2},
            ".* arithmetic: logits_scaling = 8.0, residual_multiplier = 2",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"mlp_bias": True}, "mlp_bias is True; only False"),
    ],
)
def test_arithmetic_that_is_not_built_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"llama/config\.json: {message}"):
        load_llama(folder)


def test_unknown_field_can_be_named_as_harmless(folder):
    edit_config(folder, my_notes="hello")
    with pytest.raises(ValueError, match=r"my_notes = 'hello'; .*ignore_fields"):
        load_llama(folder)
    assert load_llama(folder, ignore_fields=["my_notes"]).config == read_config(folder, ignore_fields=["my_notes"])


def test_config_without_a_size_is_refused_by_name(tmp_path):
    lacking = {name: value for name, value in MINIMAL.items() if name not in ("hidden_size", "vocab_size")}
    (tmp_path / "config.json").write_text(json.dumps(lacking))
    with pytest.raises(ValueError, match=r"config\.json: lacks hidden_size, vocab_size"):
        read_config(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_truncated_weights_are_refused_by_name(folder, kept):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"llama/model\.safetensors: (truncated|not a)"):
        load_llama(folder)


@pytest.mark.parametrize(
    ("spoil", "both_sides"),
    [
        (lambda state: state.pop("model.norm.weight"), "missing model.norm.weight, unknown nothing"),
        (lambda state: state.update(extra=torch.ones(1)), "missing nothing, unknown extra"),
        (
            lambda state: state.update({"norm.weight": state.pop("model.norm.weight")}),
            "missing model.norm.weight, unknown norm.weight",
        ),
        (lambda state: state.pop("lm_head.weight"), "missing lm_head.weight, unknown nothing"),
        (
            lambda state: state.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(32, 32)}),
            "model.layers.1.self_attn.k_proj.weight is [32, 32], the config says [16, 32]",
        ),
    ],
    ids=["missing", "unknown", "renamed", "no head", "other shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name_with_both_sides(folder, spoil, both_sides):
    edit_weights(folder, spoil)
    with pytest.raises(ValueError, match=rf"llama.*: .*{re.escape(both_sides)}"):
        load_llama(folder)


def test_config_of_another_size_is_refused_by_the_weights(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"missing model\.layers\.2\..* and 1 more, unknown nothing"):
        load_llama(folder)
    edit_config(folder, num_hidden_layers=2, vocab_size=325)
    with pytest.raises(ValueError, match=r"(embed_tokens|lm_head)\.weight is \[324, 32\], the config says \[325, 32\]"):
        load_llama(folder)
