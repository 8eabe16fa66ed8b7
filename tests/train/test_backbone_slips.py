"""What the small backbones are taught about slips: labels that fit the slip, and nothing that is held out."""

import random
from itertools import islice

import pytest
import torch

from visplice.lm.checkpoint import load_llama
from visplice.lm.extension import embedded_folder
from visplice.lm.prompt import IGNORE
from visplice.train import scenes, slip_words, slips
from visplice.train.backbone_slips import train_slips
from visplice.train.grid_batches import (
    BLOCK,
    LINE_LABELS,
    NUM_PATCHES,
    PATCHES,
    READ_LABELS,
    ROLES,
    TABLES,
    GridBatches,
)
from visplice.train.grid_tables import SYMBOLS_FILE, Tables, load_symbols
from visplice.train.slip_heads import DENSE, SlipHeads, slip_labels
from visplice.train.slips import SIGNS


@pytest.fixture
def made(monkeypatch):
    """Records slip and questions of every sequence."""
    recorded = []
    ask = slip_words.ask

    def recording(slip, rng, count):
        questions = ask(slip, rng, count)
        recorded.append((slip, questions))
        return questions

    monkeypatch.setattr(slip_words, "ask", recording)
    return recorded


def batches(tokenizer, **options):
    plan = {"num_slips": 6, "num_scenes": 2, "width": 160, "easy": 1}
    return GridBatches(tokenizer, 3, **(plan | options))


def test_sequences_are_a_block_for_the_picture_and_questions_supervised_on_the_answers(tokenizer, made):
    _, batch = islice(batches(tokenizer), 2)
    begin, user, assistant, end = (tokenizer.control(f"<|{n}|>") for n in ("begin", "user", "assistant", "end"))
    assert BLOCK.stop - BLOCK.start == NUM_PATCHES + 3 == 67
    for ids, labels, (slip, questions) in zip(batch.ids.tolist(), batch.labels.tolist(), made[-6:], strict=False):
        assert ids[: BLOCK.start] == [begin, user] and set(ids[BLOCK]) == {tokenizer.control("<|pad|>")}
        position = BLOCK.stop
        fitting = questions[: ids.count(assistant)]
        assert len(fitting) >= 3  # those that fit
        for question in fitting:
            speaks = ids.index(assistant, position)
            stops = ids.index(end, speaks)
            assert tokenizer.decode(ids[position:speaks]) == question.text
            assert tokenizer.decode(ids[speaks + 1 : stops]) == question.answer == slip.lines[question.line].value
            assert labels[position : speaks + 1] == [IGNORE] * (speaks + 1 - position)
            assert labels[speaks + 1 : stops + 1] == ids[speaks + 1 : stops + 1]
            position = stops + 2


def test_grid_and_line_labels_are_those_of_the_slip(tokenizer, made):
    _, batch = islice(batches(tokenizer), 2)
    for row, (slip, _) in enumerate(made[-6:]):
        grid = slips.grid_of(slip)
        assert batch.grid[row, :, : len(DENSE)].tolist() == [
            list(values) for values in zip(grid.left, grid.right, grid.cell, grid.line, strict=True)
        ]
        assert not batch.grid[row, :, len(DENSE) :].any() and batch.whole[row] == 0
        labels = batch.lines[row, PATCHES]
        for patch, number in enumerate(grid.line):
            role, initial, left, right = labels[patch].tolist()
            if not number:
                assert (role, initial, left, right) == (0, 0, 0, 0)
                continue
            line = slip.lines[number - 1]
            assert ROLES[role - 1] == line.role and SIGNS[initial - 1] == line.text.strip()[0]
            for index, sign in ((left, grid.left[patch]), (right, grid.right[patch])):
                assert not index or not sign or line.value[index - 1] == SIGNS[sign - 1]
    # Scenes stand there by what is centred in a patch.
    for row in range(6, 8):
        assert not batch.grid[row, :, : len(DENSE)].any() and batch.grid[row, :, len(DENSE) :].any()
        assert batch.whole[row] > 0 and (batch.lines[row] == IGNORE).all()


