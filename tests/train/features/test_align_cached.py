"""Stage 1 from features: the same training as from pictures, without encoder or LLaMA, on features that fit."""

import copy
import csv
import json
import shutil
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from visplice.app.cli import main
from visplice.lm.extension import EMBEDDED, embedded_folder, load_extension, read_extension
from visplice.projector.mlp import rms
from visplice.train.align import Align
from visplice.train.data.module import ShardData
from visplice.train.data.shards import read_samples, write_shards
from visplice.train.features.encode import encode
from visplice.train.features.features import FeatureSet
from visplice.train.instruct import Instruct
from visplice.train.optim import OptimConfig
from visplice.train.trainer import fit, parameter_counts
from visplice.vision.encoder import EncoderConfig

STEPS = 8


class Watched(Align):
    """Keeps the losses."""

    def on_train_start(self):
        self.losses = []

    def on_train_batch_end(self, outputs, *rest):
        super().on_train_batch_end(outputs, *rest)
        self.losses.append(outputs["loss"].item())


class Rounded(Watched):
    """From pictures, but what is frozen is rounded as it is in the files."""

    def encoded(self, pixels):
        pooled, tokens = super().encoded(pixels)
        return pooled.bfloat16().float(), tokens

    def captions(self, ids, offsets):
        return super().captions(ids, offsets).bfloat16().float()


def build(kind, encoder, start=None, **options):
    torch.manual_seed(0)
    module = kind(encoder, EMBEDDED, hidden=32, optim=OptimConfig(lr=2e-3), **options)
    if start is not None:
        module.model.projector.load_state_dict(start)
    return module


def train(module, data, out, steps=STEPS, **options):
    options = {"batch_size": 6, "decode": "exact"} | options
    fit(module, ShardData(str(data), **options), out, max_steps=steps, seed=0, accelerator="cpu")
    return module


@pytest.fixture(scope="module")
def cached(kit, encoder, scenes_folder, tmp_path_factory):
    """A run from features of the embedded encoder, its folder, and the projector that it began with."""
    out = tmp_path_factory.mktemp("cached")
    encode(kit.config_of(scenes_folder, out / "features", encoder, batch_size=16))
    module = build(Watched, encoder, features=str(out / "features"))
    start = copy.deepcopy(module.model.projector.state_dict())
    return train(module, out / "features", out), out, start


@pytest.fixture(scope="module")
def uncached(encoder, scenes_folder, cached, tmp_path_factory):
    """The same run from pictures."""
    out = tmp_path_factory.mktemp("uncached")
    return train(build(Watched, encoder, cached[2]), scenes_folder, out), out


# --- the same training -----------------------------------------------------------------------------------------------


def test_losses_are_those_of_pictures_rounded_to_bfloat16(encoder, scenes_folder, cached, tmp_path):
    rounded = train(build(Rounded, encoder, cached[2]), scenes_folder, tmp_path)
    assert len(cached[0].losses) == STEPS and cached[0].losses == rounded.losses


def test_losses_are_those_of_features_that_lie_on_the_device(encoder, cached, tmp_path):
    module = build(Watched, encoder, cached[2], features=str(cached[1] / "features"))
    assert train(module, cached[1] / "features", tmp_path, resident=True).losses == cached[0].losses


def test_losses_are_those_of_pictures_up_to_rounding(cached, uncached):
    assert cached[0].losses != uncached[0].losses
    assert cached[0].losses == pytest.approx(uncached[0].losses, rel=5e-3)
    assert cached[0].losses[-1] < cached[0].losses[0]


