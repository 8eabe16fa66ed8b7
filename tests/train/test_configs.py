"""Every shipped YAML against the code: it parses, what it asks for exists, and what it says of memory is so."""

import re
from pathlib import Path

import lightning as L
import pytest
import yaml

from visplice.app.demo import ENCODER, Plan
from visplice.lm.config import FAMILY
from visplice.train.align import Align
from visplice.train.cli import run
from visplice.train.instruct import Instruct
from visplice.vision.encoder import EncoderConfig, build_vit

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
SHAPES = {
    "llama-3.2-1b": "LLaMA 3.2 1B",
    "llama-2-7b": "LLaMA 2 7B",
    "llama-3.1-8b": "LLaMA 3.1 8B",
    "llama-3.3-70b": "LLaMA 3.1 or 3.3 70B",
}


class Loading(Exception):
    """The weights would be loaded now."""


def parsed(stage, arguments, monkeypatch):
    """What the command line hands to the stage and the trainer, up to the loading of weights."""
    seen = {}

    def init(self, encoder, lm, **options):
        seen.update(encoder=encoder, lm=lm, **options)
        raise Loading

    def backbones(encoder, lm, **options):
        seen.update(encoder=encoder, lm=lm, **options)
        raise Loading

    monkeypatch.setattr(f"visplice.train.{stage}.load_backbones", backbones)
    with pytest.raises(Loading):
        run(stage, arguments)
    return seen


def stage_of(file):
    return file.name.split(".")[0].split("-")[0]


def test_there_is_one_for_each_stage_and_llama():
    names = {file.stem for file in FILES}
    assert names == {stage + end for stage in ("align", "instruct") for end in ("", *(f"-{name}" for name in SHAPES))}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_is_what_the_command_line_takes(file, scenes_folder, tmp_path, monkeypatch):
    raw, stage = yaml.safe_load(file.read_text()), stage_of(file)
    arguments = ["fit", "--config", str(file), "--data.path", str(scenes_folder), "--out", str(tmp_path)]
    seen = parsed(stage, arguments, monkeypatch)
    assert seen["lm"] == raw["model"]["lm"]
    assert seen["encoder"] == EncoderConfig(**raw["model"]["encoder"])  # nothing of the shipped default is left in it
    if stage == "instruct":
        assert seen["quantise"] == raw["model"].get("quantise")
    known = (Align if stage == "align" else Instruct).__init__.__code__.co_varnames
    assert set(raw["model"]) <= set(known)
    L.Trainer(**raw["trainer"] | {"accelerator": "cpu", "logger": False, "enable_checkpointing": False})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_header_says_what_is_needed_and_its_launch_line_names_the_file(file):
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    labels = [match[1] for line in header if (match := re.match(r"# (\w+): ", line))]
    embedded = file.stem in ("align", "instruct")
    assert labels[:3] == ["Needs", "Run", "Change"] and labels[-1] == "Time"
    (launch,) = (line for line in header if line.startswith("# Run:"))
    assert launch.split()[2:5] == ["visplice", stage_of(file), "fit"]
    assert embedded or f"--config train/configs/{file.name}" in launch
    assert embedded or "not measured" in header[-1]


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_change_of_the_header_parses(stage, scenes_folder, tmp_path, monkeypatch):
    for file in FILES:
        if stage_of(file) != stage:
            continue
        (line,) = (line for line in file.read_text().splitlines() if line.startswith("# Change:"))
        words = line.removeprefix("# Change:").split(",")[0].split(" #")[0].split()
        assert words[0].startswith("--") and len(words) % 2 == 0
        arguments = ["fit", "--config", str(file), "--data.path", str(scenes_folder), "--out", str(tmp_path), *words]
        parsed(stage, arguments, monkeypatch)


