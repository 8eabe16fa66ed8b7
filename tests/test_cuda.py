"""The same model on a CUDA device: logits, generation and a training step against the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visplice.lm.checkpoint import save_llama
from visplice.lm.config import LlamaConfig, RopeScaling
from visplice.lm.decoder import Llama
from visplice.lm.extension import EMBEDDED, embedded_folder, load_extension
from visplice.train.backbone_vision import VISION
from visplice.train.data.module import ShardData
from visplice.train.evaluate.run import EvalConfig, evaluate
from visplice.train.grid_align import align_symbols
from visplice.train.grid_tables import load_symbols
from visplice.train.instruct import Instruct
from visplice.train.optim import OptimConfig
from visplice.train.scene_data import ANNOTATIONS_FILE, QUESTIONS_FILE, write_test, write_training
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


def test_a_benchmark_is_answered_as_on_the_cpu(tmp_path: Path) -> None:
    write_test(tmp_path / "data", count=24, seed=3, questions=3)
    found = []
    for device, size in (("cpu", 32), ("cuda", 1), ("cuda", 32)):
        out = tmp_path / f"{device}-{size}"
        evaluate(
            EvalConfig(
                task="vqav2",
                model=EMBEDDED,
                questions=str(tmp_path / "data" / QUESTIONS_FILE),
                annotations=str(tmp_path / "data" / ANNOTATIONS_FILE),
                images=str(tmp_path / "data/images"),
                out=str(out),
                blind=("shuffled",),
                batch_size=size,
                features=str(tmp_path / f"features-{device}"),
                device=device,
            )
        )
        found.append((out / "predictions.jsonl").read_bytes())
    assert len(set(found)) == 1


def test_patches_are_aligned_with_symbols() -> None:
    here, there = (
        align_symbols(
            load_extension(EMBEDDED, device=device),
            load_symbols(embedded_folder("lm")),
            steps=3,
            batch=4,
            seed=0,
            optim=OptimConfig(lr=1e-5),
        )
        for device in ("cpu", "cuda")
    )
    assert there == pytest.approx(here, rel=1e-2)


def test_stage_2_trains(tmp_path: Path) -> None:
    write_training(tmp_path / "data", count=32, seed=0, questions=3)
    module = Instruct(replace(VISION, weights=EMBEDDED), EMBEDDED, hidden=32)
    data = ShardData(str(tmp_path / "data"), batch_size=8)
    fit(module, data, tmp_path / "out", max_steps=3, seed=0, accelerator="gpu", precision="bf16-mixed")
    assert load_extension(tmp_path / "out").projector.config.hidden == 32


FAMILY = {
    "dense": LlamaConfig(vocab_size=96, dim=64, num_layers=2, num_heads=8, num_kv_heads=2, ffn_dim=128),
    "sparse": LlamaConfig(
        vocab_size=96, dim=64, num_layers=4, num_heads=8, num_kv_heads=2, ffn_dim=128, num_experts=4, expert_dim=64,
        moe_layers=(1, 3), nope_layers=(3,), attention_chunk=16, qk_norm=True, temperature_floor=8,
        rope=RopeScaling(kind="llama3", factor=16.0, high_freq_factor=1.0),
    ),
}  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("member", FAMILY)
def test_family_has_the_logits_and_tokens_of_the_cpu(member: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Llama(FAMILY[member])
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5 + (parameter.ndim == 1))
    save_llama(model, tmp_path)
    here, there = Llama.from_pretrained(tmp_path), Llama.from_pretrained(tmp_path, device="cuda")
    ids = torch.randint(0, 96, (2, 50))
    assert (here(ids) - there(ids.cuda()).cpu()).abs().max() < 1e-3
    assert torch.equal(here.generate(ids, max_new_tokens=40), there.generate(ids.cuda(), max_new_tokens=40).cpu())
    half = Llama.from_pretrained(tmp_path, device="cuda", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(ids.cuda()).isfinite().all()
