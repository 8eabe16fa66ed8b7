"""What is not encoded: samples that cannot be used, and features of another making."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from visplice.lm.extension import EMBEDDED, embedded_folder
from visplice.train.data.shards import write_shards
from visplice.train.data.tar_index import scan_shard
from visplice.train.features import encode as job
from visplice.train.features.encode import EncodeConfig, encode
from visplice.train.features.features import FeatureSet
from visplice.train.features.frozen import Text
from visplice.vision.encoder import EncoderConfig

# --- what cannot be used ---------------------------------------------------------------------------------------------


def test_bad_samples_are_counted_under_their_names_and_nothing_else_is_lost(
    kit, small_vit, pictures, encoded, tmp_path
):
    write_shards(kit.samples(broken=kit.broken), tmp_path / "data", source={}, per_shard=kit.per_shard)
    shard = tmp_path / "data" / "shard-000002.tar"
    os.truncate(shard, scan_shard(shard)[-1].members["png"][0] + 100)
    manifest = encode(kit.config_of(tmp_path / "data", tmp_path / "out", small_vit, tokens=True))
    names = {name: 1 for name, _ in kit.broken.values()}
    assert manifest["skipped"] == dict(sorted({**names, "truncated-tar": 1}.items()))
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["fault"]) for line in lines[:3]] == [
        (f"p{number:03d}", kit.broken[number][0]) for number in sorted(kit.broken)
    ]
    whole = {sample["key"]: sample for sample in kit.all_of(FeatureSet(encoded))}
    found = kit.all_of(FeatureSet(tmp_path / "out"))
    assert [sample["key"] for sample in found] == [f"p{n:03d}" for n in range(19) if n not in kit.broken]
    for sample in found:
        expected = whole[sample["key"]]
        torch.testing.assert_close(sample["cls"], expected["cls"], rtol=8e-3, atol=1e-6)
        assert torch.equal(sample["captions"], expected["captions"])


def test_job_stops_beyond_the_budget_and_goes_on_with_a_larger_one(kit, small_vit, tmp_path):
    write_shards(kit.samples(broken=kit.broken), tmp_path / "data", source={}, per_shard=kit.per_shard)
    config = kit.config_of(tmp_path / "data", tmp_path / "out", small_vit, max_skipped=2)
    message = r"3 samples cannot be used, more than --max-skipped 2; the last one is p018: .* no picture|not an image"
    for _ in range(2):  # also where the first two are of finished shards
        with pytest.raises(ValueError, match=message):
            encode(config)
        assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "out" / "features.json").exists()
    assert (tmp_path / "out" / "features-000001.safetensors").exists()
    assert encode(replace(config, max_skipped=3))["samples"] == 17


def test_caption_without_a_token_is_named(kit, small_vit, tmp_path, monkeypatch):
    write_shards(kit.samples(3), tmp_path / "data", source={})
    plain = Text.open(EMBEDDED)

    class Silent:
        def encode(self, text):
            return [] if "number 1" in text else plain.tokenizer.encode(text)

        controls = plain.tokenizer.controls

    monkeypatch.setattr(job.Text, "open", lambda lm: replace(plain, tokenizer=Silent()))
    assert encode(kit.config_of(tmp_path / "data", tmp_path / "out", small_vit))["skipped"] == {"no-tokens": 1}


def test_nothing_usable_is_said(kit, small_vit, tmp_path):
    write_shards((replace(s, images=()) for s in kit.samples(3)), tmp_path / "data", source={})
    with pytest.raises(ValueError, match=r"none of its samples can be encoded; .*skipped\.jsonl says why"):
        encode(kit.config_of(tmp_path / "data", tmp_path / "out", small_vit))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("layer", r"encoder\.layer is -2 there and -1 here"),
        ("image_size", r"encoder\.image_size is 32 there and 48 here; transform\.image_size is 32 there and 48 here"),
        ("resize", r"encoder\.resize is squash there and pad here; transform\.resize is squash there and pad here"),
        ("include_cls", r"encoder\.include_cls is True there and False here"),
        ("weights", r"fingerprint\.encoder is \w{12} there and \w{12} here"),
        ("lm", r"fingerprint\.lm is \w{12} there and \w{12} here; fingerprint\.table is \w{12} there and \w{12} here"),
        ("decode", r"decode is exact there and fast here"),
        ("dtype", r"dtype is float32 there and bfloat16 here"),
        ("tokens", r"tokens is True there and False here"),
        ("data", r"data\.samples is 20 there and 6 here; data\.digest is \w{12} there and \w{12} here"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_features_made_in_another_way_are_refused_by_name(
    kit, small_vit, pictures, encoded, other_lm, tmp_path, field, named, finished
):
    file = tmp_path / "other.safetensors"
    encoders = {
        "layer": lambda: replace(small_vit, layer=-1),
        "image_size": lambda: kit.save_vit(replace(small_vit, image_size=48), file),
        "resize": lambda: replace(small_vit, resize="pad"),
        "include_cls": lambda: replace(small_vit, include_cls=False),
        "weights": lambda: kit.save_vit(small_vit, file, change=1.0),
    }
    changes = {
        "lm": {"lm": str(other_lm)},
        "decode": {"decode": "fast"},
        "dtype": {"dtype": torch.bfloat16},
        "tokens": {"tokens": False},
    }
    if field == "data":
        write_shards(kit.samples(6), tmp_path / "data", source={})
        pictures = tmp_path / "data"
    out = tmp_path / "out"
    shutil.copytree(encoded, out)
    if not finished:
        (out / "encoding.json").write_text(json.dumps(json.loads((out / "features.json").read_text())["made_with"]))
        (out / "features.json").unlink()
    before = kit.content(out)
    encoder = encoders.get(field, lambda: small_vit)()
    with pytest.raises(ValueError, match=f"holds features made in another way: .*{named}.*; name another --out"):
        encode(kit.config_of(pictures, out, encoder, **{"tokens": True} | changes.get(field, {})))
    assert kit.content(out) == before


def test_same_parts_in_another_place_are_the_same(kit, small_vit, pictures, encoded, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(encoded, out)
    shutil.copytree(pictures, tmp_path / "data")
    shutil.copy(small_vit.weights, tmp_path / "vit.safetensors")
    shutil.copytree(embedded_folder("lm"), tmp_path / "lm")
    moved = replace(small_vit, weights=str(tmp_path / "vit.safetensors"))
    encode(kit.config_of(tmp_path / "data", out, moved, tokens=True, lm=str(tmp_path / "lm")))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode": "quick"}, "--decode is 'quick'; it is exact or fast"),
        ({"batch_size": 0}, "--batch-size is 0; it is at least 1"),
        ({"workers": 0}, "--workers is 0; it is at least 1"),
        ({"out": "same", "data": "same"}, "--out same is the data set itself"),
        ({"encoder": EncoderConfig(weights=None)}, r"encoder\.weights is null, random each time"),
    ],
)
def test_impossible_settings_are_refused(small_vit, changes, message):
    with pytest.raises(ValueError, match=message):
        EncodeConfig(**{"data": "data", "out": "out", "encoder": small_vit, "lm": EMBEDDED} | changes)


def test_folder_with_files_of_unknown_making_is_refused(kit, small_vit, pictures, encoded, tmp_path):
    shutil.copy(encoded / "features-000000.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"holds features-000000\.safetensors, but no encoding\.json or"):
        encode(kit.config_of(pictures, tmp_path, small_vit))