@pytest.mark.parametrize("name", SHAPES)
def test_encoder_exists_and_the_memory_stated_is_that_of_the_shapes(name):
    file = CONFIGS / f"instruct-{name}.yaml"
    model, shape = yaml.safe_load(file.read_text())["model"], FAMILY[SHAPES[name]]
    vit = build_vit(EncoderConfig(**model["encoder"] | {"weights": None, "overrides": {"depth": 1}}))
    assert vit.embed_dim == 1024 and EncoderConfig(**model["encoder"]).image_size % vit.patch_embed.patch_size[0] == 0
    text = " ".join(line.removeprefix("#").strip() for line in file.read_text().splitlines() if line.startswith("#"))
    found = re.search(r"computed: weights(?: in 4 bits)? ([\d.]+) GB, ([\d.]+) MB for each of up to ([\d,]+) tok", text)
    assert found is not None
    tables = (1 if shape.tie_embeddings else 2) * shape.vocab_size * shape.dim
    whole = 2 * shape.num_parameters
    in_bits = 2 * tables + (shape.num_parameters - tables) * (1 / 2 + 2 / 64)
    vision = 2 * 303e6
    assert float(found[1]) == pytest.approx(((in_bits if model["quantise"] else whole) + vision) / 1e9, abs=0.1)
    if other := re.search(r"In 4 bits, as below, the weights are ([\d.]+) GB", text):
        assert float(other[1]) == pytest.approx((in_bits + vision) / 1e9, abs=0.1)
    # bfloat16: the stream at every layer; or inputs of both norms, queries, keys, values, their sum, and two of ffn.
    heads, pairs = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    kept = shape.dim if model["checkpointing"] else 2 * (shape.dim + heads + pairs + shape.ffn_dim)
    assert float(found[2]) == pytest.approx(2 * shape.num_layers * kept / 1e6, rel=0.02)
    data = yaml.safe_load(file.read_text())["data"]
    assert int(found[3].replace(",", "")) == data["batch_size"] * model["max_length"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--model.tune.lm_lora.rnk", "2"], "rnk"),
        (["--model.quantize", "nf4"], "quantize"),
        (["--model.tune.projector_lora.rank", "0"], r"lora\.rank is 0; it is at least 1"),
    ],
)
def test_misspelt_key_or_impossible_value_is_refused(flag, message, scenes_folder, tmp_path, capsys):
    arguments = ["fit", "--data.path", str(scenes_folder), "--out", str(tmp_path), *flag]
    with pytest.raises((SystemExit, ValueError)) as caught:
        run("instruct", arguments)
    assert re.search(message, capsys.readouterr().err + str(caught.value))


def test_what_learns_is_chosen_by_flags(scenes_folder, tmp_path, monkeypatch):
    chosen = {}
    monkeypatch.setattr("visplice.train.instruct.TuneConfig.check", lambda self, **_: chosen.update(tune=self))
    flags = ["--model.tune.projector_lora.rank", "4", "--model.tune.lm_lora.rank", "16", "--model.tune.lm_lr", "1e-4"]
    flags += ["--model.tune.lm_lora.targets", "[wq, wv]"]
    arguments = ["fit", "--data.path", str(scenes_folder), "--out", str(tmp_path), *flags]
    parsed("instruct", arguments, monkeypatch)
    tune = chosen["tune"]
    assert (tune.projector_lora.rank, tune.projector_lora.targets) == (4, ("linear_1", "linear_2"))
    assert (tune.lm_lora.rank, tune.lm_lora.targets, tune.lm_lr) == (16, ("wq", "wv"), 1e-4)


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_embedded_task_is_trained_as_in_the_demo(stage):
    config, plan = yaml.safe_load((CONFIGS / f"{stage}.yaml").read_text()), vars(Plan())
    assert config["trainer"]["max_steps"] == plan[f"{stage}_steps"]
    assert config["data"]["batch_size"] == plan[f"{stage}_batch"]
    assert config["model"]["hidden"] == plan["hidden"]
    if stage == "align":  # the demo's stage 2 begins with a projector that reads already, and takes smaller steps
        assert config["model"]["optim"]["lr"] == plan["align_lr"]
    assert EncoderConfig(**config["model"]["encoder"]) == ENCODER
