"""Two sides on the same questions: the tests against statsmodels, the interval against simulation."""

from typing import Any

import numpy as np
import pytest

from visplice.train.scoring.compare import compare, comparison_text, mcnemar, sign_p, verdict
from visplice.train.scoring.sides import Side


def side(scores: list[float], path: str = "x", start: int = 0) -> Side:
    return Side(path=path, scores=dict(enumerate(scores, start)), files={})


def compared(a: list[float], b: list[float], **options: Any) -> dict[str, Any]:
    return compare(side(a, "a"), side(b, "b"), **options)


# mcnemar([[30, b], [c, 40]], exact=True) of statsmodels 0.15.0.
@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (12, 5, 0.143463134765625),
        (0, 6, 0.03125),
        (1, 9, 0.021484375),
        (40, 61, 0.046044066929342785),
        (300, 352, 0.04570814364241254),
        (5100, 5310, 0.04051284866040278),
        (2, 0, 0.5),
        (5, 5, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_that_of_statsmodels(only_a: int, only_b: int, p: float) -> None:
    assert sign_p(only_a, only_b) == pytest.approx(p, rel=1e-9)
    a = [1.0] * 30 + [1.0] * only_a + [0.0] * only_b + [0.0] * 40
    b = [1.0] * 30 + [0.0] * only_a + [1.0] * only_b + [0.0] * 40
    found = mcnemar(a, b)
    assert found.p == pytest.approx(p, rel=1e-9)
    counts = found.both_right, found.only_a_right, found.only_b_right, found.both_wrong
    assert counts == (30, only_a, only_b, 40)


def test_a_score_at_the_threshold_is_right() -> None:
    assert mcnemar([0.3, 0.6], [0.6, 0.3], threshold=0.6).only_a_right == 1
    assert mcnemar([0.3, 0.6], [0.6, 0.3], threshold=0.61).both_wrong == 2


def test_paired_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 400 samples of 150 correlated questions, 95 % within what chance allows (3 standard errors)."""
    rng, held = np.random.default_rng(0), 0
    for trial in range(400):
        hard = rng.random(150)  # the same question is hard for both
        a, b = ((rng.random(150) < chance).astype(float).tolist() for chance in (hard, 0.2 + 0.8 * hard))
        low, high = compared(a, b, seed=trial)["interval"]
        held += low <= 0.1 <= high  # 0.2 + 0.8 * 0.5 - 0.5
    assert 0.917 <= held / 400 <= 0.983


def test_equally_good_sides_are_seldom_told_apart() -> None:
    rng, told = np.random.default_rng(1), 0
    for trial in range(200):
        hard = rng.random(80)
        a, b = ((rng.random(80) < hard).astype(float).tolist() for _ in range(2))
        told += compared(a, b, seed=trial)["better"] is not None
    assert told / 200 <= 0.1


def test_pairing_narrows_the_interval_of_correlated_scores() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    a = (rng.random(300) < hard).astype(float)
    b = np.where(rng.random(300) < 0.9, a, 1.0)
    told = compared(a.tolist(), b.tolist())
    low, high = told["interval"]
    widths = [told[name]["interval"][1] - told[name]["interval"][0] for name in ("a", "b")]
    separate = (widths[0] ** 2 + widths[1] ** 2) ** 0.5  # of the difference of two independent means
    assert high - low < 0.6 * separate
    shuffled = compared(a.tolist(), rng.permutation(b).tolist())["interval"]
    assert shuffled[1] - shuffled[0] == pytest.approx(separate, rel=0.15)


def test_better_side_is_named_with_its_numbers() -> None:
    a, b = [0.0] * 60 + [1.0] * 40, [0.0] * 50 + [1.0] * 50
    told = compared(a, b)
    assert (told["better"], told["num_questions"], told["num_different"]) == ("b", 100, 10)
    assert told["difference"] == pytest.approx(0.1) and told["share_b_not_better"] == 0
    assert told["p"] == pytest.approx(2 / 2001)
    low, high = (100 * end for end in told["interval"])
    assert verdict(told) == (
        f"B is better than A (difference 10.0 points, 95 % interval {low:.1f} to {high:.1f}, p = 0.001)"
    )
    turned = compared(b, a)
    assert turned["better"] == "a" and verdict(turned).startswith("A is better than B (difference 10.0 points")
    assert comparison_text(told).splitlines()[-1] == verdict(told)


def test_five_differences_are_too_few_and_six_are_enough() -> None:
    for num, better in ((5, None), (6, "b")):
        told = compared([0.0] * 40, [1.0] * num + [0.0] * (40 - num))
        assert told["better"] == better
    assert "5 of 40 questions are scored differently" in verdict(compared([0.0] * 40, [1.0] * 5 + [0.0] * 35))


def test_equal_sides_cannot_be_told_apart() -> None:
    scores = [0.0, 0.3, 0.6, 0.9, 1.0] * 8
    told = compared(scores, scores)
    assert (told["better"], told["p"], told["interval"], told["mcnemar"]["p"]) == (None, 1.0, [0.0, 0.0], 1.0)
    assert verdict(told).startswith("no difference can be told")


def test_differences_that_cancel_are_no_difference() -> None:
    """0.9 - 0.6 is not 0.6 - 0.3 in floating point; what is left of it must not count as better."""
    a, b = [0.3, 0.9] * 20, [0.6, 0.6] * 20
    told = compared(a, b)
    assert told["better"] is None and 0.4 < told["share_b_not_better"] < 0.7 and told["p"] > 0.8


def test_order_of_the_lines_does_not_matter() -> None:
    a, b = [0.0, 0.3, 1.0, 0.6] * 10, [0.3, 0.3, 1.0, 0.0] * 10
    turned = Side(path="b", scores=dict(reversed(side(b).scores.items())), files={})
    assert compare(side(a, "a"), turned) == compare(side(a, "a"), side(b, "b"))


def test_other_questions_are_refused_with_examples_of_both_sides() -> None:
    with pytest.raises(ValueError) as error:
        compare(side([0.0] * 9, "one.jsonl"), side([0.0] * 9, "two.jsonl", start=2))
    assert "one.jsonl lacks 2 of the 9 in two.jsonl: 9, 10" in str(error.value)
    assert "two.jsonl lacks 2 of the 9 in one.jsonl: 0, 1" in str(error.value)


def test_scores_beyond_one_have_no_right_and_wrong_unless_it_is_said() -> None:
    a, b = [0.0, 1.5, 3.0] * 5, [0.5, 2.0, 2.0] * 5
    assert compared(a, b)["mcnemar"] is None
    assert "McNemar's test: left out" in comparison_text(compared(a, b))
    assert compared(a, b, threshold=2.0)["mcnemar"]["only_b_right"] == 5
