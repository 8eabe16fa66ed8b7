import io
import re

import pytest
import torch

from visplice.lm.config import LLAMA_7B
from visplice.lm.decoder import Llama
from visplice.lm.generate import Sampling, generate
from visplice.lm.prompt import TURNS
from visplice.lm.vision_llama import VisionLlama, user_message
from visplice.projector.mlp import Projector, ProjectorConfig
from visplice.vision.encoder import EncoderConfig, VisionEncoder
from visplice.vision.image import ImageError

LENGTH = {"max_new_tokens": 12}


def visual_tokens(model, picture):
    """What one picture becomes, from the parts: VIS_START, projected features, VIS_END."""
    features = model.encoder(model.encoder.transform(picture)[None])[0]
    if not model.encoder.config.include_cls:
        features = features[1:]
    start, end = model.projector.sentinels
    return torch.cat([start[None], model.projector(features), end[None]])


def embeddings_by_hand(model, *pieces):
    """A one-turn prompt from the texts and pictures of a user, put together piece by piece."""
    table, tokenizer = model.lm.tok_embeddings.weight, model.tokenizer
    rows = [table[[tokenizer.control("<|begin|>"), tokenizer.control("<|user|>")]]]
    rows += [table[tokenizer.encode(p)] if isinstance(p, str) else visual_tokens(model, p) for p in pieces]
    return torch.cat([*rows, table[[tokenizer.control("<|assistant|>")]]])


@torch.no_grad()
@pytest.mark.parametrize("include_cls", [True, False])
def test_prompt_is_spliced_as_one_would_by_hand(make_vision_llama, pictures, logits_of, include_cls):
    model = make_vision_llama(include_cls=include_cls)
    assert model.visual.count == 4 + include_cls
    by_hand = embeddings_by_hand(model, "compare", pictures[0], "and", pictures[1], "now")
    expected = model.lm.logits(model.lm.hidden(by_hand[None]))

    content = [{"type": "text", "text": "compare"}, {"type": "image"}, {"type": "text", "text": "and"}]
    content += [{"type": "image"}, {"type": "text", "text": "now"}]
    prompt = model.prompts.build([{"role": "user", "content": content}], add_generation_prompt=True)
    embeddings = model.embed(torch.tensor([prompt.ids]), model.features(model.pixels(pictures[:2])))
    torch.testing.assert_close(embeddings[0], by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.lm.logits(model.lm.hidden(embeddings)), expected, atol=2e-5, rtol=1e-5)

    # generate() gets there from files and a text with marks.
    seen = logits_of(model.lm)
    model.generate([pictures[:2]], ["compare<image>and<image>now"], max_new_tokens=1)
    torch.testing.assert_close(seen[0], expected[:, -1], atol=2e-5, rtol=1e-5)


def test_pictures_are_seen_and_in_their_order(make_vision_llama, pictures, logits_of):
    model = make_vision_llama()
    seen = logits_of(model.lm)
    for images in (pictures[:2], pictures[1::-1], pictures[1:]):
        model.generate([images], ["what?"], max_new_tokens=1)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (seen[first] - seen[second]).abs().max() > 1e-3


@torch.no_grad()
def test_text_alone_is_answered_bit_for_bit_as_without_the_extension(make_llama, make_vision_llama, tokenizer):
    lm = make_llama()
    ids = torch.tensor([[1, 3, *tokenizer.encode("what is the color?"), 4]])
    logits = lm(ids)
    embeddings, length = lm.tok_embeddings(ids), torch.tensor([ids.shape[1]])
    answer = [token for (token,) in generate(lm, embeddings, length, Sampling(**LENGTH), stop_ids=(2,))]

    model = make_vision_llama(lm=lm)
    assert torch.equal(model.lm(ids), logits)
    spliced = model.embed(ids, torch.zeros(0, model.visual.count, model.encoder.dim))
    assert torch.equal(model.lm.logits(model.lm.hidden(spliced)), logits)
    assert answer and model.generate([[]], ["what is the color?"], **LENGTH) == [tokenizer.decode(answer)]