def test_every_sign_of_an_answer_is_said_to_stand_where_it_stands(tokenizer, made):
    _, batch = islice(batches(tokenizer), 2)
    checked = 0
    for row, (_, questions) in enumerate(made[-6:]):
        ids = batch.ids[row].tolist()
        due = [p for p in range(160) if batch.signs[row, p, 0] != IGNORE]
        said = {}
        for position in due:
            line, cell = batch.reads[row, position].tolist()
            sign = int(batch.signs[row, position, 0])
            patches = [p for p in range(NUM_PATCHES) if batch.grid[row, p, 3] == line]
            patch = max(p for p in patches if 0 < batch.grid[row, p, 2] <= cell)
            slot = cell - int(batch.grid[row, patch, 2])
            assert batch.grid[row, patch, slot] == sign
            looks = [PATCHES.start + patch, 0]
            assert batch.looks[row, position].tolist() == (looks[::-1] if slot else looks)
            word = tokenizer.decode([ids[position + 1]])
            if word:  # the blank in front of an answer may be a token of its own
                assert word == SIGNS[sign - 1]
                said.setdefault(line - 1, []).append(word)
            checked += 1
        answers = {q.line: q.answer for q in questions}
        assert len(said) > 2 and all("".join(signs) == answers[line] for line, signs in said.items())
    assert checked > 80


def test_no_sequence_holds_a_held_out_word_or_number(tokenizer, made):
    list(islice(batches(tokenizer, num_slips=40), 8))
    values = {line.value for slip, _ in made for line in slip.lines}
    names = {line.name for slip, _ in made for line in slip.lines if line.role == slips.ITEM}
    assert len(values) > 800
    assert not any(slips.is_held_out(text) for text in values | names)


def test_first_batches_are_short_slips(tokenizer, made):
    next(iter(batches(tokenizer, num_slips=20, easy=1000)))
    assert {len(slip.lines) for slip, _ in made} == {3}


def test_tables_add_up_entry_by_entry():
    tables = Tables(8, 0.1)
    grid = torch.zeros(1, NUM_PATCHES, len(TABLES), dtype=torch.long)
    blank = tables(grid, torch.tensor([0]))
    assert blank.shape == (1, NUM_PATCHES + 3, 8)
    grid[0, 5, 0], grid[0, 5, 3] = 7, 2
    changed = tables(grid, torch.tensor([0])) - blank
    left, line = tables.tables[0].weight, tables.tables[3].weight
    torch.testing.assert_close(changed[0, 2 + 5], left[7] - left[0] + line[2] - line[0])
    changed[0, 2 + 5] = 0
    assert not changed.any()


def test_patches_of_a_slip_are_labelled_with_its_signs():
    slip = slips.sample_slip(random.Random(0), scenes.TRAIN)
    labels, grid = slip_labels(slip), slips.grid_of(slip)
    assert {name: labels[name].tolist() for name in DENSE} == {name: getattr(grid, name) for name in DENSE}
    assert int(labels["lines"]) == len(slip.lines)
    stacked = {name: torch.stack([label]) for name, label in labels.items()}
    loss, right = SlipHeads(16)(torch.randn(1, 16), torch.randn(1, NUM_PATCHES, 16), stacked)
    assert loss.isfinite() and 0 <= right <= 1


def test_course_goes_on_from_a_llama_and_its_tables(tmp_path):
    train_slips(tmp_path / "one", start=embedded_folder("lm"), steps=2, seed=0, rows=(2, 1, 1))
    assert (tmp_path / "one" / SYMBOLS_FILE).is_file()
    train_slips(tmp_path / "two", start=tmp_path / "one", steps=1, seed=0, rows=(2, 1, 1))
    first, second = (load_llama(tmp_path / name) for name in ("one", "two"))
    assert (tmp_path / "two/tokenizer.json").read_bytes() == (embedded_folder("lm") / "tokenizer.json").read_bytes()
    moved = (second.layers[0].attention.wq.weight - first.layers[0].attention.wq.weight).abs().max()
    assert 0 < moved < 0.1 * first.layers[0].attention.wq.weight.abs().max()
    one, two = (load_symbols(tmp_path / name).sentinels for name in ("one", "two"))
    assert 0 < (two - one).abs().max() < 0.01


def test_labels_have_the_sizes_of_their_heads(tokenizer):
    batch = next(iter(batches(tokenizer, num_slips=12)))
    for labels, sizes in ((batch.lines, LINE_LABELS), (batch.reads, READ_LABELS)):
        for column, size in enumerate(sizes.values()):
            values = labels[..., column]
            assert values[values != IGNORE].min() >= 0 and values.max() < size
