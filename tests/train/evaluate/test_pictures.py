"""Features of pictures: each encoded once, kept on disk where asked, and one bad picture costs itself alone."""

import shutil

import pytest
import torch

from visplice.train.evaluate.pictures import FeatureStore, Pictures
from visplice.vision.image import ImageError


@pytest.fixture
def folder(scenes, tmp_path):
    """Five pictures."""
    images = tmp_path / "images"
    images.mkdir()
    for number, file in enumerate(sorted((scenes / "images").iterdir())[:5]):
        shutil.copy(file, images / f"{number}.png")
    return images


NAMES = [f"{number}.png" for number in range(5)]


def pictures(model, folder, store=None, batch=2):
    return Pictures(model, folder, workers=2, batch=batch, store=store)


def expected(model, folder):
    with torch.inference_mode():
        return [model.features(model.pixels([folder / name]))[0] for name in NAMES]


def test_features_come_in_order_and_are_those_of_the_model(model, folder):
    source = pictures(model, folder)
    for found, own in zip(source.features(NAMES), expected(model, folder), strict=True):
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    assert source.num_encoded == 5
    assert len(list(source.features(NAMES[::-1]))) == 5
    assert source.num_encoded == 5  # a second look needs no encoder


def test_a_store_gives_the_same_bits_to_another_run(model, folder, tmp_path):
    store = tmp_path / "features"
    first = list(pictures(model, folder, FeatureStore(store, model)).features(NAMES))
    again = pictures(model, folder, FeatureStore(store, model))
    assert all(map(torch.equal, again.features(NAMES), first))
    assert again.num_encoded == 0
    shutil.copy(folder / "1.png", folder / "0.png")  # a picture that changed
    shutil.copy(folder / "2.png", folder / "3.png")
    changed = pictures(model, folder, FeatureStore(store, model))
    assert torch.equal(next(iter(changed.features(["0.png"]))), first[1])
    for file in store.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])  # not whole
    mended = pictures(model, folder, FeatureStore(store, model))
    torch.testing.assert_close(next(iter(mended.features(["4.png"]))), first[4], atol=1e-5, rtol=1e-5)
    assert mended.num_encoded == 1


def test_a_broken_and_a_missing_picture_cost_themselves_alone(model, folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    (folder / "3.png").unlink()
    found = list(pictures(model, folder).features(NAMES))
    assert [isinstance(one, ImageError) for one in found] == [False, True, False, True, False]
    assert "cannot be read (No such file" in str(found[3])


def test_a_blank_picture_shows_nothing(model, folder):
    blank = pictures(model, folder).blank()
    assert blank.shape == (model.visual.count, model.encoder.dim)
    torch.testing.assert_close(blank, model.features(torch.zeros(1, 3, 112, 112))[0])