def test_only_the_projector_learns(make_vision_llama, pictures):
    model = make_vision_llama()
    prompt = model.prompts.build([user_message("what?", pictures[:2])], add_generation_prompt=True)
    embeddings = model.embed(torch.tensor([prompt.ids]), model.features(model.pixels(pictures[:2])))
    model.lm.logits(model.lm.hidden(embeddings))[0, -1].log_softmax(-1)[7].backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert len(with_gradient) == 5
    assert all(parameter.grad.any() for parameter in model.projector.parameters())
    assert model.projector.sentinels.grad.any(-1).all()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == with_gradient


def test_train_leaves_the_frozen_parts_in_eval(make_vision_llama):
    model = make_vision_llama()
    assert model.train() is model
    assert model.training and model.projector.training
    assert not any(module.training for part in (model.encoder, model.lm) for module in part.modules())
    assert not any(module.training for module in model.eval().modules())


def test_batch_answers_as_single_prompts_do(make_vision_llama, pictures):
    model = make_vision_llama()
    images = [pictures[0], [pictures[1], pictures[2]], [], pictures[0]]
    prompts = ["what is the color?", "compare <image> with <image>", "tell me of the triangle", "and <image>"]
    answers = model.generate(images, prompts, **LENGTH)
    assert len(answers) == 4 and len(set(answers)) == 4 and all(answers)
    for image, prompt, answer in zip(images, prompts, answers, strict=True):
        assert model.generate([image], [prompt], **LENGTH) == [answer]
    assert model.generate([], []) == []


def test_sampled_batch_answers_as_single_prompts_do(make_vision_llama, pictures):
    model = make_vision_llama()
    sampling = Sampling(temperature=1.0, seed=4, **LENGTH)
    answers = model.generate(pictures, ["what?"] * 3, sampling)
    assert answers == [model.generate([picture], ["what?"], sampling)[0] for picture in pictures]
    assert answers != model.generate(pictures, ["what?"] * 3, **LENGTH)


def test_every_kind_of_source_gives_the_same_answer(make_vision_llama, pictures, tmp_path):
    model = make_vision_llama()
    buffer = io.BytesIO()
    pictures[0].save(buffer, format="PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(buffer.getvalue())
    sources = [pictures[0], path, str(path), buffer.getvalue(), buffer]
    assert len(set(model.generate(sources, ["what?"] * 5, **LENGTH))) == 1


def test_picture_under_several_questions_is_encoded_once(make_vision_llama, pictures):
    model = make_vision_llama()
    batches = []
    handle = model.encoder.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    images = [pictures[0], pictures[0], [pictures[1], pictures[0]]]
    answers = model.generate(images, ["what?", "where?", "which?"], **LENGTH)
    handle.remove()
    assert batches == [2]
    assert answers[2] == model.generate([[pictures[1], pictures[0].copy()]], ["which?"], **LENGTH)[0]


def test_answer_ends_at_the_end_token_and_does_not_hold_it(make_vision_llama, pictures):
    model = make_vision_llama()
    end = model.tokenizer.control("<|end|>")
    whole = model.generate(pictures, ["what?"] * 3, **LENGTH)
    calls = []

    def end_in_the_fourth_step(module, inputs, output):
        calls.append(len(output))
        if len(calls) == 4:
            output[:, end] = 1e6

    handle = model.lm.output.register_forward_hook(end_in_the_fourth_step)
    answers = model.generate(pictures, ["what?"] * 3, **LENGTH)
    handle.remove()
    assert calls == [3] * 4
    assert answers == model.generate(pictures, ["what?"] * 3, max_new_tokens=3)
    assert all(answers) and answers != whole


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 1}])
def test_chat_and_stream_answer_as_generate_does(make_vision_llama, pictures, sampling):
    model = make_vision_llama()
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "what is that?"}]
    messages = [{"role": "user", "content": content}]
    (expected,) = model.generate([pictures[0]], ["what is that?"], max_new_tokens=30, **sampling)
    assert expected
    assert model.chat(messages, max_new_tokens=30, **sampling) == expected
    assert model.chat(messages, Sampling(max_new_tokens=30, **sampling)) == expected
    pieces = list(model.stream(messages, max_new_tokens=30, **sampling))
    assert "".join(pieces) == expected and len(pieces) > 1 and all(pieces)


