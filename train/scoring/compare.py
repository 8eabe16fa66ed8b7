"""Whether one model is better than another on the same questions: a paired bootstrap and McNemar's exact test.

What is drawn again is the difference on each question, which has less variance than two separate means where both find
the same questions hard (Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004). McNemar's
test looks at right and wrong alone, and only at the questions on which the two differ (McNemar, 1947).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from visplice.train.scoring.bootstrap import CONFIDENCE, NUM_RESAMPLES, interval, interval_of, resampled_means
from visplice.train.scoring.files import some
from visplice.train.scoring.result import mean
from visplice.train.scoring.sides import Side

THRESHOLD = 0.5
# Were both equally good, k differences would all point one way with probability 2 ** (1 - k): above 5 % up to five.
MIN_DIFFERENT = 6


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """How often two models are right on the same questions, and the exact two-sided p of the difference."""

    threshold: float  # a score from here on is right
    both_right: int
    only_a_right: int
    only_b_right: int
    both_wrong: int
    p: float


def mcnemar(a: Sequence[float], b: Sequence[float], threshold: float = THRESHOLD) -> McNemar:
    """McNemar's exact test of two sides' scores on the same questions, in the same order."""
    right = [(one >= threshold, other >= threshold) for one, other in zip(a, b, strict=True)]
    only_a, only_b = right.count((True, False)), right.count((False, True))
    return McNemar(
        threshold=threshold,
        both_right=right.count((True, True)),
        only_a_right=only_a,
        only_b_right=only_b,
        both_wrong=right.count((False, False)),
        p=sign_p(only_a, only_b),
    )


def sign_p(one: int, other: int) -> float:
    """Two-sided p of `one` heads and `other` tails of a fair coin."""
    total, fewer = one + other, min(one, other)
    if one == other:
        return 1.0
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def compare(a: Side, b: Side, *, seed: int = 0, threshold: float | None = None) -> dict[str, Any]:
    """What `visplice compare --json` prints.

    Args:
        a, b: the two sides.
        seed: of the draws.
        threshold: the score from which on an answer counts as right; None is 0.5, and no test of right and wrong where
            scores go beyond 1 (CIDEr-D), since nothing then says what is right.

    Raises:
        ValueError: if the two sides are of different questions.
    """
    _check_same_questions(a, b)
    names = list(a.scores)
    of_a, of_b = ([side.scores[name] for name in names] for side in (a, b))
    differences = [there - here for here, there in zip(of_a, of_b, strict=True)]
    means = resampled_means(differences, seed)
    means[np.abs(means) < 1e-12] = 0  # thirds that cancel leave a rest, which is no difference
    low, high = interval_of(means)
    # The sample itself counts as one of the draws, so that p is never 0.
    not_better, not_worse = int((means <= 0).sum()), int((means >= 0).sum())
    num_different = sum(difference != 0 for difference in differences)
    known = all(0 <= score <= 1 for score in (*of_a, *of_b)) or threshold is not None
    test = mcnemar(of_a, of_b, THRESHOLD if threshold is None else threshold) if known else None
    better = None
    if num_different >= MIN_DIFFERENT and (low > 0 or high < 0):
        better = "b" if low > 0 else "a"
    return {
        "a": _told(a, of_a, seed),
        "b": _told(b, of_b, seed),
        "num_questions": len(names),
        "num_different": num_different,
        "difference": mean(differences),
        "interval": [low, high],
        "p": min(1.0, 2 * (min(not_better, not_worse) + 1) / (NUM_RESAMPLES + 1)),
        "share_b_not_better": not_better / NUM_RESAMPLES,
        "bootstrap": {"confidence": CONFIDENCE, "resamples": NUM_RESAMPLES, "seed": seed, "paired": True},
        "mcnemar": asdict(test) if test else None,
        "better": better,
    }


def _check_same_questions(a: Side, b: Side) -> None:
    missing = []
    for side, other in ((a, b), (b, a)):
        if lacking := [name for name in other.scores if name not in side.scores]:
            missing.append(
                f"{side.path} lacks {len(lacking)} of the {len(other.scores)} in {other.path}: {some(lacking)}"
            )
    if missing:
        raise ValueError(f"the two sides are not of the same questions: {'; '.join(missing)}")


def _told(side: Side, scores: Sequence[float], seed: int) -> dict[str, Any]:
    return {
        "path": side.path,
        "measure": side.measure,
        "score": mean(scores),
        "interval": list(interval(scores, seed)),
        "files": {name: {"path": file.path, "sha256": file.sha256} for name, file in side.files.items()},
    }


def comparison_text(told: Mapping[str, Any]) -> str:
    """The same for a person; a point is a hundredth."""
    lines = []
    for name in ("a", "b"):
        side = told[name]
        low, high = side["interval"]
        what = f"{side['measure']} " if side["measure"] else ""
        lines.append(
            f"{name.upper()}: {what}{side['score']:.4f}, 95 % interval {low:.4f} to {high:.4f}, {side['path']}"
        )
    lines.append(f"questions: {told['num_questions']}, of which {told['num_different']} are scored differently")
    low, high = told["interval"]
    lines.append(
        f"difference B - A: {told['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} "
        f"({told['bootstrap']['resamples']:,} paired resamples, seed {told['bootstrap']['seed']}); "
        f"B is not better in {100 * told['share_b_not_better']:.1f} % of them"
    )
    if test := told["mcnemar"]:
        lines.append(
            f"right is a score of {test['threshold']:g} or more: both {test['both_right']}, only A "
            f"{test['only_a_right']}, only B {test['only_b_right']}, neither {test['both_wrong']}; "
            f"McNemar's exact test p = {p_text(test['p'])}"
        )
    else:
        lines.append("McNemar's test: left out, scores go beyond 1; --threshold says from where on one is right")
    return "\n".join([*lines, verdict(told)])


def verdict(told: Mapping[str, Any]) -> str:
    """One sentence: which side is better, or that it cannot be told, and why."""
    low, high = (100 * end for end in told["interval"])
    difference, p = 100 * told["difference"], f"p = {p_text(told['p'])}"
    if told["better"] == "b":
        return f"B is better than A (difference {difference:.1f} points, 95 % interval {low:.1f} to {high:.1f}, {p})"
    if told["better"] == "a":
        return f"A is better than B (difference {-difference:.1f} points, 95 % interval {-high:.1f} to {-low:.1f}, {p})"
    if told["num_different"] < MIN_DIFFERENT:
        return (
            f"no difference can be told ({told['num_different']} of {told['num_questions']} questions are scored "
            f"differently; fewer than {MIN_DIFFERENT} can all point one way by chance)"
        )
    return f"no difference can be told (B - A {difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, {p})"


def p_text(p: float) -> str:
    """Two digits that count."""
    return f"{p:.1e}" if p < 0.0001 else f"{p:.2g}"
