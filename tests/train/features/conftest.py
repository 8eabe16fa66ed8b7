"""A data set of small pictures, and a small vision transformer to encode it with."""

import io
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from visplice.lm.checkpoint import load_llama, save_llama
from visplice.lm.extension import EMBEDDED, embedded_folder
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_shards
from visplice.train.features.encode import EncodeConfig, encode
from visplice.vision.encoder import EncoderConfig, VisionEncoder

SMALL = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2}
PER_SHARD = 7
BROKEN = {5: ("empty-file", b""), 9: ("damaged-image", None), 18: ("not-an-image", b"no picture")}  # by number


def picture(number, side=48):
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def samples(count=20, broken=()):
    """Pictures of noise with one to three captions; those of the numbers in `broken` cannot be read."""
    for number in range(count):
        data = picture(number)
        if number in broken:
            data = data[:-200] if BROKEN[number][1] is None else BROKEN[number][1]
        texts = [f"a picture of the number {number}", "noise", "grey and coloured points"][: 1 + number % 3]
        yield Sample(key=f"p{number:03d}", images=(("png", data),), record={"captions": texts})


def config_of(data, out, encoder, **changes):
    return EncodeConfig(data=str(data), out=str(out), encoder=encoder, **{"lm": EMBEDDED, "batch_size": 4} | changes)


def save_vit(config, file, change=0.0):
    """Random weights of an encoder; the config that reads them."""
    torch.manual_seed(0)
    vit = VisionEncoder(replace(config, weights=None)).vit
    with torch.no_grad():
        vit.patch_embed.proj.weight[0, 0, 0, 0] += change
    save_file(vit.state_dict(), file)
    return replace(config, weights=str(file))


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def all_of(features):
    return [features.read(shard, slot) for shard, count in enumerate(features.counts) for slot in range(count)]


@pytest.fixture(scope="session")
def kit():
    """What the tests of encoding share."""
    return SimpleNamespace(
        samples=samples, picture=picture, config_of=config_of, save_vit=save_vit, content=content, all_of=all_of,
        per_shard=PER_SHARD, broken=BROKEN,
    )  # fmt: skip


@pytest.fixture(scope="session")
def small_vit(tmp_path_factory):
    """A small CLIP vision transformer whose weights lie in a file."""
    config = EncoderConfig(
        model="vit_base_patch16_clip_quickgelu_224", weights=None, image_size=32, resize="squash", overrides=SMALL
    )
    return save_vit(config, tmp_path_factory.mktemp("vit") / "vit.safetensors")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Three shards of 20 good pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    write_shards(samples(), folder, source={}, per_shard=PER_SHARD)
    return folder


@pytest.fixture(scope="session")
def encoded(small_vit, pictures, tmp_path_factory):
    """Their features with all tokens, made undisturbed."""
    out = tmp_path_factory.mktemp("features")
    encode(config_of(pictures, out, small_vit, tokens=True))
    return out


@pytest.fixture(scope="session")
def other_lm(tmp_path_factory):
    """The embedded LLaMA with one value of its table changed."""
    folder = tmp_path_factory.mktemp("lm")
    llama = load_llama(embedded_folder("lm"), dtype=torch.float32)
    with torch.no_grad():
        llama.tok_embeddings.weight[0, 0] += 1
    save_llama(llama, folder)
    shutil.copy(embedded_folder("lm") / "tokenizer.json", folder)
    return folder
