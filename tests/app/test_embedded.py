"""The shipped model on fresh test scenes and slips: it reads, it sees, and it does not when a part is broken."""

from pathlib import Path

import pytest
import torch

from visplice.lm.extension import EMBEDDED, load_extension
from visplice.lm.vision_llama import VisionLlama
from visplice.train import slip_data, vqa_metric
from visplice.train.embedded_answers import DocSet, VqaSet, answer_with_images, answer_with_words, encode_images
from visplice.train.scene_data import write_test


@pytest.fixture(scope="module")
def model() -> VisionLlama:
    return load_extension(EMBEDDED)


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> VqaSet:
    folder = tmp_path_factory.mktemp("test")
    write_test(folder, count=100, seed=4321)  # the demo's scenes come from other seeds
    return VqaSet.read(folder)


@pytest.fixture(scope="module")
def features(model: VisionLlama, vqa: VqaSet) -> torch.Tensor:
    return encode_images(model, [vqa.image_path(i) for i in vqa.image_ids])


def accuracy(vqa: VqaSet, answers: dict[int, str]) -> float:
    return vqa_metric.evaluate(vqa.annotations, answers).accuracy


def test_llama_alone_answers_when_the_scene_is_given_in_words(model: VisionLlama, vqa: VqaSet) -> None:
    assert accuracy(vqa, answer_with_words(model, vqa)) > 0.95


def test_model_answers_from_the_picture(model: VisionLlama, vqa: VqaSet, features: torch.Tensor) -> None:
    assert accuracy(vqa, answer_with_images(model, vqa, features)) > 0.85


def test_another_picture_leaves_no_more_than_guessing(model: VisionLlama, vqa: VqaSet, features: torch.Tensor) -> None:
    assert accuracy(vqa, answer_with_images(model, vqa, features.roll(1, 0))) < 0.55


def test_zeroed_projector_leaves_no_more_than_guessing(vqa: VqaSet, features: torch.Tensor) -> None:
    broken = load_extension(EMBEDDED)
    torch.nn.init.zeros_(broken.projector.linear_2.weight)
    torch.nn.init.zeros_(broken.projector.linear_2.bias)
    assert accuracy(vqa, answer_with_images(broken, vqa, features)) < 0.55


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> DocSet:
    folder = tmp_path_factory.mktemp("slips")
    slip_data.write_test(folder, count=60, seed=4321)
    return DocSet.read(folder)


@pytest.fixture(scope="module")
def slip_features(model: VisionLlama, docs: DocSet) -> torch.Tensor:
    return encode_images(model, [docs.image_path(i) for i in docs.image_ids])


def test_model_reads_words_and_numbers_that_it_never_saw(
    model: VisionLlama, docs: DocSet, slip_features: torch.Tensor
) -> None:
    assert docs.score(answer_with_images(model, docs, slip_features)).value > 0.6


def test_another_slip_leaves_no_more_than_guessing(
    model: VisionLlama, docs: DocSet, slip_features: torch.Tensor
) -> None:
    assert docs.score(answer_with_images(model, docs, slip_features.roll(1, 0))).value < 0.2


def test_shipped_projector_belongs_to_the_shipped_backbones_and_is_small() -> None:
    weights = Path(__file__).parents[2]
    assert (weights / "vision/weights/encoder.safetensors").stat().st_size <= 6_000_000
    assert (weights / "lm/weights/model.safetensors").stat().st_size <= 12_000_000
    model = load_extension(EMBEDDED)  # refuses other backbones by their fingerprints
    assert model.lm.config.dim >= model.projector.config.hidden
    assert 64 <= model.encoder.num_patches <= 100


@pytest.mark.parametrize("batch", [1, 7])
def test_answers_do_not_depend_on_the_batch(
    model: VisionLlama, vqa: VqaSet, features: torch.Tensor, batch: int
) -> None:
    few = VqaSet(vqa.folder, vqa.questions[:40], vqa.annotations[:40], vqa.notes)
    chosen = features[: len(few.image_ids)]
    assert answer_with_images(model, few, chosen, batch=batch) == answer_with_images(model, few, chosen)
