"""LLaVA folders against transformers at shared random weights: pixels, logits, greedy tokens."""

import numpy as np
import pytest
import torch
from tokenizers import processors

from tests.lm.llava_models import (
    in_memory_name,
    picture,
    renamed,
    tokenizer,
    version_4_name,
    write_hf,
    write_processor,
)
from visplice.lm.extension import load_extension
from visplice.lm.generate import Sampling, generate
from visplice.lm.hf_layout import read_hf_config
from visplice.lm.shared_prefix import Asked, answer
from visplice.lm.vision_llama import user_message

QUESTION = "what is the color of the circle?"
SIZES = [(97, 61), (61, 97), (47, 28), (28, 45), (28, 28), (101, 103), (333, 37)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of transformers' with the defaults of LLaVA-1.5, its model and its processor."""
    folder = tmp_path_factory.mktemp("llava")
    return folder, *write_hf(folder)


def pixels_of(processor, images):
    return torch.from_numpy(np.stack(processor(images=images, return_tensors="np")["pixel_values"]))


@torch.no_grad()
def theirs(model, ids, ours, processor, images):
    """Logits of transformers' model for our ids, with its own placeholder in place of ours."""
    placeholder = model.config.image_token_id
    swapped = torch.where(ids == ours.visual.patch, placeholder, ids)
    return model(input_ids=swapped, pixel_values=pixels_of(processor, images)).logits


@torch.no_grad()
def difference(ours, model, processor, *, images, question=QUESTION):
    """The largest difference of logits over a prompt with pictures and an answer."""
    messages = [user_message(question, images), {"role": "assistant", "content": "red, and blue"}]
    ids = torch.tensor([ours.prompts.build(messages).ids])
    found = ours(ids, ours.pixels(images))
    expected = theirs(model, ids, ours, processor, images)
    assert found.shape == expected.shape
    assert expected.std() > 0.1  # or all would agree
    return (found - expected).abs().max().item()


def asked_theirs(ours, model, processor, image, steps, question):
    """Our ids `[1, S]` of a question, and transformers' greedy tokens; rows beyond the tokenizer say nothing."""
    messages = [user_message(question, [image])]
    ids = torch.tensor([ours.prompts.build(messages, add_generation_prompt=True).ids])
    swapped = torch.where(ids == ours.visual.patch, model.config.image_token_id, ids)
    beyond = list(range(ours.tokenizer.vocab_size, model.config.text_config.vocab_size))
    expected = model.generate(
        input_ids=swapped,
        pixel_values=pixels_of(processor, [image]),
        attention_mask=torch.ones_like(swapped),
        max_new_tokens=steps,
        do_sample=False,
        suppress_tokens=beyond,
        pad_token_id=0,
    )[0, ids.shape[1] :]
    return ids, expected.tolist()


def greedy(ours, model, processor, image, steps):
    """Greedy tokens of both models, each through its own cache."""
    ids, expected = asked_theirs(ours, model, processor, image, steps, QUESTION)
    features = ours.embed(ids, ours.features(ours.pixels([image])))
    sampling = Sampling(max_new_tokens=steps)
    known = ours.tokenizer.vocab_size
    lengths = torch.tensor([ids.shape[1]])
    found = generate(ours.lm, features, lengths, sampling, ours.prompts.stop_ids, num_ids=known, keep_stops=True)
    return [step[0] for step in found], expected


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_logits_are_those_of_transformers(tmp_path, strategy, layer, resize):
    model, processor = write_hf(
        tmp_path, resize=resize, vision_feature_select_strategy=strategy, vision_feature_layer=layer
    )
    ours = load_extension(tmp_path)
    assert ours.visual.count == 16 + (strategy == "full")
    assert difference(ours, model, processor, images=[picture(97, 61)]) < 1e-4
    assert difference(ours, model, processor, images=[picture(61, 97, 1), picture(47, 28, 2)]) < 1e-4


def test_greedy_tokens_are_those_of_transformers_over_64_steps(saved):
    folder, model, processor = saved
    found, expected = greedy(load_extension(folder), model, processor, picture(97, 61), 64)
    assert len(found) == 64 and len(set(found)) > 5
    assert found == expected


def test_questions_that_share_a_prefix_get_the_tokens_of_transformers_one_by_one(saved):
    folder, model, processor = saved
    ours = load_extension(folder)
    texts = [QUESTION, "where is the square?", "what is red, and where is the small circle?"]
    images = [picture(28, 28, seed) for seed in range(3)]
    asked, expected = [], []
    for image, count in zip(images, (3, 1, 2), strict=True):
        found = [asked_theirs(ours, model, processor, image, 12, text) for text in texts[:count]]
        features = ours.features(pixels_of(processor, [image]))
        asked.append(Asked(prompts=[ids[0].tolist() for ids, _ in found], features=features))
        expected.append([tokens for _, tokens in found])
    stops = set(ours.prompts.stop_ids)
    for answers, others in zip(answer(ours, asked, max_new_tokens=12), expected, strict=True):
        for one, tokens in zip(answers, others, strict=True):
            assert one.ids == [token for token in tokens if token not in stops]
            assert len(one.ids) > 2


@pytest.mark.parametrize("change", [in_memory_name, version_4_name], ids=["in memory", "version 4"])
def test_every_key_layout_opens(tmp_path, change):
    model, processor = write_hf(tmp_path)
    renamed(tmp_path, change)
    assert difference(load_extension(tmp_path), model, processor, images=[picture(97, 61)]) < 1e-4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_pixels_are_those_of_the_processor(saved, tmp_path, resize, size):
    folder, *_ = saved
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    processor = write_processor(tmp_path, resize=resize)
    found = load_extension(tmp_path).pixels([picture(*size)])
    assert (found - pixels_of(processor, [picture(*size)])).abs().max() < 1e-3


def test_what_the_whole_processor_saves_is_read_and_its_ids_are_ours(saved, tmp_path):
    """LlavaProcessor writes its image processor inside processor_config.json, and sees one text with <image> in it."""
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    folder, model, processor = saved
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    backend = tokenizer()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    whole = LlavaProcessor(
        image_processor=processor,
        tokenizer=fast,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    whole.save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").is_file()
    ours = load_extension(tmp_path)
    placeholder = model.config.image_token_id
    talk = [user_message(QUESTION, [picture(97, 61)]), {"role": "assistant", "content": "red"}]
    first = f"USER: <image>\n{QUESTION} ASSISTANT:"
    for said, text in (
        (talk[:1], first),  # as transformers' documentation writes one turn, and several
        ([*talk, {"role": "user", "content": "where?"}], f"{first} red</s>USER: where? ASSISTANT:"),
        ([{"role": "system", "content": "A chat."}, *talk[:1]], f"A chat. {first}"),
    ):
        expected = whole(images=[picture(97, 61)], text=text, return_tensors="pt")
        built = ours.prompts.build(said, add_generation_prompt=True)
        found = [placeholder if token == ours.visual.patch else token for token in built.ids]
        assert found == expected["input_ids"][0].tolist()
        assert found.count(placeholder) == 16 and found[0] == 1
    assert (ours.pixels([picture(97, 61)]) - expected["pixel_values"]).abs().max() < 1e-3


@pytest.mark.parametrize(("dtype", "quantise"), [(torch.bfloat16, None), (torch.float32, "int8")])
def test_smaller_weights_open_and_answer_alike(saved, dtype, quantise):
    folder, model, processor = saved
    ours = load_extension(folder, dtype=dtype, quantise=quantise)
    assert ours.lm.tok_embeddings.weight.dtype == dtype
    images = [picture(97, 61)]
    ids = torch.tensor([ours.prompts.build([user_message(QUESTION, images)], add_generation_prompt=True).ids])
    with torch.no_grad():
        found = ours(ids, ours.pixels(images)).float()
    expected = theirs(model, ids, ours, processor, images)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.98
    assert ours.generate(images, [QUESTION], max_new_tokens=4)


def test_a_positive_layer_is_counted_from_the_front(tmp_path):
    model, processor = write_hf(tmp_path, vision_feature_layer=2)  # hidden state 2 of 0 to 4
    ours = load_extension(tmp_path)
    assert ours.encoder.config.layer == -3
    assert difference(ours, model, processor, images=[picture(97, 61)]) < 1e-4


def test_a_projector_without_biases_opens(tmp_path):
    model, processor = write_hf(tmp_path, multimodal_projector_bias=False)
    assert difference(load_extension(tmp_path), model, processor, images=[picture(97, 61)]) < 1e-4


def test_a_clip_with_gelu_and_a_tied_llama_open(tmp_path):
    model, processor = write_hf(
        tmp_path, vision={"hidden_act": "gelu"}, text={"tie_word_embeddings": True}, tie_word_embeddings=True
    )
    ours = load_extension(tmp_path)
    assert ours.lm.config.tie_embeddings and "quickgelu" not in ours.encoder.config.model
    assert difference(ours, model, processor, images=[picture(97, 61)]) < 1e-4


def test_the_published_7b_config_leaves_out_what_transformers_knows():
    """Its text_config holds no widths: they are those of transformers' LlamaConfig."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    raw = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    config = read_hf_config({**raw, "image_token_index": 32000, "pad_token_id": 32001}, "config.json").config
    assert (config.dim, config.ffn_dim, config.num_layers, config.num_heads) == (4096, 11008, 32, 32)
    assert (config.vocab_size, config.max_seq_len, config.norm_eps) == (32064, 4096, 1e-5)


def test_prompts_use_no_row_that_llava_added(saved):
    ours = load_extension(saved[0])
    prompt = ours.prompts.build([user_message("say <pad> here", [picture(28, 28)])], add_generation_prompt=True)
    added = {ours.tokenizer.control(name) for name in ("<image>", "<pad>")}
    assert not added & set(prompt.ids)
    assert ours.visual.vocab_size == ours.lm.config.vocab_size > ours.tokenizer.vocab_size
    assert ours.lm.tok_embeddings.weight.shape[0] == 512  # as it is stored
