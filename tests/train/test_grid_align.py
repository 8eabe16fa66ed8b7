"""The projector learns the symbols of the LLaMA from training pictures alone, and nothing else moves."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from visplice.lm.extension import EMBEDDED, embedded_folder, load_backbones
from visplice.lm.prompt import TURNS
from visplice.lm.vision_llama import VisionLlama
from visplice.projector.mlp import Projector, ProjectorConfig
from visplice.train import slips
from visplice.train.backbone_vision import VISION
from visplice.train.grid_align import align_symbols, pictures
from visplice.train.grid_batches import TABLES
from visplice.train.grid_tables import load_symbols
from visplice.train.optim import OptimConfig
from visplice.train.slip_heads import DENSE
from visplice.train.stage import checksum


@pytest.fixture
def model() -> VisionLlama:
    torch.manual_seed(0)
    vision, llama, tokenizer = load_backbones(replace(VISION, weights=EMBEDDED), EMBEDDED)
    projector = Projector(ProjectorConfig(d_vision=vision.dim, d_lm=llama.config.dim, hidden=64))
    return VisionLlama(vision, projector, llama, tokenizer, TURNS)


def test_half_of_the_pictures_are_slips_with_their_grids() -> None:
    drawn, grids, wholes = next(pictures(0, 8))
    assert drawn.shape == (8, 112, 112, 3) and grids.shape == (8, 64, len(TABLES))
    assert wholes[:4].tolist() == [0] * 4 and all(wholes[4:] > 0)
    assert grids[:4, :, : len(DENSE)].flatten(1).any(1).all() and not grids[:4, :, len(DENSE) :].any()
    assert grids[4:, :, len(DENSE) :].flatten(1).any(1).all() and not grids[4:, :, : len(DENSE)].any()


def test_no_held_out_word_or_number_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    splits, sample = [], slips.sample_slip

    def recorded(rng, split, **options):  # type: ignore[no-untyped-def]
        splits.append(split)
        return sample(rng, split, **options)

    monkeypatch.setattr(slips, "sample_slip", recorded)
    list(islice(pictures(0, 4), 3))
    assert splits == ["train"] * 6


def test_tokens_come_nearer_to_the_symbols_and_the_backbones_stay(model: VisionLlama) -> None:
    before = checksum(model.encoder), checksum(model.lm)
    symbols = load_symbols(embedded_folder("lm"))
    sums = checksum(symbols)
    losses = align_symbols(model, symbols, steps=20, batch=4, seed=0, optim=OptimConfig(lr=3e-3))
    assert len(losses) == 20 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert (checksum(model.encoder), checksum(model.lm)) == before and checksum(symbols) == sums


def test_folder_without_symbols_is_an_error_that_names_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OSError, match=r"symbols\.safetensors"):
        load_symbols(tmp_path)


def test_symbols_are_made_on_the_device_of_the_grid() -> None:
    # On the meta device a tensor of another device in between is an error, as it is on a GPU.
    symbols = load_symbols(embedded_folder("lm")).to("meta")
    _, grids, wholes = next(pictures(0, 2))
    assert symbols(grids.to("meta"), wholes.to("meta")).device.type == "meta"
