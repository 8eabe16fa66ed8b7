"""The embedded backbones and a few dozen training scenes, on which a stage trains in seconds."""

import random
from dataclasses import replace

import pytest

from visplice.lm.extension import EMBEDDED, embedded_folder
from visplice.lm.tokenizer import Tokenizer
from visplice.train.backbone_vision import VISION
from visplice.train.data.module import ShardData
from visplice.train.scene_data import write_training
from visplice.train.trainer import fit
from visplice.vision._torchvision import declare_missing_operators

declare_missing_operators()  # transformers, which writes checkpoints here, imports torchvision


@pytest.fixture(scope="session")
def encoder():
    """Config of the shipped vision transformer."""
    return replace(VISION, weights=EMBEDDED)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer that ships with the small LLaMA."""
    return Tokenizer.from_pretrained(embedded_folder("lm"))


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    """Shards of 48 training scenes with three questions each."""
    folder = tmp_path_factory.mktemp("scenes")
    write_training(folder, count=48, seed=0, questions=3)
    return folder


@pytest.fixture(scope="session")
def train():
    """Trains a stage on the CPU and writes its extension folder."""

    def run(module, folder, out, *, steps, batch_size=8):
        fit(module, ShardData(str(folder), batch_size=batch_size), out, max_steps=steps, seed=0, accelerator="cpu")

    return run


@pytest.fixture
def rng():
    return random.Random(0)
