"""Predictions on disk: what is kept through a kill, and which folder is refused."""

import errno
import json

import pytest

from visplice.train.evaluate.journal import Journal

SETTINGS = {"task": "vqav2", "prompt": "{question}"}


def row(name):
    return {"question_id": name, "answer": f"answer {name}"}


def begun(folder, **changes):
    journal = Journal(folder, SETTINGS, **changes)
    journal.begin()
    return journal


def test_lines_of_several_processes_end_in_the_order_of_the_questions(tmp_path):
    for process, names in ((0, (3, 1)), (1, ("b", 2))):
        journal = begun(tmp_path, process=process)
        journal.add(map(row, names))
        journal.close()
    journal = Journal(tmp_path, SETTINGS)
    rows = journal.finish([1, 2, 3, "b"])
    assert [one["question_id"] for one in rows] == [1, 2, 3, "b"]
    assert (tmp_path / "predictions.jsonl").read_text() == "".join(json.dumps(one) + "\n" for one in rows)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["predictions.jsonl", "run.json"]
    assert Journal(tmp_path, SETTINGS).finished


def test_a_line_that_was_cut_off_is_taken_back(tmp_path):
    journal = begun(tmp_path)
    journal.add([row(1), row(2)])
    journal.close()
    file = tmp_path / "answers-0.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    journal = begun(tmp_path)
    assert set(journal.answered()) == {1}
    journal.add([row(2)])
    assert journal.answered() == {1: row(1), 2: row(2)}


def test_answers_of_another_run_are_refused_with_what_differs(tmp_path):
    begun(tmp_path).close()
    with pytest.raises(ValueError, match=r"prompt was '{question}' and is 'Q: {question}' now; give another --out"):
        Journal(tmp_path, SETTINGS | {"prompt": "Q: {question}"})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "predictions.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds predictions.jsonl, but no run.json"):
        Journal(tmp_path, SETTINGS)


def test_a_second_process_is_kept_out(tmp_path):
    first = begun(tmp_path)
    with pytest.raises(ValueError, match="another process is answering into this folder"):
        begun(tmp_path)
    first.close()
    begun(tmp_path).close()


def test_a_full_disk_says_how_to_go_on(tmp_path, monkeypatch):
    journal = begun(tmp_path)

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "_stream", Full())
    with pytest.raises(OSError, match=r"the disk is full under .*; make room and run the same command again"):
        journal.add([row(1)])
