"""Answers to a folder of questions: the right answer under the right id, whatever shares its batch."""

import json

import pytest
import torch

from visplice.lm.extension import EMBEDDED, load_backbones
from visplice.lm.prompt import TURNS
from visplice.lm.vision_llama import VisionLlama
from visplice.projector.mlp import Projector, ProjectorConfig, rms
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_shards
from visplice.train.embedded_answers import (
    VqaSet,
    answer_when_broken,
    answer_with_images,
    answer_with_words,
    encode_images,
    most_frequent_answers,
)
from visplice.train.scene_data import ANNOTATIONS_FILE, QUESTIONS_FILE, write_test

SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa")
    write_test(folder, count=5, seed=0, questions=3)
    return VqaSet.read(folder)


@pytest.fixture(scope="module")
def seeing(encoder, vqa):
    """The embedded backbones around a fresh projector, and the features of the test pictures."""
    torch.manual_seed(0)
    vision, llama, tokenizer = load_backbones(encoder, EMBEDDED)
    projector = Projector(ProjectorConfig(d_vision=vision.dim, d_lm=llama.config.dim, hidden=64))
    model = VisionLlama(vision, projector, llama, tokenizer, TURNS)
    features = encode_images(model, [vqa.image_path(image_id) for image_id in vqa.image_ids], batch=2)
    projector.calibrate(features, rms(llama.tok_embeddings.weight))
    return model, features


def test_set_is_read_as_it_was_written(vqa):
    assert vqa.questions == json.loads((vqa.folder / QUESTIONS_FILE).read_text())["questions"]
    assert vqa.annotations == json.loads((vqa.folder / ANNOTATIONS_FILE).read_text())["annotations"]
    assert vqa.image_ids == [0, 1, 2, 3, 4] and vqa.notes.keys() == set("01234")
    assert all(vqa.image_path(image_id).is_file() for image_id in vqa.image_ids)


def test_missing_set_is_an_os_error_with_its_name(tmp_path):
    with pytest.raises(OSError, match=QUESTIONS_FILE):
        VqaSet.read(tmp_path)


def test_features_come_in_the_order_of_the_files(seeing, vqa):
    model, features = seeing
    for row, image_id in enumerate(vqa.image_ids):
        alone = model.features(model.pixels([vqa.image_path(image_id)]))[0]
        torch.testing.assert_close(features[row], alone, atol=1e-4, rtol=1e-4)


def test_every_question_is_answered_as_if_it_were_asked_alone(seeing, vqa):
    model, features = seeing
    answers = answer_with_images(model, vqa, features)
    assert list(answers) == [question["question_id"] for question in vqa.questions]
    for question in vqa.questions:
        (alone,) = model.generate([vqa.image_path(question["image_id"])], [question["question"]], **SHORT)
        assert answers[question["question_id"]] == alone, question
    assert len(set(answers.values())) > 1


@pytest.mark.parametrize("batch", [1, 4])
def test_answers_do_not_depend_on_the_batch(seeing, vqa, batch):
    model, features = seeing
    assert answer_with_images(model, vqa, features, batch=batch) == answer_with_images(model, vqa, features)


def test_answers_come_from_the_features_that_are_given(seeing, vqa):
    model, features = seeing
    moved = answer_with_images(model, vqa, features.roll(1, 0))
    for question in vqa.questions:
        other = vqa.image_path((question["image_id"] - 1) % 5)
        (alone,) = model.generate([other], [question["question"]], **SHORT)
        assert moved[question["question_id"]] == alone, question


def test_words_stand_where_the_picture_would(seeing, vqa):
    model, _ = seeing
    answers = answer_with_words(model, vqa, batch=4)
    assert list(answers) == [question["question_id"] for question in vqa.questions]
    assert all(answers.values())
    for question in vqa.questions[::4]:
        texts = (vqa.notes[str(question["image_id"])]["description"], question["question"])
        message = {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}
        assert answers[question["question_id"]] == model.chat([message], **SHORT)


def test_most_frequent_answers_by_hand(tmp_path):
    def sample(key, *turns):
        conversation = []
        for question, answer in turns:
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return Sample(key=key, images=(("png", b""),), record={"conversations": conversation})

    samples = [
        sample("a", ("<image>\nHow many?", "2"), ("What color?", "red")),
        sample("b", ("<image>\nHow many?", "3"), ("What color?", "blue")),
        sample("c", ("<image>\nWhat color?", "blue"), ("How many?", "3"), ("Is there?", "3")),
        sample("d", ("<image>\nIs there?", "yes")),
        sample("e", ("<image>\nIs there?", "yes")),
    ]
    write_shards(samples, tmp_path, source={}, per_shard=3)
    shards = sorted(tmp_path.glob("shard-*.tar"))
    assert len(shards) == 2
    asked = ["What color?", "How many?", "Is there?", "Where?"]
    questions = [{"image_id": 0, "question": text, "question_id": 10 + n} for n, text in enumerate(asked)]
    answers = most_frequent_answers(shards, VqaSet(tmp_path, questions, [], {}))
    assert answers == {10: "blue", 11: "3", 12: "yes", 13: "3"}  # 3 was said three times in all


def test_broken_parts_answer_otherwise_and_the_model_is_whole_afterwards(seeing, vqa):
    model, features = seeing
    before = {name: tensor.clone() for name, tensor in model.projector.state_dict().items()}
    answers = answer_when_broken(model, vqa, features)
    assert set(answers) == {"features shuffled between pictures", "projector zeroed"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.projector.state_dict().items())
    none = torch.zeros_like(features)  # a projector that says nothing says the same of every picture
    with torch.no_grad():
        model.projector.linear_2.weight.zero_()
        model.projector.linear_2.bias.zero_()
    try:
        assert answers["projector zeroed"] == answer_with_images(model, vqa, none)
    finally:
        model.projector.load_state_dict(before)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    assert answers["features shuffled between pictures"] == answer_with_images(model, vqa, features[order])
    assert order.tolist() != sorted(order.tolist())
