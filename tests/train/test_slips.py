"""Slips: the split is exact, the patches hold what is said of them, and every question has one answer, as printed."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from visplice.train import slip_words, slips
from visplice.train.scenes import IMAGE_SIZE, TEST, TRAIN
from visplice.train.slips import KEYS, PATCH, SIGNS, SIZES, Slip


def drawn(split: str, count: int, seed: int = 0) -> list[Slip]:
    rng = random.Random(seed)
    return [slips.sample_slip(rng, split) for _ in range(count)]


def content(slip: Slip) -> set[str]:
    """Every word and number of a slip, without the keys."""
    names = {line.name for line in slip.lines if line.role == slips.ITEM}
    return names | {line.value for line in slip.lines}


def test_no_word_or_number_of_a_test_slip_occurs_on_any_training_slip() -> None:
    def plain(text: str) -> str:
        return "".join(sign for sign in text if sign.isalnum())

    train = {plain(text) for slip in drawn(TRAIN, 1500) for text in content(slip)}
    test = {plain(text) for slip in drawn(TEST, 1500, seed=1) for text in content(slip)}
    assert len(train) > 5000 and len(test) > 2000
    assert not train & test
    assert not any(slips.is_held_out(text) for text in train) and all(slips.is_held_out(text) for text in test)


def test_one_word_or_number_in_five_is_held_out_however_it_is_punctuated() -> None:
    share = np.mean([slips.is_held_out(f"{number:04d}") for number in range(10_000)])
    assert 0.18 < share < 0.22
    assert slips.is_held_out("14/03") == slips.is_held_out("14:03") == slips.is_held_out("1403")


def test_other_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'val'; it is 'train' or 'test'"):
        slips.sample_slip(random.Random(0), "val")


def test_every_font_size_and_kind_of_line_is_drawn() -> None:
    found = drawn(TRAIN, 600)
    assert {slip.font for slip in found} == set(slips.FONTS) and len(slips.FONTS) >= 3
    assert {(slip.kind, slip.size) for slip in found} == {(k, s) for k in ("receipt", "label") for s in SIZES}
    assert {line.role for slip in found for line in slip.lines} == {*KEYS, slips.SHOP, slips.ITEM}
    assert {len(slip.lines) for slip in found} == {3, 4, 5, 6, 7}
    assert {sign for slip in found for line in slip.lines for sign in line.text} == {*SIGNS, " "}


def test_fonts_draw_every_sign_in_another_way() -> None:
    for size, plan in SIZES.items():
        for sign in SIGNS:
            glyphs = [slips._glyph(font, size, sign) for font in slips.FONTS]
            assert all(glyph.any() and glyph.shape[1] <= plan.advance * 4 for glyph in glyphs)
            assert len({glyph.tobytes() for glyph in glyphs}) == len(glyphs)


def test_lines_are_a_name_and_a_value_where_they_say() -> None:
    for slip in drawn(TRAIN, 300) + drawn(TEST, 300):
        for line in slip.lines:
            assert line.text[line.start :] == line.value and 3 <= len(line.value) <= 10
            assert line.text[: line.start].rstrip().removesuffix(":").lstrip() == line.name
            assert len(line.text) <= SIZES[slip.size].most_cells
        items = [line.name[0] for line in slip.lines if line.role == slips.ITEM]
        assert len(items) == len(set(items))  # so that a name's first letter tells which


def test_slips_lie_anywhere_whole_and_with_every_centre_clear_of_the_patches_edges() -> None:
    found = drawn(TRAIN, 500)
    for slip in found:
        plan = SIZES[slip.size]
        width = max(len(line.text) for line in slip.lines)
        for centre in (*(slip.centre(cell) for cell in range(width)), *slip.ys):
            assert 0.75 <= centre % PATCH <= PATCH - 0.75
        assert slip.x >= plan.advance / 2 and slip.centre(width - 1) <= IMAGE_SIZE - plan.advance / 2
        assert slip.ys[0] >= plan.height / 2 and slip.ys[-1] <= IMAGE_SIZE - plan.height / 2
    assert len({(slip.x % 1, slip.x // 1) for slip in found}) > 30
    assert {slip.x % 1 for slip in found} == {0, 0.25, 0.5, 0.75}


def test_grid_by_hand() -> None:
    line = slips.Line("TOTAL", "TOTAL", "12.50", "TOTAL 12.50", 6)
    grid = slips.grid_of(Slip("receipt", "sans", "small", (line,), 19.0, (50.0,)))
    rows = [range(24, 32)]  # the line lies in patches 50 // 14 = 3
    assert [SIGNS[i - 1] if i else "" for i in (grid.left[p] for p in rows[0])] == [
        "",
        "T",
        "T",
        "L",
        "1",
        ".",
        "0",
        "",
    ]
    assert [SIGNS[i - 1] if i else "" for i in (grid.right[p] for p in rows[0])] == ["", "O", "A", "", "2", "5", "", ""]
    assert [grid.cell[p] for p in rows[0]] == [0, 1, 3, 5, 7, 9, 11, 0]
    assert [grid.line[p] for p in rows[0]] == [0, 1, 1, 1, 1, 1, 1, 0]
    assert not any(values[p] for values in (grid.left, grid.right, grid.cell, grid.line) for p in range(24))


def test_grid_holds_every_sign_once_and_in_order() -> None:
    for slip in drawn(TRAIN, 200):
        grid, by_line = slips.grid_of(slip), defaultdict(list)
        for patch, number in enumerate(grid.line):
            if number:
                signs = [SIGNS[i - 1] for i in (grid.left[patch], grid.right[patch]) if i]
                by_line[number - 1] += signs
        for number, line in enumerate(slip.lines):
            assert "".join(by_line[number]) == line.text.replace(" ", "")


@pytest.mark.parametrize("font", slips.FONTS)
@pytest.mark.parametrize("size", SIZES)
def test_ink_lies_where_the_grid_says(font: str, size: str) -> None:
    value = "84.20"
    plan = SIZES[size]
    line = slips.Line("TOTAL", "TOTAL", value, "TOTAL " + value, 6)
    slip = Slip("receipt", font, size, (line,), plan.advance / 2 + 1, (52.0,))
    picture = np.asarray(slips.render(slip, random.Random(0)).convert("L"), np.float32)
    paper = np.median(picture[47:57, 4:78])
    for cell, sign in enumerate(line.text):
        left = slip.centre(cell) - plan.advance / 2
        box = picture[45:59, round(left) : round(left + plan.advance)]
        darkest = paper - box.min()
        assert darkest > 60 if sign != " " else darkest < 40, (sign, darkest)


def test_questions_are_answered_by_the_line_they_ask_about() -> None:
    rng = random.Random(0)
    types = Counter()
    for slip in drawn(TEST, 300):
        questions = slip_words.ask(slip, rng, 4)
        assert len(questions) == min(4, len(slip.lines)) == len({question.line for question in questions})
        for question in questions:
            line = slip.lines[question.line]
            assert question.answer == line.value and len(question.answer) <= 10
            if line.role == slips.ITEM:
                assert line.name in question.text
            else:
                # No question is asked that two lines could answer.
                assert sum(other.role == line.role for other in slip.lines) == 1
            types[question.question_type] += 1
    assert set(types) == {"form", "table/list", "layout"} and min(types.values()) > 50


def test_caption_names_kind_and_size() -> None:
    for slip in drawn(TRAIN, 50):
        text = slip_words.caption(slip)
        assert slip.kind in text and slip.size in text and f"{len(slip.lines)} lines" in text
