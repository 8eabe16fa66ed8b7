"""The embedded task on disk: official VQAv2 layout, held-out combinations kept out, and no half-made folder reused."""

import json
import re

import pytest
from PIL import Image

from visplice.train import scene_data, scenes, vqa_metric
from visplice.train.data.shards import read_manifest, read_samples
from visplice.train.scene_data import ANNOTATIONS_FILE, QUESTIONS_FILE, training_samples, write_test, write_training
from visplice.vision.image import open_image

NAMED = re.compile(r"\ba (small|big) (\w+) (\w+) (?:at the|in the) ([a-z ]+?)(?= and a | on a )")


def combinations(text):
    """Colour, shape and region of everything that a caption names."""
    return [(color, shape, scenes.POSITIONS.index(place)) for _, color, shape, place in NAMED.findall(text)]


def contents(folder):
    """Every file with its bytes and when it was written."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("test")
    assert write_test(folder, count=30, seed=0, questions=4)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


# --- test scenes -----------------------------------------------------------------------------------------------------


def test_questions_lie_in_the_official_layout(folder):
    file = read(folder, QUESTIONS_FILE)
    assert file.keys() >= {"info", "task_type", "data_type", "data_subtype", "license", "questions"}
    assert file["task_type"] == "Open-Ended"
    assert all(entry.keys() == {"image_id", "question", "question_id"} for entry in file["questions"])
    ids = [entry["question_id"] for entry in file["questions"]]
    assert len(set(ids)) == len(ids) > 100
    assert {entry["image_id"] for entry in file["questions"]} == set(range(30))


def test_annotations_lie_in_the_official_layout(folder):
    file = read(folder, ANNOTATIONS_FILE)
    assert file.keys() >= {"info", "data_type", "data_subtype", "license", "annotations"}
    fields = {"question_id", "image_id", "question_type", "answer_type", "multiple_choice_answer", "answers"}
    questions = {entry["question_id"]: entry for entry in read(folder, QUESTIONS_FILE)["questions"]}
    assert [entry["question_id"] for entry in file["annotations"]] == list(questions)
    for entry in file["annotations"]:
        assert entry.keys() == fields
        assert entry["image_id"] == questions[entry["question_id"]]["image_id"]
        assert entry["answer_type"] in ("yes/no", "number", "other")
        assert [answer["answer_id"] for answer in entry["answers"]] == list(range(1, 11))
        assert {answer["answer"] for answer in entry["answers"]} == {entry["multiple_choice_answer"]}
        assert all(answer.keys() == {"answer", "answer_confidence", "answer_id"} for answer in entry["answers"])


def test_right_answers_score_one_by_the_official_rule(folder):
    annotations = read(folder, ANNOTATIONS_FILE)["annotations"]
    right = {entry["question_id"]: entry["multiple_choice_answer"] for entry in annotations}
    assert vqa_metric.evaluate(annotations, right).accuracy == 1.0


def test_every_question_has_its_picture_under_the_official_name(folder):
    names = sorted(file.name for file in (folder / "images").iterdir())
    file = read(folder, QUESTIONS_FILE)
    pattern = "{data_type}_{data_subtype}_".format(**file) + "{:012d}.png"
    assert names == [pattern.format(image_id) for image_id in range(30)]
    for name in names:
        with Image.open(folder / "images" / name) as image:
            assert (image.mode, image.size) == ("RGB", (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE))


def test_held_out_scenes_are_flagged(tmp_path, monkeypatch):
    drawn = []
    sample_scene = scenes.sample_scene

    def recorded(rng, split, **options):
        drawn.append((split, sample_scene(rng, split, **options)))
        return drawn[-1][1]

    monkeypatch.setattr(scenes, "sample_scene", recorded)
    write_test(tmp_path, count=40, seed=1)
    notes = read(tmp_path, "scenes.json")["scenes"]
    assert list(notes) == [str(index) for index in range(40)] and {split for split, _ in drawn} == {"test"}
    for (_, scene), note in zip(drawn, notes.values(), strict=True):
        novel = any(scenes.is_held_out(o.color, o.shape, o.region) for o in scene.objects)
        assert note["held_out"] is novel
        assert all(word in note["description"] for o in scene.objects for word in (o.color, o.shape, o.size))
    assert 10 < sum(note["held_out"] for note in notes.values()) < 30


def test_second_call_writes_nothing(folder):
    before = contents(folder)
    assert write_test(folder, count=30, seed=0, questions=4) is False
    assert contents(folder) == before


def test_same_seed_gives_the_same_files(folder, tmp_path):
    write_test(tmp_path, count=30, seed=0, questions=4)
    assert {name: data for name, (data, _) in contents(tmp_path).items()} == {
        name: data for name, (data, _) in contents(folder).items()
    }


def test_folder_of_another_seed_is_written_anew(tmp_path):
    assert write_test(tmp_path, count=3, seed=0)
    before = read(tmp_path, QUESTIONS_FILE)
    assert write_test(tmp_path, count=3, seed=1)
    assert read(tmp_path, QUESTIONS_FILE) != before
    assert read(tmp_path, "scenes.json")["source"]["seed"] == 1


@pytest.mark.parametrize("content", [None, "", "{}", '{"source": '])
def test_interrupted_folder_is_written_anew(tmp_path, content):
    write_test(tmp_path, count=2, seed=0)
    whole = {name: data for name, (data, _) in contents(tmp_path).items()}
    (tmp_path / QUESTIONS_FILE).write_text("half")
    marker = tmp_path / "scenes.json"
    marker.unlink() if content is None else marker.write_text(content)
    assert write_test(tmp_path, count=2, seed=0)
    assert {name: data for name, (data, _) in contents(tmp_path).items()} == whole


# --- training scenes -------------------------------------------------------------------------------------------------


def test_training_samples_have_a_picture_a_caption_and_a_conversation(scenes_folder):
    samples = list(read_samples([str(scenes_folder / "shard-000000.tar")]))
    assert [sample.key for sample in samples] == [f"scene{index:06d}" for index in range(48)]
    for sample in samples:
        assert open_image(sample.images[0][1]).size == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
        turns = sample.record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) and 2 <= len(turns) <= 6
        assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
        assert len(sample.record["captions"]) == 1


def test_no_training_text_names_a_held_out_combination(monkeypatch):
    monkeypatch.setattr(scenes, "render", lambda scene, rng: None)
    monkeypatch.setattr(scene_data, "png", lambda image: b"")
    found = 0
    for sample in training_samples(400, seed=7, questions=6):
        (caption,) = sample.record["captions"]
        assert len(combinations(caption)) == caption.count(" and ") + 1
        for text in (caption, *(turn["value"] for turn in sample.record["conversations"])):
            found += len(combinations(text))
            assert not any(scenes.is_held_out(*combination) for combination in combinations(text)), text
    assert found > 1000


def test_training_shards_are_written_once_and_anew_for_another_seed_or_a_lost_file(tmp_path):
    assert write_training(tmp_path, count=4, seed=0)
    before = contents(tmp_path)
    assert write_training(tmp_path, count=4, seed=0) is False
    assert contents(tmp_path) == before
    (tmp_path / "manifest.json").unlink()
    assert write_training(tmp_path, count=4, seed=0)
    assert {name: data for name, (data, _) in contents(tmp_path).items()} == {
        name: data for name, (data, _) in before.items()
    }
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert write_training(tmp_path, count=4, seed=0)
    shard.unlink()
    assert write_training(tmp_path, count=4, seed=0)
    assert write_training(tmp_path, count=4, seed=1)
    assert read_manifest(tmp_path)["source"]["seed"] == 1
    assert contents(tmp_path)["shard-000000.tar"][0] != before["shard-000000.tar"][0]