@torch.no_grad()
def test_chat_sees_the_turns_before(make_vision_llama, pictures, logits_of):
    model = make_vision_llama()
    messages = [
        user_message("what?", pictures[:1]),
        {"role": "assistant", "content": "red circle"},
        user_message("and that?", pictures[1:2]),
    ]
    seen = logits_of(model.lm)
    model.chat(messages, max_new_tokens=1)
    table, tokenizer = model.lm.tok_embeddings.weight, model.tokenizer
    middle = table[[*tokenizer.encode("red circle"), tokenizer.control("<|end|>"), tokenizer.control("<|user|>")]]
    first = embeddings_by_hand(model, pictures[0], "what?")
    last = embeddings_by_hand(model, pictures[1], "and that?")[2:]
    expected = model.lm.logits(model.lm.hidden(torch.cat([first, middle, last])[None]))
    torch.testing.assert_close(seen[0], expected[:, -1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("what?", ["a", "b", "what?"]),
        ("<image><image>what?", ["a", "b", "what?"]),
        ("<image>\n<image>\nwhat?", ["a", "b", "what?"]),
        ("from <image> to <image>", ["from ", "a", " to ", "b"]),
        ("", ["a", "b"]),
    ],
)
def test_images_stand_where_their_marks_are_or_in_front(text, parts):
    message = user_message(text, ["a", "b"])
    assert message["role"] == "user"
    assert [part[part["type"]] for part in message["content"]] == parts
    assert [part["type"] for part in message["content"]] == ["image" if p in ("a", "b") else "text" for p in parts]


def test_images_and_marks_that_do_not_fit_are_refused(make_vision_llama, pictures):
    model = make_vision_llama()
    with pytest.raises(ValueError, match=r"^1 lists of images were given for 2 prompts; give one each$"):
        model.generate([pictures[0]], ["what?", "where?"])
    two = "2 image slots but 1 image was given; each <image> needs one file"
    with pytest.raises(ValueError, match=f"^prompt has {two}$"):
        model.generate([pictures[0]], ["<image> or <image>?"])
    with pytest.raises(ValueError, match=f"^prompt 2 has {two}$"):
        model.generate([pictures[0], pictures[1]], ["what?", "<image> or <image>?"])
    with pytest.raises(ValueError, match=r"^prompt has 1 image slot but 2 images were given"):
        model.generate([pictures[:2]], ["<image>?"])
    with pytest.raises(ValueError, match=r"^prompt has 1 image slot but 0 images were given"):
        model.chat([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}])


def test_broken_picture_and_unknown_option_are_refused(make_vision_llama, tmp_path):
    model = make_vision_llama()
    with pytest.raises(ImageError, match=re.escape(f"{tmp_path / 'none.png'}: there is no such file")):
        model.generate([tmp_path / "none.png"], ["what?"])
    with pytest.raises(TypeError, match="max_tokens"):
        model.generate([[]], ["what?"], max_tokens=3)
    with pytest.raises(TypeError, match="max_new_tokens"):
        model.generate([[]], ["what?"], Sampling(), max_new_tokens=3)  # which of the two would hold?


def test_prompt_too_long_for_the_decoder_is_refused_with_its_spliced_length(make_llama, make_vision_llama, pictures):
    model = make_vision_llama(lm=make_llama(max_seq_len=32))
    # begin, user, two blocks of 1 + 5 + 1, assistant
    with pytest.raises(ValueError, match=r"the prompt has 17 tokens and 16 new ones .* the model has 32 positions"):
        model.generate([pictures[:2]], [""], max_new_tokens=16)
    model.generate([pictures[:2]], [""], max_new_tokens=15)


