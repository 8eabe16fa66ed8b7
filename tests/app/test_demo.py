"""The demo on a handful of scenes and slips: its parts, its report, and what an interruption leaves."""

import json
from pathlib import Path

import pytest
import torch

from visplice.app.cli import main
from visplice.app.demo import Plan, run
from visplice.app.demo_scores import score_slips, table
from visplice.lm.extension import load_extension
from visplice.train import trainer
from visplice.train.embedded_answers import DocSet

SMALL = Plan(
    train_scenes=32,
    test_scenes=8,
    questions=3,
    train_slips=16,
    test_slips=6,
    hidden=32,
    align_steps=2,
    align_batch=8,
    symbol_steps=2,
    instruct_steps=2,
    instruct_batch=8,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("demo")
    report, _ = run(out, plan=SMALL, device=CPU, ablate=True)
    return out, report


def test_report_has_its_fields_as_fractions(made: tuple[Path, dict[str, object]]) -> None:
    out, report = made
    assert json.loads((out / "report.json").read_text()) == report
    scenes = json.loads((out / "report.json").read_text())["scenes"]
    assert set(scenes["by_question_type"]) <= {"color", "shape", "count", "existence", "position", "comparison"}
    for value in (scenes["accuracy"], scenes["blind_accuracy"], *scenes["by_question_type"].values()):
        assert 0 <= value <= 1
    assert scenes["blind_accuracy"] == max(scenes["blind_controls"].values())
    assert scenes["num_questions"] == len(
        json.loads((out / "data/test/v2_OpenEnded_scenes_test_questions.json").read_text())["questions"]
    )
    slips = json.loads((out / "report.json").read_text())["slips"]
    assert {"form"} <= set(slips["by_question_type"]) <= {"form", "table/list", "layout"}
    for value in (slips["anls"], slips["exact_match"], slips["blind_anls"], *slips["by_question_type"].values()):
        assert 0 <= value <= 1
    assert slips["blind_anls"] == max(slips["blind_controls"].values())
    assert set(slips["blind_controls"]) == {"blank picture", "another picture", "most frequent answer"}
    assert slips["num_questions"] == len(json.loads((out / "data/slips_test/val_v1.0.json").read_text())["data"])
    # 192 -> 32 -> 256 with biases, and two sentinels.
    assert report["trainable_parameters"] == 192 * 32 + 32 + 32 * 256 + 256 + 2 * 256
    assert report["frozen_unchanged"] is True
    assert {"data", "align", "symbols", "instruct", "evaluate", "total"} <= set(report["seconds"])  # type: ignore[call-overload]


def test_ablations_cover_every_broken_part(made: tuple[Path, dict[str, object]]) -> None:
    out, _ = made
    report = json.loads((out / "report.json").read_text())
    for task in ("scenes", "slips"):
        assert set(report[task]["ablations"]) == {
            "features shuffled between pictures",
            "projector zeroed",
            "stage 2 skipped",
            "stage 1 skipped",
        }


def test_anls_is_that_of_visplice_score(made: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    out, _ = made
    model, docs = load_extension(out / "instruct"), DocSet.read(out / "data/slips_test")
    report, answers = score_slips(model, out / "data/slips_test", out / "data/slips_train")
    said = [{"questionId": question_id, "answer": answer} for question_id, answer in answers.items()]
    (tmp_path / "said.json").write_text(json.dumps(said))
    files = ["--predictions", str(tmp_path / "said.json")]
    files += ["--annotations", str(docs.folder / "val_v1.0.json"), "--json", "--per-question", str(tmp_path / "each")]
    assert main(["score", "docvqa", *files]) == 0
    each = [json.loads(line)["score"] for line in (tmp_path / "each").read_text().splitlines()]
    assert sum(each) / len(each) == pytest.approx(report["anls"])


def test_figures_are_pictures(made: tuple[Path, dict[str, object]]) -> None:
    out, _ = made
    for name in ("losses.png", "accuracy.png", "examples.png", "slips.png"):
        assert (out / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_table_names_every_type_and_the_frozen_parts(made: tuple[Path, dict[str, object]]) -> None:
    _, report = made
    text = table(report)
    assert "color" in text and "slips, ANLS" in text and "unchanged to the byte" in text and "projector zeroed" in text


def test_second_run_trains_nothing_again(
    made: tuple[Path, dict[str, object]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = made
    weights = (out / "instruct/projector.safetensors").read_bytes()
    monkeypatch.setattr(trainer.L.Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    again, _ = run(out, plan=SMALL, device=CPU, ablate=False)
    assert "already trained" in capsys.readouterr().out
    assert (out / "instruct/projector.safetensors").read_bytes() == weights
    assert again["scenes"]["accuracy"] == report["scenes"]["accuracy"]  # type: ignore[index]
    assert again["slips"]["anls"] == report["slips"]["anls"]  # type: ignore[index]


def test_same_seed_gives_the_same_weights(made: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    out, _ = made
    run(tmp_path, plan=SMALL, device=CPU, ablate=False)
    ours, theirs = (folder / "instruct/projector.safetensors" for folder in (out, tmp_path))
    assert ours.read_bytes() == theirs.read_bytes()


def test_interrupted_data_and_interrupted_stage_are_made_again(
    made: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    out, _ = made
    manifest = json.loads((out / "data/train/manifest.json").read_text())
    stopped = tmp_path / "data/train"
    stopped.mkdir(parents=True)
    shard = manifest["shards"][0]["name"]
    (stopped / shard).write_bytes((out / "data/train" / shard).read_bytes()[:5000])  # killed while writing
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "align").mkdir()
    (tmp_path / "align/projector.safetensors").write_bytes(b"half")  # and a stage without its marker
    run(tmp_path, plan=SMALL, device=CPU, ablate=False)
    assert (stopped / shard).read_bytes() == (out / "data/train" / shard).read_bytes()
    ours, theirs = (folder / "instruct/projector.safetensors" for folder in (out, tmp_path))
    assert ours.read_bytes() == theirs.read_bytes()


def test_other_seed_is_other_work(made: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    from dataclasses import replace

    out, _ = made
    run(tmp_path, plan=replace(SMALL, seed=1), device=CPU, ablate=False)
    ours, theirs = (folder / "instruct/projector.safetensors" for folder in (out, tmp_path))
    assert ours.read_bytes() != theirs.read_bytes()
