"""The slips on disk: the official DocVQA layout, which every reader of it takes, and nothing held out in training."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visplice.app.cli import main
from visplice.train import slips
from visplice.train.convert.vqa import vqa_source
from visplice.train.data.shards import read_samples
from visplice.train.embedded_answers import DocSet
from visplice.train.slip_data import ANNOTATIONS_FILE, write_test, write_training
from visplice.vision.image import open_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slips")
    assert write_test(folder, count=20, seed=0)
    return folder


@pytest.fixture(scope="module")
def official(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / ANNOTATIONS_FILE).read_text())
    return read


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_test_set_lies_in_the_official_layout(folder: Path, official: dict[str, Any]) -> None:
    assert official.keys() == {"dataset_name", "dataset_split", "dataset_version", "data"}
    fields = {"questionId", "question", "question_types", "image", "docId", "ucsf_document_id"}
    fields |= {"ucsf_document_page_no", "answers", "data_split"}
    for row in official["data"]:
        assert row.keys() == fields and row["data_split"] == official["dataset_split"] == "val"
        assert row["question_types"][0] in ("form", "table/list", "layout")
        with Image.open(folder / row["image"]) as image:
            assert (image.mode, image.size) == ("RGB", (112, 112))
    ids = [row["questionId"] for row in official["data"]]
    assert len(ids) == len(set(ids)) > 60


def test_every_answer_of_the_test_set_is_held_out(official: dict[str, Any]) -> None:
    assert all(slips.is_held_out(answer) for row in official["data"] for answer in row["answers"])


def test_visplice_score_docvqa_takes_it(
    folder: Path, official: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = official["data"]
    said = [{"questionId": row["questionId"], "answer": row["answers"][0].lower()} for row in rows]
    said[0]["answer"] = "something else"
    (tmp_path / "said.json").write_text(json.dumps(said))
    files = ["--predictions", str(tmp_path / "said.json"), "--annotations", str(folder / ANNOTATIONS_FILE)]
    assert main(["score", "docvqa", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(1 - 1 / len(rows))
    answers = {row["questionId"]: row["answer"] for row in said}
    assert DocSet.read(folder).score(answers).value == pytest.approx(1 - 1 / len(rows))


def test_visplice_data_convert_docvqa_takes_it(folder: Path, official: dict[str, Any], tmp_path: Path) -> None:
    source = vqa_source("docvqa", folder / ANNOTATIONS_FILE, None, folder)
    assert len(source.entries) == 20
    out = tmp_path / "shards"
    files = ["--questions", str(folder / ANNOTATIONS_FILE), "--images", str(folder), "--out", str(out)]
    assert main(["data", "convert", "docvqa", *files]) == 0
    samples = list(read_samples([str(file) for file in sorted(out.glob("*.tar"))]))
    assert len(samples) == 20
    assert sum(len(sample.record["conversations"]) // 2 for sample in samples) == len(official["data"])


def test_set_is_read_with_its_pictures(folder: Path, official: dict[str, Any]) -> None:
    docs = DocSet.read(folder)
    assert docs.image_ids == list(range(20)) and len(docs.questions) == len(official["data"])
    assert all(docs.image_path(row["image_id"]).is_file() for row in docs.questions)
    assert docs.score({q["question_id"]: "" for q in docs.questions}).value == 0


def test_second_call_writes_nothing_and_the_same_seed_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    assert write_test(folder, count=20, seed=0) is False
    write_test(tmp_path, count=20, seed=0)
    assert bytes_of(tmp_path) == bytes_of(folder)
    (tmp_path / "slips.json").unlink()  # interrupted
    assert write_test(tmp_path, count=2, seed=1)
    assert len(list((tmp_path / "documents").iterdir())) == 2


def test_no_training_text_holds_a_held_out_word_or_number(tmp_path: Path) -> None:
    assert write_training(tmp_path, count=120, seed=3)
    assert write_training(tmp_path, count=120, seed=3) is False
    checked = 0
    for sample in read_samples([str(tmp_path / "shard-000000.tar")]):
        assert open_image(sample.images[0][1]).size == (112, 112)
        turns = sample.record["conversations"]
        assert turns[0]["value"].startswith("<image>\n") and len(turns) >= 6
        for turn in turns:
            if turn["from"] == "gpt":
                assert not slips.is_held_out(turn["value"]), turn["value"]
                checked += 1
            else:  # names of items alone are written in capitals
                for word in re.findall(r"\b[A-Z]{3,}\b", turn["value"]):
                    assert not slips.is_held_out(word), word
    assert checked > 400
