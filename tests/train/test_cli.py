"""`visplice align` and `visplice instruct`: what a run leaves, how it goes on, and what it refuses in one line."""

import csv
import shutil
import sys
from unittest import mock

import filelock
import pytest
import yaml
from safetensors.torch import load_file, save_file

from visplice.app.cli import main
from visplice.lm.extension import embedded_folder, load_extension
from visplice.train.checkpoint import checkpoints, read
from visplice.train.cli import StageCLI
from visplice.train.logs import loggers

STEPS = 7
RUNS = {
    "align": ["--model.hidden", "16"],
    "align with captions": ["--model.hidden", "16", "--model.caption_weight", "0.5"],
    "instruct": ["--model.hidden", "16", "--data.batch_size", "1", "--trainer.accumulate_grad_batches", "2"],
    "instruct in bfloat16": ["--model.hidden", "16", "--data.batch_size", "2", "--dtype", "bfloat16"],
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The speed of the machine is measured elsewhere."""
    with mock.patch("visplice.train.throughput.measured_peak", lambda *_: 1e11):
        yield


@pytest.fixture(scope="module")
def go(scenes_folder):
    """Runs a stage on 48 scenes; returns the exit status."""

    def run(stage, out, *words, verb="fit", data=scenes_folder):
        fixed = ["--data.path", str(data), "--data.batch_size", "4", "--device", "cpu"]
        if verb == "fit":
            fixed += ["--trainer.max_steps", str(STEPS), "--checkpoint_every", "3", "--trainer.log_every_n_steps", "1"]
        return main([stage, verb, *fixed, "--out", str(out), *words])

    return run


@pytest.fixture(scope="module")
def straight(go, tmp_path_factory):
    """A run of every kind that nobody disturbed."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            assert go(kind.split()[0], made[kind], *RUNS[kind]) == 0
        return made[kind]

    return run


def copy_of(out, tmp_path, *, behind=STEPS):
    """The folder as it was when the checkpoint behind a step was the newest and no extension was written."""
    shutil.copytree(out, tmp_path / "run")
    for file in checkpoints(tmp_path / "run"):
        if read(file)["global_step"] > behind:
            file.unlink()
    for name in ("projector.safetensors", "visplice.json", "config.yaml"):
        (tmp_path / "run" / name).unlink()
    return tmp_path / "run"


def curves(out):
    with open(out / "logs" / "metrics.csv", newline="") as file:
        return [{n: v for n, v in row.items() if not n.startswith("speed/")} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("kind", "behind"), [*((kind, 6) for kind in RUNS), ("align", STEPS)])
def test_resumed_run_ends_with_the_same_bytes(go, straight, tmp_path, kind, behind, capfd):
    final = straight(kind)
    out = copy_of(final, tmp_path, behind=behind)
    assert go(kind.split()[0], out, *RUNS[kind], "--resume", "auto") == 0
    assert (out / "projector.safetensors").read_bytes() == (final / "projector.safetensors").read_bytes()
    assert curves(out) == curves(final) and len(curves(out)) == STEPS
    assert f"going on from {out}/checkpoints/step-{behind:09d}.ckpt, behind step {behind}\n" in capfd.readouterr().out


def test_run_says_what_matters_and_no_more(go, tmp_path, capfd):
    assert go("align", tmp_path, *RUNS["align"], "--model.optim.lr", "1e-3") == 0
    out, err = capfd.readouterr()
    lines = [line.split("\r")[-1] for line in (out + err).strip().split("\n")]
    assert lines[0].endswith("trainable parameters, 5,863,168 frozen")  # the sentinels wait for stage 2
    assert lines[-1] == f"wrote {tmp_path / 'visplice.json'}"
    bar = lines[-2]
    assert "align: 100%" in bar and all(word in bar for word in ("loss=", "img/s=", "tok/s=", "GB=", "peak="))
    assert not any(word in out + err for word in ("weights_only", "v_num", "Warning", "GPU available", "LOCAL_RANK"))


def test_resolved_config_lies_in_the_folder_and_in_every_checkpoint(go, straight, tmp_path):
    out = straight("align")
    text = (out / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["model"]["hidden"] == 16 and config["trainer"]["max_steps"] == STEPS
    assert config["model"]["optim"]["warmup"] == 0.03  # a default that nobody named
    assert [read(file)["visplice"]["config"] for file in checkpoints(out)] == [text, text]
    status = main(["align", "fit", "--config", str(out / "config.yaml"), "--out", str(tmp_path)])
    assert status == 0
    assert (tmp_path / "projector.safetensors").read_bytes() == (out / "projector.safetensors").read_bytes()


def test_extension_opens(straight):
    assert load_extension(straight("instruct")).projector.config.hidden == 16


def refused(capfd, status):
    """The one line that was said."""
    said = capfd.readouterr().err
    assert status == 2 and said.startswith("visplice: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.optim.lr", "3e-3"], "model.optim.lr is 0.003 here and 0.002 there"),
        (["--seed", "1"], "seed_everything is 1 here and 0 there"),
        (["--data.batch_size", "2"], "data.batch_size is 2 here and 4 there"),
        (["--trainer.max_steps", "9"], "trainer.max_steps is 9 here and 7 there"),
        (["--data.seed", "1"], "data.seed is 1 here and 0 there"),
        (["--model.hidden", "8"], "model.hidden is 8 here and 16 there"),
        (["--dtype", "bfloat16"], "trainer.precision is 'bf16-mixed' here and None there"),
    ],
)
def test_what_would_not_be_the_same_run_is_refused(go, straight, capfd, words, said):
    assert said in refused(capfd, go("align", straight("align"), *RUNS["align"], "--resume", "auto", *words))