def test_extension_opens_and_gives_the_tokens_of_the_uncached_one(scenes_folder, cached, uncached):
    ours, theirs = load_extension(cached[1]), load_extension(uncached[1])
    pixels = ours.pixels([sample.images[0][1] for sample in islice(read_samples(scenes_folder.glob("*.tar")), 8)])
    with torch.no_grad():
        found, expected = (model.projector(model.features(pixels)) for model in (ours, theirs))
    assert F.cosine_similarity(found, expected, dim=-1).min() > 0.999
    target = rms(ours.lm.tok_embeddings.weight)
    assert rms(found) == pytest.approx(target, rel=0.05)  # from 48 pictures
    assert rms(expected) == pytest.approx(target, rel=0.1)  # from the six of a batch
    assert rms(ours.projector.sentinels) == pytest.approx(target, rel=1e-5)
    assert {**vars(read_extension(cached[1])), "folder": 0} == {**vars(read_extension(uncached[1])), "folder": 0}


def test_every_epoch_draws_its_captions_as_the_uncached_path_does(small_vit, pictures, encoded, tmp_path):
    """The same keys in the same order with the same captions, over two epochs with samples of one to three captions."""

    class Seen(Align):
        def training_step(self, batch, index):
            text = batch["text"].float() if self.features else self.captions(batch["captions"], batch["offsets"])
            self.seen += zip(batch["keys"], text, strict=True)
            return super().training_step(batch, index)

    runs = []
    for data, options in ((encoded, {"features": str(encoded)}), (pictures, {})):
        module = build(Seen, small_vit, **options)
        module.seen = []
        train(module, data, tmp_path / str(len(runs)), steps=8)
        runs.append(module.seen)
    assert [key for key, _ in runs[0]] == [key for key, _ in runs[1]] and len(runs[0]) == 40
    for (_, ours), (_, theirs) in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=8e-3, atol=1e-6)


def test_checkpoint_state_is_that_of_the_uncached_path(cached, uncached):
    states = []
    for module in (cached[0], uncached[0]):
        checkpoint = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(checkpoint)
        states.append(checkpoint["state_dict"])
    assert states[0].keys() == states[1].keys() and "model.projector.linear_2.weight" in states[0]


@pytest.mark.parametrize("size", [0, 1])
def test_batch_without_negatives_gives_zero_gradients_to_every_weight(small_vit, encoded, size, monkeypatch):
    module = build(Align, small_vit, features=str(encoded))
    monkeypatch.setattr("visplice.train.align.log_learning_rate", lambda module: None)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module.trainer = SimpleNamespace(global_step=0, log_every_n_steps=1)
    features = FeatureSet(encoded)
    rows = [{"key": "one", "cls": features.read(0, 0)["cls"][0], "text": features.read(0, 0)["captions"][0]}][:size]
    loss = module.training_step(module.preparer.collate(rows), 0)
    loss.backward()
    assert loss == 0
    for name, parameter in module.named_parameters():
        assert not parameter.requires_grad or torch.count_nonzero(parameter.grad) == 0, name
    assert module.model.projector.linear_1.weight.grad is not None


def test_encoder_without_cls_trains_from_features(kit, small_vit, pictures, tmp_path):
    config = replace(small_vit, model="vit_base_patch16_siglip_224", include_cls=False)
    config = kit.save_vit(config, tmp_path / "vit.safetensors")
    encode(kit.config_of(pictures, tmp_path / "features", config))
    module = build(Watched, config, features=str(tmp_path / "features"))
    train(module, tmp_path / "features", tmp_path / "out", steps=3)
    rounded = build(
        Rounded, config, build(Align, config, features=str(tmp_path / "features")).model.projector.state_dict()
    )
    train(rounded, pictures, tmp_path / "rounded", steps=3)
    assert module.losses == pytest.approx(rounded.losses, rel=1e-6)


# --- without encoder or LLaMA ----------------------------------------------------------------------------------------


