"""Stage 2 on a LLaMA that is not the embedded one: a `.bin` checkpoint with a SentencePiece tokenizer, as Vicuna's."""

import io

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from visplice.lm.extension import load_extension
from visplice.lm.prompt import IGNORE
from visplice.train.data.module import ShardData
from visplice.train.instruct import Instruct
from visplice.train.scene_data import training_samples, write_training
from visplice.train.trainer import fit
from visplice.vision.encoder import EncoderConfig


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    import sentencepiece

    folder, model = tmp_path_factory.mktemp("vicuna"), io.BytesIO()
    texts = [turn["value"] for sample in training_samples(60, 0, 6) for turn in sample.record["conversations"]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.save(LlamaForCausalLM(config).state_dict(), folder / "pytorch_model.bin")
    return folder


def test_projector_is_trained_through_it_saved_and_opened(vicuna, encoder, tmp_path):
    write_training(tmp_path / "data", count=16, seed=0, questions=3)
    with pytest.raises(ValueError, match=r"the templates .*vicuna.* fit the tokenizer alike; name the one"):
        Instruct(encoder, str(vicuna), hidden=16)
    stage = Instruct(encoder, str(vicuna), hidden=16, template="vicuna")
    before = stage.model.projector.linear_2.weight.clone()
    fit(stage, ShardData(str(tmp_path / "data"), batch_size=4), tmp_path / "out", max_steps=2, seed=0)
    opened = load_extension(tmp_path / "out")
    assert not torch.equal(opened.projector.linear_2.weight, before)
    assert opened.prompts.template.name == "vicuna"
    (answer,) = opened.generate([[]], ["What is it?"], max_new_tokens=3)
    assert isinstance(answer, str)


def test_answers_and_their_ends_are_supervised_and_nothing_else(vicuna, encoder):
    stage = Instruct(encoder, str(vicuna), hidden=16, template="vicuna")
    tokenizer = stage.model.tokenizer
    messages = [
        {"role": "user", "content": "<image>\nWhat color is the star?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "How many shapes are there?"},
        {"role": "assistant", "content": "3"},
    ]
    prompt = stage.model.prompts.build(messages)
    said = [token for token in prompt.labels if token != IGNORE]
    assert tokenizer.decode(said).split() == ["red", "3"] and said.count(tokenizer.eos_id) == 2
    assert prompt.ids[0] == tokenizer.bos_id and prompt.num_images == 1


def test_wrong_encoder_width_of_a_saved_projector_is_said(vicuna, encoder, tmp_path):
    write_training(tmp_path / "data", count=8, seed=0, questions=2)
    stage = Instruct(encoder, str(vicuna), hidden=16, template="vicuna")
    fit(stage, ShardData(str(tmp_path / "data"), batch_size=4), tmp_path / "out", max_steps=1, seed=0)
    other = EncoderConfig(**encoder.to_dict() | {"weights": None})
    with pytest.raises(ValueError, match="trained with the encoder of fingerprint"):
        Instruct(other, str(vicuna), aligned=str(tmp_path / "out"), template="vicuna")