def test_what_changes_no_weight_may_differ(go, straight, scenes_folder, tmp_path, capfd):
    out = copy_of(straight("align"), tmp_path, behind=6)
    moved = shutil.copytree(scenes_folder, tmp_path / "moved")
    words = ["--data.max_skipped", "9", "--checkpoint_every", "2", "--trainer.log_every_n_steps", "5"]
    assert go("align", out, *RUNS["align"], "--resume", "auto", *words, data=moved) == 0
    ours, theirs = ((folder / "projector.safetensors").read_bytes() for folder in (out, straight("align")))
    assert ours == theirs


def test_other_data_is_refused(go, straight, tmp_path, capfd):
    from visplice.train.scene_data import write_training

    write_training(tmp_path / "other", count=48, seed=1, questions=3)
    capfd.readouterr()
    status = go("align", straight("align"), *RUNS["align"], "--resume", "auto", data=tmp_path / "other")
    assert "data ['" in refused(capfd, status)


def test_other_llama_is_refused_whatever_its_folder_is_called(go, straight, tmp_path, capfd):
    out = copy_of(straight("instruct"), tmp_path, behind=6)
    same = shutil.copytree(embedded_folder("lm"), tmp_path / "lm")
    assert go("instruct", out, *RUNS["instruct"], "--resume", "auto", "--model.lm", str(same)) == 0
    file = same / "model.safetensors"
    weights = load_file(file)
    weights[max(weights)].view(-1)[3] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    shutil.rmtree(out)
    out = copy_of(straight("instruct"), tmp_path, behind=6)
    capfd.readouterr()
    status = go("instruct", out, *RUNS["instruct"], "--resume", "auto", "--model.lm", str(same))
    assert "the frozen decoder has SHA-256" in capfd.readouterr().err and status == 2


def test_new_run_in_the_folder_of_another_is_refused(go, straight, capfd):
    out = straight("align")
    said = refused(capfd, go("align", out, *RUNS["align"]))
    assert f"{checkpoints(out)[-1]} is of an earlier run; --resume auto goes on with it" in said


def test_second_run_beside_the_first_is_refused(go, tmp_path, capfd):
    with filelock.FileLock(tmp_path / ".lock"):
        status = go("align", tmp_path, *RUNS["align"])
    assert f"{tmp_path}: another process trains there" in capfd.readouterr().err and status == 2


def test_checkpoint_of_a_name_goes_on_from_there(go, straight, tmp_path):
    out = tmp_path / "other"
    (file, _) = checkpoints(straight("align"))
    assert go("align", out, *RUNS["align"], "--resume", str(file)) == 0
    assert (out / "projector.safetensors").read_bytes() == (straight("align") / "projector.safetensors").read_bytes()


def test_ways_around_resume_are_no_options(go, tmp_path, capfd):
    for words in (["--ckpt_path", "x.ckpt"], ["--weights_only", "false"], ["--optimizer", "SGD"]):
        with pytest.raises(SystemExit):
            go("align", tmp_path, *words)
        assert words[0].lstrip("-") in capfd.readouterr().err


@pytest.mark.parametrize("name", ["logger", "default_root_dir"])
def test_places_are_those_of_out(go, tmp_path, capfd, name):
    assert f"trainer.{name} is" in refused(capfd, go("align", tmp_path, f"--trainer.{name}", "false"))