@pytest.mark.parametrize(
    ("d_vision", "d_lm", "message"),
    [
        (33, 32, "the projector was made for width 33, but that of the encoder's features is 32"),
        (32, 31, "the projector was made for width 31, but that of the decoder is 32"),
    ],
)
def test_projector_of_other_widths_is_refused_with_both(make_vision_llama, d_vision, d_lm, message):
    model = make_vision_llama()
    projector = Projector(ProjectorConfig(d_vision=d_vision, d_lm=d_lm))
    with pytest.raises(ValueError, match=message):
        VisionLlama(model.encoder, projector, model.lm, model.tokenizer, TURNS)


@torch.no_grad()
def test_half_precision_decoder_takes_a_full_precision_projector(make_llama, make_vision_llama, pictures):
    model = make_vision_llama(lm=make_llama().bfloat16())
    model.encoder.bfloat16()
    assert len(model.generate(pictures, ["what?"] * 3, max_new_tokens=3)) == 3
    assert model.projector.linear_1.weight.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize(("image_size", "num_visual"), [(196, 197), (224, 257), (336, 577)])
def test_full_size_shape(tokenizer, image_size, num_visual):
    with torch.device("meta"):
        encoder = VisionEncoder(EncoderConfig(image_size=image_size, weights=None))
        projector = Projector(ProjectorConfig(d_vision=1024, d_lm=4096))
        model = VisionLlama(encoder, projector, Llama(LLAMA_7B), tokenizer, TURNS)
    assert model.visual.count == num_visual
    assert (model.visual.start, model.visual.end, model.visual.patch) == (32_000, 32_001, 32_002)
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert trainable.pop("projector.sentinels") == 8_192
    assert sum(trainable.values()) == 5_248_000
    assert sum(parameter.numel() for parameter in model.lm.parameters()) == 6_738_415_616

    prompt = model.prompts.build([user_message("what?", ["a", "b"])], add_generation_prompt=True)
    length = 2 + 2 * (num_visual + 2) + len(tokenizer.encode("what?")) + 1
    assert len(prompt.ids) == length
    ids = torch.tensor([prompt.ids], device="meta")
    features = model.features(torch.zeros(2, 3, image_size, image_size, device="meta"))
    assert features.shape == (2, num_visual, 1024)
    embeddings = model.embed(ids, features)
    assert embeddings.shape == (1, length, 4096)
    assert model.lm.logits(model.lm.hidden(embeddings)[:, -1]).shape == (1, 32_000)


@torch.inference_mode()
def test_text_alone_has_the_decoders_own_logits_to_the_bit(make_vision_llama):
    model = make_vision_llama()
    alone = Llama(model.lm.config).eval()
    alone.load_state_dict(model.lm.state_dict())
    ids = torch.randint(0, 320, (3, 40))
    expected = alone(ids)
    assert torch.equal(model(ids), expected)
    # And by the way of training, where rows with and without pictures share a batch.
    embeddings = model.embed(ids, torch.zeros(0, model.visual.count, model.projector.config.d_vision))
    assert torch.equal(model.lm.logits(model.lm.hidden(embeddings)), expected)


@torch.inference_mode()
def test_forward_is_the_splice_and_counts_pictures(make_vision_llama, pictures):
    model = make_vision_llama()
    rows = [
        model.prompts.build([user_message(text, [picture])]).ids for text, picture in zip("ab", pictures, strict=False)
    ]
    ids, pixels = torch.tensor(rows), model.pixels(pictures[:2])
    expected = model.lm.logits(model.lm.hidden(model.embed(ids, model.features(pixels))))
    assert torch.equal(model(ids, pixels), expected)
    with pytest.raises(ValueError, match="2 image slots but 1 image was given"):
        model(ids, pixels[:1])
    with pytest.raises(ValueError, match="2 image slots but 0 images were given"):
        model(ids)
    broken = ids.clone()
    broken[1, 5] = 7
    with pytest.raises(ValueError, match="row 2: "):
        model(broken, pixels)
