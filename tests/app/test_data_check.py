"""`visplice data check`: what it prints, and its exit status."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from visplice.app.cli import main
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_shards


def picture(seed, kind="JPEG"):
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def sample(index, *, data=None, key=None, **record):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"thing {index}"}]
    images = (("jpg", data or picture(index)),)
    return Sample(key=key or f"s{index:03d}", images=images, record=record or {"conversations": turns})


def written(tmp_path, samples):
    write_shards(samples, tmp_path / "data", source={"kind": "by hand"}, per_shard=20)
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path, map(sample, range(3)))


def test_command_prints_a_list_and_ends_with_one(tmp_path, capsys):
    samples = [*map(sample, range(6)), *(sample(index, data=b"x" * 9, key=f"bad{index}") for index in range(7))]
    folder = written(tmp_path, samples)
    words = ["data", "check", str(folder), "--workers", "1", "--examples", "2", "--json", str(tmp_path / "report.json")]
    assert main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: 13 samples in 1 shard, ")
    assert lines[0].endswith(" MB; 6 usable, with 6 pictures")
    assert lines[1:3] == ["wrong:", "          7 not-an-image        a picture file in no known format"]
    assert lines[3].startswith("            shard-000000.tar: bad0: bad0.jpg: the image (9 bytes) is not an image")
    assert lines[5] == "            and 5 more"
    assert lines[6].startswith("6 conversations, positions, pictures included: shortest 27")
    assert lines[7].split()[-1] == "#" * 40 and lines[-1] == "not clean"
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["clean"] and len(report["problems"]["not-an-image"]["found"]) == 7


def test_command_ends_with_zero_on_a_clean_set(folder, capsys):
    assert main(["data", "check", str(folder), "--workers", "1"]) == 0
    assert capsys.readouterr().out.endswith("clean\n")


def test_strict_makes_what_is_odd_wrong(tmp_path, capsys):
    folder = written(tmp_path, [sample(0, data=picture(0, "PNG"))])
    assert main(["data", "check", str(folder), "--workers", "1"]) == 0
    assert main(["data", "check", str(folder), "--workers", "1", "--strict"]) == 1
    out = capsys.readouterr().out
    assert out.count("odd:\n          1 wrong-extension") == 2


def test_histogram_has_few_lines_and_loses_nothing(capsys, tmp_path):
    samples = [sample(index, captions=["word " * (1 + index * index)]) for index in range(30)]
    main(["data", "check", str(written(tmp_path, samples)), "--workers", "1", "--no-near"])
    bins = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("   ")]
    assert len(bins) <= 12 and sum(int(words[3]) for words in bins) == 30
    starts = [int(words[0].replace(",", "")) for words in bins]
    assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["http://host/data"], "http://host/data: check reads local folders"),
        ([".", "--against-annotations", "a.json"], "--against-annotations needs --against-questions"),
        ([".", "--max-distance", "40"], "max_distance is 40 bits; it is 0 to 14"),
        ([".", "--tokenizer", "nowhere"], "nowhere"),
        ([".", "--template", "nonsense"], "nonsense"),
    ],
)
def test_user_errors_are_one_line_and_status_two(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    assert main(["data", "check", *words, "--workers", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]


def test_dead_worker_is_one_line(folder, monkeypatch, capsys):
    def dying(*arguments, **options):
        yield from ()
        raise ChildProcessError("worker process 7 was killed (SIGKILL); what is finished is kept for the next run")

    monkeypatch.setattr("visplice.train.check.check.run_tasks", dying)
    assert main(["data", "check", str(folder)]) == 2
    assert capsys.readouterr().err.endswith("visplice: worker process 7 was killed (SIGKILL)\n")
