"""`visplice data curate`: what it prints, and what it refuses."""

import argparse
import dataclasses
import inspect
import json
import re

import pytest

from visplice.app import cli
from visplice.app.data_curate import add_arguments
from visplice.train.curate.curate import FILTERS
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_shards


@pytest.fixture
def folder(tmp_path):
    """Thirty samples with two captions, every third the same; every seventh is private."""
    samples = []
    for index in range(30):
        captions = [f"caption number {index}", "image of" if index % 3 == 0 else f"another {index}"]
        captions += ["write to joe@example.com"] * (index % 7 == 0)
        samples.append(Sample(key=f"s{index:02d}", images=(("jpg", b"x"),), record={"captions": captions}))
    write_shards(samples, tmp_path / "data", source={"name": "by hand"}, per_shard=7)
    return tmp_path / "data"


def run(*words):
    return cli.main(["data", "curate", *map(str, words)])


def test_command_reports_lists_and_takes_back(folder, capsys, tmp_path):
    assert run(folder, "--list") == 0
    assert "nothing is applied" in capsys.readouterr().out
    assert run(folder, "duplicate-lines", "--keep", 2, "--report", tmp_path / "report.json") == 0
    out = capsys.readouterr().out
    assert "duplicate-lines: 30 samples, 0 dropped, 10 changed, 30 left" in out
    assert "  same-caption: 11\n    shard-000000.tar s06: image of\n" in out
    assert out.count("image of") == 4 and "--undo duplicate-lines" in out
    assert json.loads((tmp_path / "report.json").read_text())["counts"]["edited"] == 10
    assert run(folder, "duplicate-lines", "--keep", 2) == 0
    assert "is applied with these options; nothing to do" in capsys.readouterr().out
    assert run(folder, "privacy", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "j***@e***.com" in out and "joe" not in out and "dry run: nothing was changed" in out
    assert run(folder, "--list") == 0
    assert capsys.readouterr().out == "duplicate-lines: 0 dropped, 10 changed (keep 2)\n"
    assert run(folder, "--undo", "duplicate-lines") == 0
    assert "took back duplicate-lines" in capsys.readouterr().out
    assert run(folder, "--undo", "all") == 0
    assert "nothing is applied" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--undo", "privacy"], "privacy is not applied; nothing is"),
        (["near-lines", "--threshold", "85"], "--threshold is 85.0; it is 0.5 to 1"),
        (["privacy", "--regions", "USA"], "--regions: USA is no region"),
        (["--list", "privacy"], "--list, --undo and --later stand without a filter"),
        (["--list", "--later", "redo"], "--later stands with --undo"),
        (["length"], "length without a bound"),
    ],
)
def test_foolish_commands_end_in_one_line(folder, capsys, words, message):
    assert run(folder, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("visplice: ") and message in error and error.count("\n") == 1


def test_command_without_a_data_set_names_it(tmp_path, capsys):
    for words in (["privacy"], ["--list"], ["--undo", "all"]):
        assert run(tmp_path / "nowhere", *words) == 2
        assert "nowhere" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_without_a_filter_says_what_to_give(folder, capsys):
    assert run(folder) == 2
    assert "give a filter, --list or --undo FILTER" in capsys.readouterr().err


def filter_parsers():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices


def test_every_filter_has_a_command_with_all_its_options():
    parsers = filter_parsers()
    assert list(parsers) and set(parsers) == set(FILTERS)
    for name, (module, kind) in FILTERS.items():
        options = inspect.signature(getattr(__import__(f"visplice.train.curate.{module}", fromlist=[kind]), kind))
        given = {action.dest for action in parsers[name]._actions} - {"help", "dry_run", "report", "workers"}
        assert given == set(options.parameters), name


def test_help_states_the_defaults_that_the_filters_have():
    stated = 0
    for name, parser in filter_parsers().items():
        module, kind = FILTERS[name]
        fields = dataclasses.fields(getattr(__import__(f"visplice.train.curate.{module}", fromlist=[kind]), kind))
        defaults = {field.name: field.default for field in fields}
        for action in parser._actions:
            said = re.search(r"default: ([^)]*)", action.help or "")
            if said is None or action.dest not in defaults or action.dest == "device":
                continue
            default = defaults[action.dest]
            assert said[1] == (",".join(default) if isinstance(default, tuple) else str(default)), (name, action.dest)
            stated += 1
    assert stated >= 12