def test_validation_takes_the_weights_of_the_checkpoint(go, straight, scenes_folder, capfd):
    out = straight("align")
    before = sorted(file.name for file in out.rglob("*"))
    words = ["--data.val_path", str(scenes_folder), "--resume", "auto", *RUNS["align"]]
    assert go("align", out, *words, verb="validate") == 0
    said = capfd.readouterr().out
    assert f"weights of {checkpoints(out)[-1]}, behind step {STEPS}" in said and "val/loss" in said
    assert sorted(file.name for file in out.rglob("*")) == before
    status = go("align", out, *words, "--model.hidden", "8", verb="validate")
    assert status == 2 and "holds the weights of another model" in capfd.readouterr().err


def test_early_stop_needs_validation_data(go, tmp_path, capfd):
    said = refused(capfd, go("align", tmp_path, "--early_stop", "2", *RUNS["align"]))
    assert "--early_stop looks at the loss on validation data; name it by --data.val_path" in said


def test_early_stop_ends_a_run_that_no_longer_learns(go, scenes_folder, tmp_path):
    words = ["--data.val_path", str(scenes_folder), "--early_stop", "1", "--model.optim.lr", "1e-12"]
    words += ["--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1", "--trainer.max_steps", "40"]
    assert go("instruct", tmp_path, *RUNS["instruct"], *words) == 0
    losses = [float(row["val/loss"]) for row in curves(tmp_path) if row["val/loss"]]
    assert 2 <= len(losses) < 20 and losses[-1] >= min(losses[:-1])
    assert (tmp_path / "visplice.json").exists()


def test_wandb_that_is_not_installed_is_one_line(go, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = refused(capfd, go("align", tmp_path, "--wandb", "project", *RUNS["align"]))
    assert "--wandb needs the package wandb: pip install wandb" in said


class Wandb:
    """What of the package is used; it notes the command line that it would send."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.seen = []

    def logger(self, **options):
        wandb = self

        class Logger:
            @property
            def experiment(self):
                wandb.seen.append((options, list(sys.argv)))
                if options["project"] == "none":
                    raise wandb.Error("No API key\nand more")

        return Logger()


def test_wandb_gets_no_secret_and_the_same_run_again(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", wandb.logger)
    monkeypatch.setattr(sys, "argv", ["visplice", "--data.path", "https://me:pass-word@host/x?token=hid-den"])
    for first in (0, 3):
        loggers(tmp_path, first, wandb="some")
    (one, words), (other, _) = wandb.seen
    assert words == ["visplice", "--data.path", "https://host/x"] and "pass-word" in sys.argv[2]
    assert one["id"] == other["id"] and one["project"] == "some"
    loggers(tmp_path, 0, wandb="some")  # a new run in the same folder
    assert wandb.seen[-1][0]["id"] != one["id"]
    with pytest.raises(ValueError, match=r"--wandb: No API key; WANDB_MODE=offline keeps the curves on this machine"):
        loggers(tmp_path, 0, wandb="none")


def test_accumulation_is_refused_where_it_adds_no_negatives(go, tmp_path, capfd):
    status = go("align", tmp_path, "--trainer.accumulate_grad_batches", "2", *RUNS["align"])
    assert "accumulated batches are no negatives of each other" in capfd.readouterr().err and status == 2


def test_damaged_checkpoint_is_passed_over_and_said(go, straight, tmp_path, capfd):
    out = copy_of(straight("align"), tmp_path)
    before, newest = checkpoints(out)
    newest.write_bytes(newest.read_bytes()[:1000])
    assert go("align", out, *RUNS["align"], "--resume", "auto") == 0
    said = capfd.readouterr()
    assert f"{newest}: not a whole checkpoint" in said.err and f"going on from {before}, " in said.out
    assert (out / "projector.safetensors").read_bytes() == (straight("align") / "projector.safetensors").read_bytes()


def test_secrets_of_a_url_are_in_no_file(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(StageCLI, "instantiate_classes", lambda self: written.append(self._resolved()))
    monkeypatch.setattr(StageCLI, "_run_subcommand", lambda self, _: None)
    url = "https://me:pass-word@host/data?token=hid-den"
    assert main(["align", "fit", "--data.path", url, "--out", str(tmp_path)]) == 0
    assert "https://host/data" in written[0] and not any(word in written[0] for word in ("pass-word", "hid-den"))
