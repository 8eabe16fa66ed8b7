"""Whether a model looks: its score beside those of the same questions without the right picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visplice.train.scoring.bootstrap import interval
from visplice.train.scoring.result import Scored, mean


def vision_use(seeing: Scored, blind: Mapping[str, Scored], *, seed: int) -> dict[str, Any]:
    """What the picture is worth, against the best of the controls.

    The questions are the same on both sides, so the interval is that of the differences question by question.

    Returns:
        `control`, `difference` of the means over questions, its 95 % `interval`, `used`: whether that is above 0, and
        `verdict` in words.
    """
    name, best = max(blind.items(), key=lambda item: mean(item[1].scores))
    of_blind = dict(zip(best.ids, best.scores, strict=True))
    differences = [score - of_blind[one] for one, score in zip(seeing.ids, seeing.scores, strict=True)]
    low, high = interval(differences, seed)
    used = low > 0
    range_ = f"95 % interval {low:+.4f} to {high:+.4f}, against the control '{name}'"
    if used:
        verdict = f"the picture is used: it is worth {mean(differences):+.4f} ({range_})"
    else:
        verdict = f"no sign that the picture is used: {mean(differences):+.4f} ({range_})"
    return {
        "control": name,
        "difference": mean(differences),
        "interval": [low, high],
        "used": used,
        "verdict": verdict,
    }
