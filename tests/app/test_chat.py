"""The chat page without a browser: what goes into it, how it is built, and how it refuses to start."""

import io
import json
import random
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visplice.app import chat, cli
from visplice.app.make_examples import EXAMPLES, assets, drawn
from visplice.lm.extension import embedded_folder
from visplice.train import scene_words, scenes, slip_words, slips
from visplice.vision.image import ImageError


def test_broken_upload_is_named_without_the_server_s_folder(tmp_path: Any) -> None:
    file = tmp_path / "cat.png"
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    file.write_bytes(picture.getvalue()[:60])
    with pytest.raises(ImageError, match=r"^cat\.png is cut off or damaged"):
        chat.open_upload({"path": str(file)})
    file.write_text("no picture")
    with pytest.raises(ImageError, match=r"^cat\.png is not an image"):
        chat.open_upload({"path": str(file)})


def test_preview_is_bounded_and_leaves_the_picture_alone() -> None:
    image = Image.new("RGB", (4 * chat.PREVIEW, chat.PREVIEW))
    small = chat.preview(image)
    assert small is not None and small.size == (chat.PREVIEW, chat.PREVIEW // 4)
    assert image.size == (4 * chat.PREVIEW, chat.PREVIEW)
    assert chat.preview(None) is None


def test_note_names_everything_of_the_embedded_task() -> None:
    note = chat.shapes_note()
    for word in (*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.POSITIONS, *scenes.BACKGROUNDS, *slips.KEYS):
        assert word in note
    assert "visplice chat --model FOLDER" in note


def test_note_names_the_parts_of_another_model(tmp_path: Any) -> None:
    shipped = json.loads((embedded_folder("projector") / "visplice.json").read_text())
    encoder = shipped["encoder"] | {"model": "some_vit", "weights": "vit.safetensors"}
    (tmp_path / "visplice.json").write_text(json.dumps(shipped | {"encoder": encoder, "lm": "models/llama"}))
    note = chat.model_note(str(tmp_path))
    for word in (str(tmp_path), "some_vit", "vit.safetensors", "models/llama"):
        assert f"`{word}`" in note


def test_page_answers_one_tab_at_a_time_and_offers_no_api(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    model: Any = SimpleNamespace(lm=SimpleNamespace(config=SimpleNamespace(max_seq_len=1024)))
    page = chat.create_app(model, title="t", note="n")
    answers = [fn for fn in page.fns.values() if fn.name == "on_answer"]
    assert [(fn.concurrency_limit, fn.concurrency_id) for fn in answers] == [(1, "model")] * 2  # button and Enter
    assert {fn.api_visibility for fn in page.fns.values()} == {"private"}
    assert page.analytics_enabled is False


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_is_what_its_seed_draws_and_its_answer_is_right(example: Any) -> None:
    shown, picture = drawn(example)
    shipped = Image.open(assets() / example.name).convert("RGB")
    difference = np.abs(np.asarray(shipped, np.int16) - np.asarray(picture.convert("RGB"), np.int16))
    assert difference.mean() < 1  # not zero everywhere: versions of Pillow may round otherwise
    right: dict[str, str] = {}
    if isinstance(shown, scenes.Scene):
        right = {question: scene_words.caption(shown) for question in scene_words.DESCRIBE}
    for seed in range(300):
        ask: Any = scene_words.ask if isinstance(shown, scenes.Scene) else slip_words.ask
        right |= {q.text: q.answer for q in ask(shown, random.Random(seed), 4)}
    assert right[example.question] == example.answer


def test_examples_are_small() -> None:
    assert sum((assets() / example.name).stat().st_size for example in EXAMPLES) < 60_000


def test_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["chat", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"visplice: cannot listen on 127.0.0.1 port {port} (Address already in use); choose another --port or --host\n"
    )


def test_port_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--port", "70000"]) == 2
    assert capsys.readouterr().err == "visplice: --port 70000 is none; ports are 1 to 65535\n"


def test_chat_does_without_lightning() -> None:
    code = "import sys, visplice.app.chat; print(*({'lightning', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
