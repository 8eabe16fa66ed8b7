"""`visplice ask`: an answer, or one line that says what is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from visplice.app.cli import main
from visplice.lm.extension import EMBEDDED, load_backbones, load_extension, save_extension
from visplice.lm.prompt import TURNS
from visplice.lm.vision_llama import VisionLlama, user_message
from visplice.projector.mlp import Projector, ProjectorConfig, rms
from visplice.train.backbone_vision import VISION

QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """Folder of a fresh projector between the embedded backbones."""
    torch.manual_seed(0)
    vision, llama, tokenizer = load_backbones(replace(VISION, weights=EMBEDDED), EMBEDDED)
    projector = Projector(ProjectorConfig(d_vision=vision.dim, d_lm=llama.config.dim, hidden=32))
    model = VisionLlama(vision, projector, llama, tokenizer, TURNS)
    projector.calibrate(model.features(torch.zeros(1, 3, 112, 112)), rms(llama.tok_embeddings.weight))
    folder = tmp_path_factory.mktemp("extension")
    save_extension(model, folder, lm=EMBEDDED)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Paths of two pictures."""
    paths = []
    for color in ("red", "navy"):
        paths.append(str(tmp_path / f"{color}.png"))
        Image.new("RGB", (120, 90), color).save(paths[-1])
    return paths


@pytest.fixture
def ask(extension, capsys):
    """Exit status, standard output and standard error."""

    def run(*words):
        capsys.readouterr()
        status = main(["ask", "--model", str(extension), *words])
        return status, *capsys.readouterr()

    return run


def test_answer_is_that_of_chat(ask, extension, pictures):
    status, out, err = ask(QUESTION, "--image", pictures[0])
    expected = load_extension(extension).chat([user_message(QUESTION, pictures[:1])], max_new_tokens=64)
    assert (status, out, err) == (0, expected + "\n", "")
    assert expected.strip()


def test_several_pictures_stand_at_their_marks(ask, extension, pictures):
    text = "Compare <image> with <image>."
    status, out, _ = ask(text, "--image", pictures[0], "--image", pictures[1], "--max-new-tokens", "5")
    expected = load_extension(extension).chat([user_message(text, pictures)], max_new_tokens=5)
    assert (status, out) == (0, expected + "\n")


def test_question_without_a_picture_is_answered(ask):
    status, out, _ = ask("a small red ring at the top, background black. What color is the ring?")
    assert status == 0 and out.strip()


def test_seed_fixes_what_sampling_draws(ask, pictures):
    def drawn(seed):
        return ask(QUESTION, "--image", pictures[0], "--temperature", "3", "--seed", seed, "--max-new-tokens", "20")[1]

    assert drawn("1") == drawn("1")
    assert drawn("1") != drawn("2")


def test_half_precision_answers(ask, pictures):
    status, out, _ = ask(QUESTION, "--image", pictures[0], "--dtype", "bfloat16", "--device", "cpu")
    assert status == 0 and out.strip()


def refused(result, *named):
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("visplice: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err
    for words in named:
        assert words in err


def test_missing_picture_is_named(ask):
    refused(ask(QUESTION, "--image", "nowhere.png"), "nowhere.png: there is no such file")


def test_file_that_is_no_picture_is_named(ask, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("not a picture")
    refused(ask(QUESTION, "--image", str(file)), f"{file} is not an image in a known format")


def test_cut_picture_is_named(ask, pictures, tmp_path):
    file = tmp_path / "cut.png"
    file.write_bytes(Path(pictures[0]).read_bytes()[:-40])
    refused(ask(QUESTION, "--image", str(file)), f"{file} is cut off or damaged")


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question_is_refused(ask, question):
    refused(ask(question), "the question is empty")


def test_more_pictures_than_marks_are_refused(ask, pictures):
    words = ("What is <image>?", "--image", pictures[0], "--image", pictures[1])
    refused(ask(*words), "prompt has 1 image slot but 2 images were given; each <image> needs one file")


def test_mark_without_a_picture_is_refused(ask):
    refused(ask("What is <image>?"), "prompt has 1 image slot but 0 images were given")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_device_is_said_with_what_there_is(ask):
    refused(ask(QUESTION, "--device", "cuda"), "--device cuda", "there is cpu")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--top-p", "1.5"), "top_p is 1.5"),
        (("--top-p", "0"), "top_p is 0.0"),
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--max-new-tokens", "5000"), "1024 positions"),
    ],
)
def test_bad_sampling_is_named(ask, words, named):
    refused(ask(QUESTION, *words), named)


def test_unknown_model_folder_is_named(ask, tmp_path):
    refused(ask(QUESTION, "--model", str(tmp_path / "none")), f"{tmp_path / 'none' / 'visplice.json'}: no such file")
