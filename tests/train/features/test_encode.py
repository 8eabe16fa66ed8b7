"""Encoding a data set: what is stored, and that it does not depend on how."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from visplice.app.cli import main
from visplice.lm.checkpoint import load_llama, open_checkpoint, save_llama
from visplice.lm.config import LlamaConfig
from visplice.lm.decoder import Llama
from visplice.lm.extension import EMBEDDED, embedded_folder, load_backbones
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_shards
from visplice.train.features import encode as job
from visplice.train.features.encode import encode
from visplice.train.features.features import FeatureSet
from visplice.train.features.frozen import Text, frozen_parts
from visplice.vision.encoder import EncoderConfig, VisionEncoder
from visplice.vision.image import open_image

# --- what is stored --------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_uncached_path_rounded_to_bfloat16(kit, small_vit, encoded):
    vision, llama, tokenizer = load_backbones(small_vit, EMBEDDED)
    found = kit.all_of(FeatureSet(encoded))
    assert [sample["key"] for sample in found] == [f"p{number:03d}" for number in range(20)]
    for sample, truth in zip(found, kit.samples(), strict=True):
        features = vision(vision.transform(open_image(truth.images[0][1]))[None])
        torch.testing.assert_close(sample["cls"], features[:, 0].bfloat16(), rtol=8e-3, atol=1e-6)
        torch.testing.assert_close(sample["tokens"], features.bfloat16(), rtol=8e-3, atol=1e-4)
        means = [llama.tok_embeddings.weight[tokenizer.encode(text)].mean(0) for text in truth.record["captions"]]
        torch.testing.assert_close(sample["captions"], torch.stack(means).bfloat16(), rtol=8e-3, atol=1e-6)


def test_caption_means_are_embedding_bags_of_the_whole_table_bit_by_bit():
    text = Text.open(EMBEDDED)
    ids = [[7, 30, 7], [9], list(range(40)), [30, 9]]
    flat = torch.tensor([token for caption in ids for token in caption])
    bags = torch.nn.functional.embedding_bag(flat, text.table.float(), torch.tensor([0, 3, 4, 44]), mode="mean")
    assert torch.equal(text.means(ids), bags)
    assert text.means([]).shape == (0, text.table.shape[1])
    assert text.rms() == pytest.approx(text.table.float().pow(2).mean().sqrt().item(), rel=1e-6)


def test_encoder_without_cls_stores_the_mean_of_its_patches(kit, small_vit, pictures, tmp_path):
    config = replace(small_vit, model="vit_base_patch16_siglip_224", include_cls=False)
    config = kit.save_vit(config, tmp_path / "vit.safetensors")
    vision = VisionEncoder(config)
    encode(kit.config_of(pictures, tmp_path / "out", config))
    sample = FeatureSet(tmp_path / "out").read(0, 0)
    patches = vision(vision.transform(open_image(kit.picture(0)))[None])
    torch.testing.assert_close(sample["cls"], patches.mean(1).bfloat16(), rtol=8e-3, atol=1e-6)


def test_manifest_says_how_much_and_of_what(small_vit, encoded):
    manifest = json.loads((encoded / "features.json").read_text())
    assert {name: manifest[name] for name in ("samples", "pictures", "captions", "skipped")} == {
        "samples": 20, "pictures": 20, "captions": 39, "skipped": {},
    }  # fmt: skip
    assert [(file["shard"], file["samples"]) for file in manifest["files"]] == [
        ("shard-000000.tar", 7), ("shard-000001.tar", 7), ("shard-000002.tar", 6),
    ]  # fmt: skip
    made_with = manifest["made_with"]
    assert EncoderConfig(**made_with["encoder"]) == small_vit and made_with["lm"] == EMBEDDED
    vision, llama, _ = load_backbones(small_vit, EMBEDDED)
    assert made_with["fingerprint"]["lm"] == llama.fingerprint
    assert made_with["fingerprint"]["encoder"] == vision.vit.fingerprint
    assert (made_with["decode"], made_with["dtype"], made_with["d_vision"], made_with["d_lm"]) == (
        "exact", "float32", 48, 256,
    )  # fmt: skip
    stage = yaml.safe_load((encoded / "align.yaml").read_text())
    assert stage == {"model": {"lm": EMBEDDED, "encoder": small_vit.to_dict()}}


def test_pair_takes_two_bytes_for_each_number(kit, small_vit, tmp_path):
    """10,240 bytes for ViT-L/14 and LLaMA 2 7B; here 2 x (48 + 256), key, offsets and a share of the header."""
    write_shards((replace(s, record={"captions": ["noise"]}) for s in kit.samples(200)), tmp_path / "data", source={})
    manifest = encode(kit.config_of(tmp_path / "data", tmp_path / "out", small_vit))
    tokens = 64 * (1 + 4) * 48 * 2
    assert manifest["bytes"] - tokens == pytest.approx(200 * (2 * (48 + 256) + 4 + 24), abs=1000)


def test_pictures_for_the_scale_come_from_every_file_and_are_their_tokens(kit, encoded):
    features = FeatureSet(encoded)
    known = {sample["tokens"][0].view(torch.int16).numpy().tobytes() for sample in kit.all_of(features)}
    drawn = [tokens.view(torch.int16).numpy().tobytes() for tokens in features.scale_sample()]
    assert len(set(drawn)) == len(drawn) == 20 and known.issuperset(drawn)
    assert job._quotas([7, 7, 6]) == [22, 22, 20]
    assert sum(job._quotas([1000] * 999)) == 64 and job._quotas([10_000, 1]) == [63, 1]


def test_tokens_on_request_keep_several_pictures_and_conversations_without_captions(kit, small_vit, tmp_path):
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "both"}] * 2
    write_shards(
        [
            Sample(
                key="two",
                images=(("0.png", kit.picture(1)), ("1.png", kit.picture(2))),
                record={"conversations": turns},
            ),
            Sample(key="words", record={"conversations": turns}),
            Sample(key="one", images=(("png", kit.picture(3)),), record={"captions": ["a point"]}),
        ],
        tmp_path / "data",
        source={},
    )
    manifest = encode(kit.config_of(tmp_path / "data", tmp_path / "out", small_vit, tokens=True))
    two, words, one = kit.all_of(FeatureSet(tmp_path / "out"))
    assert manifest["skipped"] == {} and manifest["pictures"] == 3
    assert two["tokens"].shape == (2, 5, 48) and two["captions"].shape == (0, 256)
    assert words["tokens"].shape == (0, 5, 48) and one["captions"].shape == (1, 256)
    assert torch.equal(two["tokens"][:, 0], two["cls"]) and not torch.equal(two["cls"][0], two["cls"][1])
    manifest = encode(kit.config_of(tmp_path / "data", tmp_path / "plain", small_vit))
    assert manifest["skipped"] == {"no-image": 1, "no-text": 1}  # of no use to stage 1
    assert [sample["key"] for sample in kit.all_of(FeatureSet(tmp_path / "plain"))] == ["one"]


def encode_without_tokens(kit, folder, small_vit):
    manifest = encode(kit.config_of(folder / "data", folder / "plain", small_vit))
    assert manifest["skipped"] == {"no-image": 1, "no-text": 1}  # of no use to stage 1
    return folder / "plain"


# --- that it does not depend on how ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_number_of_threads_does_not_show(kit, small_vit, pictures, encoded, tmp_path, workers):
    encode(kit.config_of(pictures, tmp_path, small_vit, tokens=True, workers=workers))
    assert kit.content(tmp_path) == kit.content(encoded)


def test_finished_features_are_left_alone_and_lost_files_are_made_again(
    kit, small_vit, pictures, encoded, tmp_path, capsys
):
    shutil.copytree(encoded, tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir() if file.suffix}
    encode(kit.config_of(pictures, tmp_path / "out", small_vit, tokens=True))
    assert "holds these features already, of 20 samples; nothing to do" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir() if file.suffix} == before
    (tmp_path / "out" / "tokens-000001.safetensors").unlink()
    file = tmp_path / "out" / "features-000002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    encode(kit.config_of(pictures, tmp_path / "out", small_vit, tokens=True))
    assert kit.content(tmp_path / "out") == kit.content(encoded)


# Kills itself at the n-th of the moments at which files come into being, are written, synced or renamed.
KILLED = """
import os, signal, sys
from visplice.vision._torchvision import declare_missing_operators
declare_missing_operators()
import timm  # once, before the forks
from visplice.train.features.encode import EncodeConfig, encode
from visplice.vision.encoder import EncoderConfig
pictures, lm, encoder, *outs = sys.argv[1:]
moments = 0
def counted(call):
    def wrapped(*args, **options):
        global moments
        moments += 1
        if moments == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return wrapped
