"""A small benchmark in VQAv2's layout, and the shipped model."""

import json

import pytest

from visplice.lm.extension import EMBEDDED, load_extension
from visplice.train.evaluate.run import EvalConfig
from visplice.train.scene_data import ANNOTATIONS_FILE, QUESTIONS_FILE, write_test


@pytest.fixture(scope="session")
def model():
    """The shipped model."""
    return load_extension(EMBEDDED)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Folder of 24 pictures with three questions each; some lose a question, so that numbers differ."""
    folder = tmp_path_factory.mktemp("scenes")
    write_test(folder, count=24, seed=3, questions=3)
    for name, key in ((QUESTIONS_FILE, "questions"), (ANNOTATIONS_FILE, "annotations")):
        content = json.loads((folder / name).read_text())
        content[key] = [row for row in content[key] if row["question_id"] % 7]
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def config(scenes, tmp_path):
    """Builds the config of a run over it; keyword arguments change it."""

    def make(**changes):
        given = {
            "task": "vqav2",
            "model": EMBEDDED,
            "questions": str(scenes / QUESTIONS_FILE),
            "annotations": str(scenes / ANNOTATIONS_FILE),
            "images": str(scenes / "images"),
            "out": str(tmp_path / "out"),
        }
        return EvalConfig(**given | changes)

    return make
