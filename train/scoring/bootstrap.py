"""How sure a mean over questions is: a percentile bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
_MAX_DRAWN = 1 << 24  # counts that are held at once


def resampled_means(scores: Sequence[float], seed: int = 0) -> NDArray[np.float64]:
    """Means `[2000]` of `scores`, the questions drawn again with replacement.

    Raises:
        ValueError: if there are no scores.
    """
    if not scores:
        raise ValueError("found no scores, expected at least one")
    # Questions with the same score are interchangeable, so it is enough to draw how often each value comes.
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    generator, shares = np.random.default_rng(seed), counts / len(scores)
    at_once = max(1, _MAX_DRAWN // len(values))
    means = [
        generator.multinomial(len(scores), shares, size=min(at_once, NUM_RESAMPLES - done)) @ values / len(scores)
        for done in range(0, NUM_RESAMPLES, at_once)
    ]
    return np.concatenate(means)


def interval_of(means: NDArray[np.float64]) -> tuple[float, float]:
    """Ends of the 95 % interval that resampled means lie in."""
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean of `scores`, the questions drawn again with replacement 2,000 times.

    Raises:
        ValueError: if there are no scores.
    """
    return interval_of(resampled_means(scores, seed))