os.replace, os.fsync = counted(os.replace), counted(os.fsync)
for out, last in zip(outs[::2], map(int, outs[1::2])):
    child = os.fork()
    if not child:
        vit = EncoderConfig(**eval(encoder))
        encode(EncodeConfig(data=pictures, out=out, encoder=vit, lm=lm, batch_size=4, tokens=True))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def test_killed_at_any_moment_and_run_again_it_is_identical(kit, small_vit, pictures, encoded, tmp_path):
    moments = [2, 9, 17]  # of 18: before the record of the job, between the two files of a shard, before the manifest
    outs = {tmp_path / str(moment): moment for moment in moments}
    words = [str(word) for pair in outs.items() for word in pair]
    command = [sys.executable, "-c", KILLED, str(pictures), EMBEDDED, repr(small_vit.to_dict()), *words]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    whole = []
    for out in outs:
        left = kit.content(out)
        whole.append(sum(name.startswith("features-") and not name.endswith(".partial") for name in left))
        assert "features.json" not in left
        assert all(data == kit.content(encoded)[name] for name, data in left.items() if name.endswith(".safetensors"))
        encode(kit.config_of(pictures, out, small_vit, tokens=True))
        assert kit.content(out) == kit.content(encoded)
    assert whole == [0, 1, 3]


