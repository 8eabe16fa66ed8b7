"""A folder of features: what comes back, what stage 1 draws from it, and what is refused."""

import io
import json
import os
import pickle
import random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from visplice.train.data.prepare import AlignPreparer
from visplice.train.data.record import Fault, Sample
from visplice.train.features.features import FeaturePreparer, FeatureSet, is_feature_folder
from visplice.train.features.files import FeatureFile, TokensFile, write_features
from visplice.vision.transform import Transform

# Key, pictures and captions of each sample, file by file.
SAMPLES = [[("a", 1, 2), ("söß", 0, 1), ("x", 2, 0)], [("last", 1, 1)]]
D_VISION, D_LM = 6, 10


def bf16(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def tensors_of(samples):
    keys = [key.encode() for key, _, _ in samples]
    steps = torch.tensor([[0, 0, 0]] + [[p, c, len(k)] for (_, p, c), k in zip(samples, keys, strict=True)])
    offsets = steps.cumsum(0)
    pictures, captions, _ = offsets[-1].tolist()
    return {
        "cls": bf16(pictures, D_VISION),
        "captions": bf16(captions, D_LM),
        "offsets": offsets,
        "keys": torch.tensor(list(b"".join(keys)), dtype=torch.uint8),
        "scale": bf16(1, 5, D_VISION),
    }


@pytest.fixture
def folder(tmp_path):
    """A folder of two files, and the tensors that they were made of."""
    parts = [tensors_of(samples) for samples in SAMPLES]
    files = []
    for index, part in enumerate(parts):
        file = tmp_path / f"features-{index:06d}.safetensors"
        write_features(file, part, {"skipped": []})
        entry = {"name": file.name, "shard": f"shard-{index:06d}.tar", "samples": len(SAMPLES[index]), "scale": 1}
        files.append(entry | {"bytes": file.stat().st_size, "sha256": str(index), "tokens": None})
    made_with = {"tokens": False, "d_vision": D_VISION, "d_lm": D_LM, "controls": []}
    totals = {"samples": 4, "pictures": 4, "captions": 4, "bytes": sum(file["bytes"] for file in files)}
    manifest = {"schema": 1, "made_with": made_with, **totals, "skipped": {}, "files": files}
    (tmp_path / "features.json").write_text(json.dumps(manifest))
    return tmp_path, parts


def edit(folder, change):
    file = folder / "features.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_samples_come_back_with_their_own_pictures_and_captions(folder):
    path, parts = folder
    features = FeatureSet(path)
    assert is_feature_folder(path) and not is_feature_folder(path.parent)
    assert features.names == ["features-000000.safetensors", "features-000001.safetensors"]
    assert features.counts == [3, 1]
    for shard, (samples, part) in enumerate(zip(SAMPLES, parts, strict=True)):
        picture = caption = 0
        for slot, (key, pictures, captions) in enumerate(samples):
            sample = features.read(shard, slot)
            assert sample.keys() == {"key", "cls", "captions"} and sample["key"] == key
            assert torch.equal(sample["cls"], part["cls"][picture : picture + pictures])
            assert torch.equal(sample["captions"], part["captions"][caption : caption + captions])
            assert sample["cls"].dtype == sample["captions"].dtype == torch.bfloat16
            picture, caption = picture + pictures, caption + captions
    assert torch.equal(features.scale_sample(), torch.cat([part["scale"] for part in parts]))


def test_files_are_ordinary_safetensors(folder):
    path, parts = folder
    for index, part in enumerate(parts):
        stored = load_file(path / f"features-{index:06d}.safetensors")
        assert stored.keys() == part.keys() and all(torch.equal(stored[name], part[name]) for name in part)


def test_same_tensors_give_the_same_bytes(tmp_path):
    tensors = tensors_of(SAMPLES[0])
    for name in ("one", "two"):
        write_features(tmp_path / name, tensors, {"skipped": [], "identity": "x", "tokens": None})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert FeatureFile(tmp_path / "one").note == {"skipped": [], "identity": "x", "tokens": None}


@pytest.mark.parametrize("pieces", [[], [2], [1, 0, 3]])
def test_tokens_written_in_pieces_are_one_tensor(tmp_path, pieces):
    file, tokens = TokensFile(tmp_path / "tokens", 5, D_VISION), bf16(sum(pieces), 5, D_VISION)
    for piece in tokens.split(pieces) if pieces else ():
        file.add(piece)
    assert not (tmp_path / "tokens").exists()
    entry = file.close()
    assert torch.equal(load_file(tmp_path / "tokens")["tokens"], tokens)
    assert torch.equal(FeatureFile(tmp_path / "tokens")["tokens"], tokens)
    assert entry["bytes"] == (tmp_path / "tokens").stat().st_size


def test_set_is_sent_to_a_worker_without_what_it_holds_open(folder):
    path, parts = folder
    features = FeatureSet(path)
    features.read(0, 0)
    sent = pickle.dumps(features)
    assert len(sent) < 5000
    assert torch.equal(pickle.loads(sent).read(1, 0)["cls"], parts[1]["cls"])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_many_files_take_no_descriptors(folder):
    path, _ = folder
    before = len(os.listdir("/proc/self/fd"))
    features = FeatureSet(path)
    assert [features.read(shard, 0)["key"] for shard in (0, 1)] == ["a", "last"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_digest_names_what_the_files_hold_wherever_they_lie(folder, tmp_path_factory):
    path, _ = folder
    before = FeatureSet(path).describe()
    moved = tmp_path_factory.mktemp("moved") / "features"
    path.rename(moved)
    after = FeatureSet(moved).describe()
    assert after == before | {"path": str(moved)} and before["samples"] == 4
    edit(moved, lambda manifest: manifest["files"][1].update(sha256="other"))
    assert FeatureSet(moved).describe()["digest"] != before["digest"]


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def test_preparer_draws_the_caption_that_the_uncached_one_draws(tokenizer):
    texts = [f"caption {index} of the picture" for index in range(7)]
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    transform = Transform(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    uncached = AlignPreparer(transform=transform, tokenizer=tokenizer)
    sample = Sample(key="s", images=(("png", stream.getvalue()),), record={"captions": texts})
    cached = FeaturePreparer(d_vision=D_VISION, d_lm=D_LM)
    features = {"key": "s", "cls": bf16(1, D_VISION), "captions": bf16(7, D_LM)}
    drawn = set()
    for seed in range(20):
        ids = uncached(sample, random.Random(seed))["caption"].tolist()
        index = texts.index(tokenizer.decode(ids))
        assert torch.equal(cached(features, random.Random(seed))["text"], features["captions"][index])
        drawn.add(index)
    assert len(drawn) > 3


def test_batches_are_stacked_and_may_be_empty(folder):
    features, preparer = FeatureSet(folder[0]), FeaturePreparer(d_vision=D_VISION, d_lm=D_LM)
    rows = [preparer(features.read(shard, 0), random.Random(0)) for shard in (0, 1)]
    batch = preparer.collate(rows)
    assert batch["keys"] == ["a", "last"]
    assert torch.equal(batch["cls"], torch.stack([part["cls"][0] for part in folder[1]]))
    assert batch["text"].shape == (2, D_LM) and batch["text"].dtype == torch.bfloat16
    empty = preparer.collate([])
    assert empty["keys"] == [] and empty["cls"].shape == (0, D_VISION) and empty["text"].shape == (0, D_LM)


@pytest.mark.parametrize(("slot", "fault"), [(1, "no-image"), (2, "no-text")])
def test_sample_without_picture_or_captions_is_a_named_fault(folder, slot, fault):
    with pytest.raises(Fault) as caught:
        FeaturePreparer(d_vision=D_VISION, d_lm=D_LM)(FeatureSet(folder[0]).read(0, slot), random.Random(0))
    assert caught.value.name == fault


# --- refusals --------------------------------------------------------------------------------------------------------


def test_folder_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"features\.json: no such file; `visplice data encode` writes it last"):
        FeatureSet(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"features\.json: not JSON"),
        ("[]", r"schema is 'list'; this version reads 1"),
        ('{"schema": 2}', r"schema is 2; this version reads 1"),
        ('{"schema": 1, "files": []}', r"lacks bytes, captions, made_with, pictures, samples, skipped"),
    ],
)
def test_manifest_of_another_kind_is_refused(tmp_path, text, message):
    (tmp_path / "features.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        FeatureSet(tmp_path)


def test_file_that_is_missing_or_cut_off_is_refused_when_the_folder_is_opened(folder):
    path, _ = folder
    file = path / "features-000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    message = rf"features-000001\.safetensors: {len(whole) - 1:,} bytes, but features\.json states {len(whole):,}"
    with pytest.raises(ValueError, match=message):
        FeatureSet(path)
    file.unlink()
    with pytest.raises(ValueError, match=r"features-000001\.safetensors: no such file, but features\.json names it"):
        FeatureSet(path)


@pytest.mark.parametrize("damage", ["header", "nonsense"])
def test_broken_file_is_named(folder, damage):
    path, _ = folder
    file = path / "features-000000.safetensors"
    data = file.read_bytes()
    file.write_bytes(b"\xff" * len(data) if damage == "nonsense" else data[:8] + b"#" + data[9:])
    with pytest.raises(ValueError, match=r"features-000000\.safetensors: no whole file of features"):
        FeatureSet(path).read(0, 0)
