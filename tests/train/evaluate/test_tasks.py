"""The official files of questions: read in their layouts, and refused with the field that is wrong."""

import json

import pytest

from visplice.train.evaluate.tasks import TASKS, has_answers, missing_pictures, read_questions
from visplice.train.scoring.files import JsonFile

VQA = {
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "What is it?", "question_id": 420},
        {"image_id": 7, "question": "Why?", "question_id": 70},
    ],
}
TEXTVQA = {
    "dataset_name": "textvqa",
    "data": [{"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "brand?", "answers": ["dakota"] * 10}],
}
DOCVQA = {
    "dataset_name": "docvqa",
    "dataset_split": "test",
    "data": [{"questionId": 57344, "question": "What is the date?", "image": "documents/xnbl0037_1.png", "docId": 1}],
}
TEXTCAPS = {
    "data": [
        {"image_id": "aa", "caption_str": "a sign", "caption_id": 1},
        {"image_id": "aa", "caption_str": "a red sign", "caption_id": 2},
        {"image_id": "bb", "caption_str": "a shop", "caption_id": 3},
    ]
}
COCO = {"images": [{"id": 391895, "file_name": "COCO_val2014_000000391895.jpg"}], "annotations": [{"image_id": 391895}]}


@pytest.fixture
def read(tmp_path):
    """Reads a value as the questions of a task, from a folder with these pictures."""

    def read(task, value, *pictures):
        images = tmp_path / "images"
        for name in ("", *pictures):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / name).touch() if name else images.mkdir(exist_ok=True)
        (tmp_path / "questions.json").write_text(json.dumps(value))
        return read_questions(TASKS[task], JsonFile.read(str(tmp_path / "questions.json")), images)

    return read


@pytest.mark.parametrize(
    ("task", "value", "picture", "expected"),
    [
        ("vqav2", VQA, "val2014/COCO_val2014_000000000042.jpg", (420, "What is it?")),
        ("vqav2", VQA, "COCO_val2014_000000000042.jpg", (420, "What is it?")),
        ("okvqa", VQA, "000000000042.jpg", (420, "What is it?")),
        (
            "vqav2",
            VQA | {"data_type": "scenes", "data_subtype": "test"},
            "scenes_test_000000000042.png",
            (420, "What is it?"),
        ),
        ("textvqa", TEXTVQA, "train_images/003a8ae2ef43b901.jpg", (34602, "brand?")),
        ("docvqa", DOCVQA, "documents/xnbl0037_1.png", (57344, "What is the date?")),
        ("docvqa", DOCVQA, "xnbl0037_1.png", (57344, "What is the date?")),
        ("textcaps", TEXTCAPS, "train_images/aa.jpg", ("aa", "")),
        ("coco", COCO, "val2014/COCO_val2014_000000391895.jpg", (391895, "")),
    ],
)
def test_official_layouts_are_read(read, task, value, picture, expected):
    first = read(task, value, picture)[0]
    assert (first.id, first.text, first.image) == (*expected, picture)


def test_a_row_for_each_caption_is_one_picture(read):
    assert [question.id for question in read("textcaps", TEXTCAPS)] == ["aa", "bb"]


def without(value, key, field):
    return value | {key: [{name: item for name, item in row.items() if name != field} for row in value[key]]}


@pytest.mark.parametrize(
    ("task", "value", "message"),
    [
        ("vqav2", TEXTVQA, "field 'questions' is missing, expected a list; found the fields dataset_name, data"),
        ("vqav2", without(VQA, "questions", "question_id"), r"questions\[0\]: field 'question_id' is missing"),
        ("vqav2", without(VQA, "questions", "question"), r"questions\[0\]: field 'question' is missing"),
        ("textvqa", without(TEXTVQA, "data", "image_id"), r"data\[0\]: field 'image_id' is missing"),
        ("docvqa", without(DOCVQA, "data", "image"), r"data\[0\]: field 'image' is missing, expected text"),
        ("docvqa", VQA, "field 'data' is missing"),
        ("coco", without(COCO, "images", "file_name"), r"images\[0\]: field 'file_name' is missing"),
        ("vqav2", VQA | {"questions": VQA["questions"][:1] * 2}, "1 values of 'question_id' come twice or more: 420"),
        ("vqav2", VQA | {"data_subtype": "../x"}, "data_type and data_subtype are 'mscoco' and '../x'"),
        ("docvqa", {"data": [DOCVQA["data"][0] | {"image": "../../etc/x"}]}, "'../../etc/x', which leads out"),
        ("coco", {"images": [{"id": 1, "file_name": "/etc/x.jpg"}]}, "'/etc/x.jpg', which leads out"),
    ],
)
def test_a_wrong_layout_is_refused_with_its_field(read, task, value, message):
    with pytest.raises(ValueError, match=message):
        read(task, value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps(VQA))
    with pytest.raises(ValueError, match=r"--images .*none: there is no such folder"):
        read_questions(TASKS["vqav2"], JsonFile.read(str(tmp_path / "q.json")), tmp_path / "none")


def test_missing_pictures_are_named(read, tmp_path):
    questions = read("vqav2", VQA, "COCO_val2014_000000000042.jpg")
    assert missing_pictures(questions, tmp_path / "images") == ["COCO_val2014_000000000007.jpg"]


@pytest.mark.parametrize(
    ("task", "value", "expected"),
    [
        ("vqav2", VQA, False),
        ("textvqa", TEXTVQA, True),
        ("docvqa", DOCVQA, False),
        ("textcaps", TEXTCAPS, True),
        ("coco", COCO, True),
        ("coco", {"images": COCO["images"]}, False),
    ],
)
def test_answers_in_the_file_of_questions_are_noticed(tmp_path, task, value, expected):
    (tmp_path / "q.json").write_text(json.dumps(value))
    assert has_answers(TASKS[task], JsonFile.read(str(tmp_path / "q.json"))) is expected