@pytest.fixture
def nothing_loaded(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a frozen part was loaded")

    import timm

    monkeypatch.setattr(timm, "create_model", forbidden)
    monkeypatch.setattr("visplice.train.align.load_backbones", forbidden)
    monkeypatch.setattr("visplice.lm.checkpoint.load_llama", forbidden)
    monkeypatch.setattr("visplice.lm.extension.load_llama", forbidden)
    monkeypatch.setattr("visplice.lm.extension.VisionEncoder", forbidden)


def test_neither_encoder_nor_llama_is_loaded(small_vit, encoded, nothing_loaded, tmp_path):
    module = train(build(Align, small_vit, features=str(encoded)), encoded, tmp_path, steps=2)
    assert parameter_counts(module.model) == (32 * 49 + 33 * 256, 2 * 256)  # the sentinels wait for stage 2
    assert (tmp_path / "visplice.json").exists()


def test_command_takes_the_parts_from_the_features(small_vit, encoded, nothing_loaded, tmp_path, capsys):
    """The shipped YAML names the embedded encoder; that of the features is another, and nobody had to say so."""
    words = ["align", "fit", "--data.path", str(encoded), "--out", str(tmp_path / "out"), "--trainer.max_steps", "3"]
    words += ["--data.batch_size", "8", "--model.hidden", "16", "--device", "cpu", "--trainer.log_every_n_steps", "1"]
    assert main([*words, "--data.val_path", str(encoded)]) == 0
    assert ", 512 frozen" in capsys.readouterr().out
    extension = read_extension(tmp_path / "out")
    assert extension.encoder == small_vit and extension.lm == EMBEDDED and extension.template == "turns"
    with open(tmp_path / "out" / "logs" / "metrics.csv") as file:
        assert len([row for row in csv.DictReader(file) if row["train/loss"]]) == 3


def test_command_takes_nothing_of_the_shipped_encoder(kit, pictures, tmp_path):
    """A field of several values replaces the shipped one as a whole: this encoder overrides nothing."""
    config = kit.save_vit(EncoderConfig(model="test_vit", weights=None, image_size=160), tmp_path / "vit.safetensors")
    encode(kit.config_of(pictures, tmp_path / "features", config))
    words = [
        "align",
        "fit",
        "--data.path",
        str(tmp_path / "features"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main([*words, "--trainer.max_steps", "1", "--data.batch_size", "8"]) == 0
    assert read_extension(tmp_path / "out").encoder == config


def test_command_finds_the_features_behind_a_config_file_and_in_a_mixture(encoded, nothing_loaded, tmp_path):
    words = ["align", "fit", "--trainer.max_steps", "1", "--device", "cpu", "--model.hidden", "16", "--config"]
    for number, data in enumerate(({"path": str(encoded)}, {"mixture": {str(encoded): 1.5}})):
        (tmp_path / "run.yaml").write_text(json.dumps({"data": {"batch_size": 8, **data}}))
        assert main([*words, str(tmp_path / "run.yaml"), "--out", str(tmp_path / str(number))]) == 0
        assert (tmp_path / str(number) / "visplice.json").exists()


def test_features_are_enough_where_the_llama_is_not(encoded, nothing_loaded, small_vit, tmp_path):
    """As on a laptop to which only the features were copied."""
    shutil.copytree(encoded, tmp_path / "features")
    file = tmp_path / "features" / "features.json"
    manifest = json.loads(file.read_text())
    manifest["made_with"]["lm"] = "owner/name"
    file.write_text(json.dumps(manifest))
    module = Align(small_vit, "owner/name", hidden=8, features=str(tmp_path / "features"))
    train(module, tmp_path / "features", tmp_path / "out", steps=1)
    assert read_extension(tmp_path / "out").lm == "owner/name"
    with pytest.raises(ValueError, match="lm is owner/name there and owner/other here, where no such folder is"):
        Align(small_vit, "owner/other", features=str(tmp_path / "features"))


# --- only features that fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer": -1}, r"encoder\.layer is -2 there and -1 here"),
        ({"image_size": 48}, r"encoder\.image_size is 32 there and 48 here"),
        ({"resize": "pad"}, r"encoder\.resize is squash there and pad here"),
        ({"include_cls": False}, r"encoder\.include_cls is True there and False here"),
        ({"overrides": {"depth": 3}}, r"encoder\.overrides\.patch_size is 16 there and None here"),
        ({"model": "vit_base_patch16_siglip_224"}, r"encoder\.model is vit_base_patch16_clip_quickgelu_224 there and"),
        ({"weights": "pretrained"}, r"encoder\.weights is .*vit\.safetensors there and pretrained here"),
    ],
)
def test_another_encoder_is_refused_by_name(small_vit, encoded, changes, named):
    with pytest.raises(ValueError, match=f"were made with other parts than the model has: .*{named}"):
        Align(replace(small_vit, **changes), EMBEDDED, features=str(encoded))


def test_weights_are_compared_by_what_they_hold(kit, small_vit, encoded, tmp_path):
    other = kit.save_vit(small_vit, tmp_path / "vit.safetensors", change=1.0)
    with pytest.raises(
        ValueError, match=r"fingerprint of encoder\.weights is \w{12} there and \w{12} here, of .*vit\.s"
    ):
        Align(other, EMBEDDED, features=str(encoded))
    Align(kit.save_vit(small_vit, tmp_path / "same.safetensors"), EMBEDDED, features=str(encoded))


def test_another_embedding_table_is_refused_and_the_same_elsewhere_is_not(small_vit, encoded, other_lm, tmp_path):
    with pytest.raises(ValueError, match=r"fingerprint\.table is \w{12} there and \w{12} here, of "):
        Align(small_vit, str(other_lm), features=str(encoded))
    shutil.copytree(embedded_folder("lm"), tmp_path / "lm")
    assert Align(small_vit, str(tmp_path / "lm"), features=str(encoded)).lm_source == str(tmp_path / "lm")


def test_command_refuses_flags_that_contradict_the_features(encoded, tmp_path, capsys):
    words = ["align", "fit", "--data.path", str(encoded), "--out", str(tmp_path), "--model.encoder.layer", "-1"]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"visplice: the features in {encoded} were made with other parts than the model has")
    assert "encoder.layer is -2 there and -1 here" in error and f"--config {encoded}/align.yaml" in error


