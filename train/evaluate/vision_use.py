"""Whether a model looks: its score beside those of the same questions without the right picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visplice.train.scoring.bootstrap import interval
from visplice.train.scoring.compare import MIN_DIFFERENT
from visplice.train.scoring.result import Scored, mean


def vision_use(seeing: Scored, blind: Mapping[str, Scored], *, seed: int) -> dict[str, Any]:
    """What the picture is worth, against the best of the controls.

    The questions are the same on both sides, so the interval is that of the differences question by question.

    Returns:
        `control`, `difference` of the means over questions, its 95 % `interval`, `used`: whether that is above 0 and
        more than a handful of questions tell it, and `verdict` in words.
    """
    name, best = max(blind.items(), key=lambda item: mean(item[1].scores))
    of_blind = dict(zip(best.ids, best.scores, strict=True))
    differences = [score - of_blind[one] for one, score in zip(seeing.ids, seeing.scores, strict=True)]
    low, high = interval(differences, seed)
    difference = mean(differences)
    used = low > 0 and sum(one != 0 for one in differences) >= MIN_DIFFERENT
    of_ten = seeing.measure == "CIDEr-D"
    worth, least, most = (f"{value:.3f}" if of_ten else f"{100 * value:.1f}" for value in (difference, low, high))
    unit = "CIDEr-D" if of_ten else "points"
    beside = f"95 % interval {least} to {most}, against {name} pictures"
    verdict = "the picture is used: it is worth" if used else "no sign that the picture is used:"
    return {
        "control": name,
        "difference": difference,
        "interval": [low, high],
        "used": used,
        "verdict": f"{verdict} {worth} {unit} ({beside})",
    }
