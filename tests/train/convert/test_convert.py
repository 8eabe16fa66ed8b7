"""From published files to shards: what comes out, and what becomes of every fault a picture or an entry can have."""

import csv
import hashlib
import io
import json
import os
import struct
import zlib

import pytest
import webdataset
from PIL import Image

from visplice.train.convert.convert import convert
from visplice.train.convert.llava import llava_source
from visplice.train.convert.pairs import folder_source, table_source
from visplice.train.convert.vqa import vqa_source
from visplice.train.data.shards import read_manifest, read_samples


def picture(kind="JPEG", mode="RGB", size=(8, 6), **options):
    stream = io.BytesIO()
    Image.new(mode, size, options.pop("color", 7)).save(stream, kind, **options)
    return stream.getvalue()


def bomb():
    """A PNG whose header declares 50,000 x 50,000 pixels."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)), (b"IDAT", b"x"), (b"IEND", b"")
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def talk(*values):
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def item(name, image=None, turns=None):
    named = {} if image is None else {"image": image}
    return {"id": name, **named, "conversations": turns or talk("<image>\nWhat?" if named else "What?", "This.")}


@pytest.fixture
def run(tmp_path):
    """Converts LLaVA items with the given pictures."""

    def run(items, pictures, **options):
        folder = tmp_path / "images"
        for name, data in pictures.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        (tmp_path / "items.json").write_text(json.dumps(items))
        return convert(llava_source(tmp_path / "items.json"), tmp_path / "out", images=folder, **options)

    return run


def shards(out):
    return [str(file) for file in sorted(out.glob("*.tar"))]


def skipped(out):
    lines = (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["entry"], line["id"], line["fault"]) for line in map(json.loads, lines)]


# --- what comes out --------------------------------------------------------------------------------------------------


def test_plain_webdataset_reads_the_shards(run, tmp_path):
    pictures = {f"{n}.jpg": picture(color=n) for n in range(4)} | {"b/5.png": picture("PNG")}
    items = [item(f"i{n}", f"{n}.jpg") for n in range(4)]
    items += [item("text"), item("two", ["3.jpg", "b/5.png"], talk("<image> or <image>?", "Größer: 図"))]
    report = run(items, pictures, per_shard=4)
    read = list(webdataset.WebDataset(shards(tmp_path / "out"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{n:09d}" for n in range(6)]
    assert [sample.get("jpg") for sample in read[:5]] == [pictures[f"{n}.jpg"] for n in range(4)] + [None]
    assert (read[5]["0.jpg"], read[5]["1.png"]) == (pictures["3.jpg"], pictures["b/5.png"])
    assert json.loads(read[5]["json"]) == {
        "images": ["0.jpg", "1.png"],
        "id": "two",
        "conversations": talk("<image> or <image>?", "Größer: 図"),
        "files": ["3.jpg", "b/5.png"],
    }
    assert json.loads(read[4]["json"]) == {"images": [], "id": "text", "conversations": talk("What?", "This.")}
    assert (report["samples"], report["images"], report["shards"], report["skipped"]) == (6, 6, 2, {})
    assert len(list(read_samples(shards(tmp_path / "out")))) == 6


def test_manifest_and_report_say_what_the_shards_are_of(run, tmp_path):
    report = run([item("a", "a.jpg"), item("b", "b.jpg"), item("c")], {"a.jpg": picture()}, per_shard=2)
    out = tmp_path / "out"
    manifest = read_manifest(out)
    source = (tmp_path / "items.json").read_bytes()
    assert manifest["source"] == {
        "kind": "llava",
        "unit": "conversations",
        "files": [{"name": "items.json", "bytes": len(source), "sha256": hashlib.sha256(source).hexdigest()}],
        "options": {"per_shard": 2, "strict": False},
    }
    for shard in manifest["shards"]:
        assert hashlib.sha256((out / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    assert json.loads((out / "report.json").read_text()) == {k: v for k, v in report.items() if k != "complete"}
    assert report["conversations"] == {"read": 3, "written": 2, "skipped": 1}
    assert report["skipped"]["missing-image"]["count"] == 1
    assert str(tmp_path) not in "".join((out / name).read_text() for name in ("manifest.json", "report.json"))
    assert sorted(os.listdir(out)) == [
        "manifest.json",
        "report.json",
        "shard-000000.tar",
        "shard-000001.tar",
        "skipped.jsonl",
    ]


def test_key_is_the_place_in_the_source_whatever_is_skipped(run, tmp_path):
    items = [item(str(n), f"{n}.jpg") for n in range(7)]
    run(items, {f"{n}.jpg": picture() for n in (1, 2, 6)}, per_shard=3)
    assert [sample.key for sample in read_samples(shards(tmp_path / "out"))] == ["000000001", "000000002", "000000006"]
    assert [entry for entry, _, _ in skipped(tmp_path / "out")] == [0, 3, 4, 5]
    # Of the second shard nothing is left, so there is none.
    assert [file.rpartition("/")[2] for file in shards(tmp_path / "out")] == ["shard-000000.tar", "shard-000002.tar"]


def test_vqa_stores_a_picture_once(tmp_path):
    questions = [{"image_id": 1 + n % 2, "question": f"Q{n}?", "question_id": n} for n in range(5)]
    answers = [{"question_id": n, "multiple_choice_answer": f"a{n}", "answers": []} for n in range(4)]
    files = tmp_path / "q.json", tmp_path / "a.json"
    files[0].write_text(json.dumps({"questions": questions, "data_subtype": "val2014"}))
    files[1].write_text(json.dumps({"annotations": answers}))
    for number in (1, 2):
        (tmp_path / f"COCO_val2014_{number:012d}.jpg").write_bytes(picture())
    report = convert(vqa_source("vqav2", *files, tmp_path), tmp_path / "out", images=tmp_path)
    assert report["questions"] == {"read": 5, "written": 4, "skipped": 1}
    first, second = read_samples(shards(tmp_path / "out"))
    assert first.record["conversations"] == talk("<image>\nQ0?", "a0", "Q2?", "a2")
    assert [question["question_id"] for question in second.record["questions"]] == [1, 3]
    assert (len(first.images), first.record["files"]) == (1, ["COCO_val2014_000000000001.jpg"])
    assert skipped(tmp_path / "out") == [(0, "4", "no-answer")]


def test_question_of_a_lost_picture_is_counted(tmp_path):
    questions = [{"image_id": f"p{n // 3}", "question": "Q?", "question_id": n, "answers": ["a"]} for n in range(6)]
    (tmp_path / "q.json").write_text(json.dumps({"data": questions}))
    (tmp_path / "p1.jpg").write_bytes(picture())
    report = convert(vqa_source("textvqa", tmp_path / "q.json", None, tmp_path), tmp_path / "out", images=tmp_path)
    assert report["questions"] == {"read": 6, "written": 3, "skipped": 3}
    assert report["skipped"]["missing-image"] | {"examples": 0} == {
        "meaning": "a picture that the record names is not there",
        "count": 1,
        "items": 3,
        "examples": 0,
    }


def test_table_and_folder_give_captions(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    texts = {"a": "ein großer Hund\n", "b": "two\nlines"}
    for name, text in texts.items():
        (images / f"{name}.png").write_bytes(picture("PNG"))
        (images / f"{name}.txt").write_text(text, encoding="utf-8")
    (images / "c.png").write_bytes(picture("PNG"))
    (images / "c.txt").write_bytes(b"caf\xe9")
    (images / "d.png").write_bytes(picture("PNG"))
    (images / "d.txt").write_bytes(b" \n")
    with open(tmp_path / "t.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("image", "caption"), *((f"{name}.png", text) for name, text in texts.items())])
    convert(folder_source(images), tmp_path / "folder", images=images)
    convert(table_source(tmp_path / "t.csv", images), tmp_path / "table", images=images)
    for out in ("folder", "table"):
        samples = list(read_samples(shards(tmp_path / out)))
        assert [sample.record["captions"] for sample in samples] == [["ein großer Hund"], ["two\nlines"]]
        assert [sample.record["id"] for sample in samples] == ["a.png", "b.png"]
    assert skipped(tmp_path / "folder") == [(2, "c.png", "not-utf8"), (3, "d.png", "no-text")]


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "data", "fault"),
    [
        ("x.jpg", None, "missing-image"),
        ("", None, "missing-image"),
        ("good.jpg/x.jpg", None, "missing-image"),
        ("folder.jpg", "folder", "missing-image"),
        ("pipe.jpg", "pipe", "missing-image"),
        ("x" * 300, None, "missing-image"),
        ("x.jpg", b"", "empty-file"),
        ("x.jpg", b"<html>404 Not Found</html>", "not-an-image"),
        ("x.jpg", picture(size=(64, 64))[:-200], "damaged-image"),
        ("x.png", picture("PNG", size=(64, 64))[:-30], "damaged-image"),
        ("x.png", bomb(), "too-many-pixels"),
        ("../out.jpg", None, "unsafe-name"),
        ("a/../../images/good.jpg", None, "unsafe-name"),
        ("/etc/hostname", None, "unsafe-name"),
        ("good.jpg\0.png", None, "unsafe-name"),
        ("\ud83d.jpg", None, "not-utf8"),
    ],
)
def test_picture_that_cannot_be_used_is_counted_under_its_name(run, tmp_path, image, data, fault):
    folder = tmp_path / "images"
    folder.mkdir()
    if data == "folder":
        (folder / image).mkdir()
    elif data == "pipe":
        os.mkfifo(folder / image)
    pictures = {"good.jpg": picture()} | ({image: data} if isinstance(data, bytes) else {})
    items = [
        item("good", "good.jpg"),
        item("bad", image),
        item("both", ["good.jpg", image], talk("<image><image>", "a")),
    ]
    report = run(items, pictures)
    assert skipped(tmp_path / "out") == [(1, "bad", fault), (2, "both", fault)]
    assert {name: found["count"] for name, found in report["skipped"].items()} == {fault: 2}
    assert (report["samples"], report["images"]) == (1, 1)


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        (talk("<image> <image>", "a", "<image>", "b"), "placeholder-count"),
        ([{"from": "human", "value": "a"}] * 2, "turn-order"),
        ([{"from": "system", "value": "a"}, *talk("b", "c")], "turn-order"),
        (talk("Alone?"), "no-answer"),
        (talk("Empty?", " "), "no-answer"),
        ([{"from": "human"}, {"from": "gpt", "value": "a"}], "wrong-type"),
        ("text", "wrong-type"),
        (talk("half \ud83d", "b"), "not-utf8"),
    ],
)
def test_conversation_that_cannot_be_used_is_counted_under_its_name(run, tmp_path, turns, fault):
    run([item("bad", "a.jpg", turns), item("good", "a.jpg"), {"id": "none"}], {"a.jpg": picture()})
    assert skipped(tmp_path / "out") == [(0, "bad", fault), (2, "none", "no-text")]


def test_picture_larger_than_is_read_is_not_written_either(run, tmp_path):
    (tmp_path / "images").mkdir()
    with open(tmp_path / "images" / "huge.jpg", "wb") as file:
        file.truncate((1 << 30) + 1)
    run([item("a", "huge.jpg"), item("b")], {})
    assert skipped(tmp_path / "out") == [(0, "a", "too-large")]


def test_half_of_a_surrogate_pair_anywhere_is_found_before_it_is_written(run, tmp_path):
    run([item("a\udc00"), item("b") | {"model": ["\udfff"]}, item("c")], {})
    assert [fault for _, _, fault in skipped(tmp_path / "out")] == ["not-utf8", "not-utf8"]
    assert [sample.record["id"] for sample in read_samples(shards(tmp_path / "out"))] == ["c"]


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(exif=exif)


ODD = {
    "wrong-extension": ("x.jpg", picture("PNG"), "png"),
    "cmyk": ("x.jpg", picture(mode="CMYK", color=(1, 2, 3, 4)), "jpg"),
    "16-bit": ("x.png", picture("PNG", mode="I;16"), "png"),
    "alpha": ("x.png", picture("PNG", mode="RGBA", color=(1, 2, 3, 4)), "png"),
    "animated": ("x.gif", picture("GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")]), "gif"),
    "exif-rotation": ("x.jpg", turned(), "jpg"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_picture_is_kept_and_counted_or_skipped_when_strict(run, tmp_path, name):
    image, data, suffix = ODD[name]
    items, pictures = [item("plain", "plain.jpg"), item("odd", image)], {"plain.jpg": picture(), image: data}
    report = run(items, pictures)
    assert [sample.images for sample in read_samples(shards(tmp_path / "out"))][1] == ((suffix, data),)
    assert report["oddities"][name]["count"] == 1
    assert report["oddities"][name]["examples"] == [{"entry": 1, "id": "odd", "file": image}]
    (tmp_path / "out").rename(tmp_path / "kept")
    report = run(items, pictures, strict=True)
    assert skipped(tmp_path / "out") == [(1, "odd", name)]
    assert (report["samples"], report["oddities"]) == (1, {})


def test_disk_that_fails_is_no_missing_picture(run, monkeypatch):
    real = os.open

    def failing(path, *rest, **options):
        if str(path).endswith("b.jpg"):
            raise OSError(5, "Input/output error", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(OSError, match=r"Input/output error: .*b\.jpg"):
        run([item("a", "a.jpg"), item("b", "b.jpg")], {"a.jpg": picture(), "b.jpg": picture()})
    monkeypatch.undo()
    assert run([item("a", "a.jpg"), item("b", "b.jpg")], {})["samples"] == 2