def test_data_of_the_other_kind_is_refused(small_vit, pictures, encoded, tmp_path):
    module = build(Align, small_vit, features=str(encoded))
    with pytest.raises(ValueError, match=f"{pictures} holds no features, but {encoded} does .* `visplice data encode`"):
        train(module, encoded, tmp_path, val_path=str(pictures))
    for stage in (build(Align, small_vit), Instruct(small_vit, EMBEDDED, hidden=8)):
        with pytest.raises(ValueError, match=f"{encoded} holds features, but the model is built for pictures"):
            train(stage, encoded, tmp_path)


def test_features_of_another_making_beside_them_are_refused(kit, small_vit, pictures, encoded, tmp_path):
    encode(kit.config_of(pictures, tmp_path / "other", replace(small_vit, layer=-1)))
    module = build(Align, small_vit, features=str(encoded))
    with pytest.raises(
        ValueError, match=r"made with different parts: encoder\.layer is -2 there and -1 here; train on"
    ):
        train(module, encoded, tmp_path, val_path=str(tmp_path / "other"))


def test_mixture_of_features_trains(kit, small_vit, encoded, tmp_path):
    write_shards(list(kit.samples(6)), tmp_path / "data", source={})
    encode(kit.config_of(tmp_path / "data", tmp_path / "more", small_vit, decode="fast"))
    module = build(Watched, small_vit, features=str(encoded))
    data = ShardData(mixture={str(encoded): 1.0, str(tmp_path / "more"): 2.0}, batch_size=8)
    fit(module, data, tmp_path / "out", max_steps=4, seed=0, accelerator="cpu")
    assert len(module.losses) == 4
