"""`visplice export`: the shipped model goes to transformers and answers alike there."""

import json
import re
import subprocess
import sys
from pathlib import Path

from visplice.app.cli import main
from visplice.lm import export
from visplice.lm.vision_llama import VisionLlama
from visplice.vision._torchvision import declare_missing_operators

declare_missing_operators()  # transformers imports torchvision

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "export_parity.py"


def test_the_shipped_model_is_equal_in_transformers(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "embedded", "--to", "hf-llava", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{out}: LLaVA for transformers, float32, 22.8 MiB" in told
    assert "equal to transformers" in told and "greedy tokens in 6 of 6 prompts" in told
    parity = json.loads((out / "PARITY.json").read_text())
    assert parity["equal"] and parity["largest_logit_difference"] < 1e-4
    assert parity["largest_logit_difference_own_pixels_pillow"] < 1e-3  # of logits up to 23
    assert parity["versions"]["transformers"] and set(parity["sha256"]) > {"config.json", "model.safetensors"}
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "which was not run" in card
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    picture = Path(__file__).parents[2] / "app/assets/example_1.png"
    exec(program.replace("FOLDER", str(out)).replace("picture.png", str(picture)), {})  # the card's own lines
    answer = VisionLlama.from_pretrained("embedded").generate([picture], ["What is in the picture?"])
    assert capsys.readouterr().out.strip() == answer[0] != ""


def test_the_shipped_model_gives_the_same_answers_there():
    result = subprocess.run(
        [sys.executable, str(PROGRAM), "--questions", "20"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\| embedded \| 20 \| \S+ \| 20 \| (9\d|100)\.\d%", result.stdout)


def test_a_difference_ends_with_status_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert main(["export", "embedded", "--out", str(tmp_path / "out")]) == 1
    assert "NOT EQUAL to transformers" in capsys.readouterr().out
    assert "NOT equal" in (tmp_path / "out/README.md").read_text()


def test_without_transformers_it_says_so_and_claims_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["export", "embedded", "--out", str(tmp_path / "out")]) == 0
    assert "not compared with transformers, so nothing is claimed: transformers cannot be" in capsys.readouterr().out
    assert not (tmp_path / "out/PARITY.json").exists() and (tmp_path / "out/config.json").exists()


def test_no_check_runs_nothing(tmp_path, capsys):
    assert main(["export", "embedded", "--out", str(tmp_path / "out"), "--no-check", "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "bfloat16, 11.4 MiB" in told and "nothing is claimed: it was not asked for" in told


def test_what_is_wrong_ends_in_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for words, why in (
        ([str(tmp_path), "--out", str(tmp_path / "out")], "no such file; an extension folder holds visplice.json"),
        (["embedded", "--out", str(tmp_path / "full")], "is not empty; give a new or an empty folder"),
    ):
        assert main(["export", *words]) == 2
        told = capsys.readouterr().err
        assert why in told and told.count("\n") == 1
