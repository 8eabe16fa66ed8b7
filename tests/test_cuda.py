"""The same model on a CUDA device: logits, generation and a training step against the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visplice.lm.extension import EMBEDDED, load_extension
from visplice.train.backbone_vision import VISION
from visplice.train.data.module import ShardData
from visplice.train.instruct import Instruct
from visplice.train.scene_data import write_training
from visplice.train.trainer import fit

pytestmark = pytest.mark.gpu
PICTURE = Path(__file__).parents[1] / "app/assets/example_1.png"


def test_logits_equal_the_cpu() -> None:
    here, there = load_extension(EMBEDDED), load_extension(EMBEDDED, device="cuda")
    prompt = here.prompts.build([{"role": "user", "content": "<image>How many shapes are there?"}])
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        ours = here.lm.logits(here.lm.hidden(here.embed(ids, here.features(here.pixels([PICTURE])))))
        theirs = there.lm.logits(there.lm.hidden(there.embed(ids.cuda(), there.features(there.pixels([PICTURE])))))
    assert (ours - theirs.cpu()).abs().max() < 1e-2  # TF32 in the convolution


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_equal_the_cpu(dtype: torch.dtype) -> None:
    questions = ["How many shapes are there?", "Describe the picture."]
    here, there = load_extension(EMBEDDED), load_extension(EMBEDDED, device="cuda", dtype=dtype)
    images = [str(PICTURE)] * len(questions)
    assert there.generate(images, questions) == here.generate(images, questions)


def test_seed_repeats_what_is_drawn() -> None:
    model = load_extension(EMBEDDED, device="cuda")
    drawn = {model.generate([PICTURE], ["Describe the picture."], temperature=1.5, seed=3)[0] for _ in range(3)}
    assert len(drawn) == 1


def test_stage_2_trains(tmp_path: Path) -> None:
    write_training(tmp_path / "data", count=32, seed=0, questions=3)
    module = Instruct(replace(VISION, weights=EMBEDDED), EMBEDDED, hidden=32)
    data = ShardData(str(tmp_path / "data"), batch_size=8)
    fit(module, data, tmp_path / "out", max_steps=3, seed=0, accelerator="gpu", precision="bf16-mixed")
    assert load_extension(tmp_path / "out").projector.config.hidden == 32