def test_full_disk_is_one_line_and_the_job_goes_on(kit, small_vit, pictures, encoded, tmp_path, monkeypatch):
    real, calls = job.write_features, []

    def full(file, *rest):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, *rest)

    monkeypatch.setattr(job, "write_features", full)
    with pytest.raises(
        OSError, match=r"the disk is full under .*; 1 of 3 shards are encoded, make room and run"
    ) as caught:
        encode(kit.config_of(pictures, tmp_path, small_vit, tokens=True))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.partial"))
    monkeypatch.undo()
    encode(kit.config_of(pictures, tmp_path, small_vit, tokens=True))
    assert kit.content(tmp_path) == kit.content(encoded)


def test_second_process_is_kept_out(kit, small_vit, pictures, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is encoding into this folder"):
            encode(kit.config_of(pictures, tmp_path, small_vit))


# --- the LLaMA's side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_fingerprint_without_loading_is_that_of_the_loaded_decoder(tmp_path, tied):
    shape = {"vocab_size": 300, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48}
    save_llama(Llama(LlamaConfig(**shape, tie_embeddings=tied)), tmp_path, dtype=torch.bfloat16)
    shutil.copy(embedded_folder("lm") / "tokenizer.json", tmp_path)
    expected = load_llama(tmp_path, dtype=torch.float32).fingerprint
    assert open_checkpoint(tmp_path).fingerprint() == expected != Text.open(EMBEDDED).checkpoint.fingerprint()


def test_decoder_is_never_built(kit, small_vit, pictures, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("the decoder was loaded")

    monkeypatch.setattr("visplice.lm.checkpoint.load_llama", forbidden)
    monkeypatch.setattr("visplice.lm.extension.load_llama", forbidden)
    assert encode(kit.config_of(pictures, tmp_path, small_vit))["samples"] == 20


# --- the command line ------------------------------------------------------------------------------------------------


def test_command_encodes_and_says_what_it_made(small_vit, pictures, tmp_path, capsys):
    stage = {"model": {"lm": EMBEDDED, "encoder": small_vit.to_dict()}}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage))
    words = ["data", "encode", str(pictures), "--out", str(tmp_path / "out"), "--config", str(tmp_path / "stage.yaml")]
    assert main([*words, "--layer", "-1", "--device", "cpu", "--workers", "2"]) == 0
    told = capsys.readouterr().out
    assert (
        "20 samples, 20 pictures, 39 captions" in told and f"visplice align fit --data.path {tmp_path / 'out'}" in told
    )
    assert FeatureSet(tmp_path / "out").encoder == replace(small_vit, layer=-1)
    assert main([*words, "--layer", "-2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("visplice: ") and "encoder.layer is -1 there and -2 here" in error


def test_another_model_starts_from_the_defaults_and_not_from_the_config(tmp_path):
    shipped, lm = frozen_parts(None, {})
    assert shipped.weights == EMBEDDED and lm == EMBEDDED
    assert frozen_parts(None, {"image_size": 56})[0] == replace(shipped, image_size=56)
    large = frozen_parts(None, {"model": "vit_large_patch14_clip_quickgelu_224.openai", "image_size": 196})[0]
    assert large == EncoderConfig(image_size=196)
    with pytest.raises(ValueError, match=r"none\.yaml: no such file; --config is the YAML of a stage"):
        frozen_parts(tmp_path / "none.yaml", {})
    (tmp_path / "odd.yaml").write_text("model: {encoder: {modle: x}, lm: embedded}")
    with pytest.raises(
        ValueError, match=r"odd\.yaml: model\.encoder and model\.lm are not as a stage has them .*modle"
    ):
        frozen_parts(tmp_path / "odd.yaml", {})
