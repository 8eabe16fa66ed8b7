"""Parts small enough to be built in every test: random decoders, a byte-level tokenizer, and a model that sees."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from visplice.lm.config import LlamaConfig
from visplice.lm.decoder import Llama
from visplice.lm.prompt import TURNS
from visplice.lm.tokenizer import Tokenizer
from visplice.lm.vision_llama import VisionLlama
from visplice.projector.mlp import Projector, ProjectorConfig
from visplice.vision._torchvision import declare_missing_operators
from visplice.vision.encoder import EncoderConfig, VisionEncoder

declare_missing_operators()  # transformers, which the decoder is compared with, imports torchvision

CONTROLS = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
SHAPE = {"vocab_size": 324, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def randomise(module):
    """Fresh weights leave norms at one and attention nearly even, where a mix-up would not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    return module


@pytest.fixture(scope="session", name="randomise")
def randomise_fixture():
    return randomise


@pytest.fixture
def make_llama():
    """Builds a small decoder with random weights; keyword arguments change its config."""

    def make(**changes):
        return randomise(Llama(LlamaConfig(**SHAPE | {"max_seq_len": 128} | changes))).eval()

    return make


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE of 320 ids built as `train.backbones.build_tokenizer` builds the embedded one."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=CONTROLS,
        show_progress=False,
    )
    text = "what is the color of the small red circle and where is the large blue square near the yellow triangle"
    backend.train_from_iterator([text] * 20, trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(file))
    assert backend.get_vocab_size() == 320
    return file


@pytest.fixture
def tokenizer(tokenizer_file):
    return Tokenizer(tokenizer_file)


@pytest.fixture
def make_vision_llama(make_llama, tokenizer):
    """Builds a small model that sees 28 x 28 pixels as CLS and four patches; keyword arguments change the encoder."""

    def make(*, lm=None, **changes):
        config = EncoderConfig(
            **{"model": "vit_large_patch14_clip_quickgelu_224", "image_size": 28, "weights": None, "overrides": VIT}
            | changes
        )
        if lm is None:
            lm = make_llama()
            with torch.no_grad():  # hardly ever says a control token, so that answers are long
                lm.output.weight[: len(CONTROLS)] = 0
        projector = randomise(Projector(ProjectorConfig(d_vision=32, d_lm=lm.config.dim, hidden=24)))
        return VisionLlama(randomise(VisionEncoder(config)), projector, lm, tokenizer, TURNS)

    return make


@pytest.fixture(scope="session")
def pictures():
    """Three pictures of noise, which no two features confuse."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture
def logits_of():
    """Records what a decoder's head puts out: one entry a call."""
    handles = []

    def record(model):
        seen = []
        handles.append(model.output.register_forward_hook(lambda module, inputs, output: seen.append(output.clone())))
        return seen

    yield record
    for handle in handles:
        handle.remove()
