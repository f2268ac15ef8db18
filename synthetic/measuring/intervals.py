"""Means over units and their uncertainty: bootstrap intervals of means and of paired differences, seeded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, SEED = 10_000, 0
SHARE = 0.95  # of the resampled means that an interval covers
Values = Sequence[float | None]  # one per unit; None where nothing could be measured


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` units, and the interval [low, high] that holds it; all NaN without units."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero. False for a single unit, whose interval has no width."""
        return self.count > 1 and (self.low > 0 or self.high < 0)


def estimate(values: Values) -> Estimate:
    """Mean and percentile bootstrap interval: RESAMPLES draws of units with replacement, from a fixed seed."""
    known = np.array([value for value in values if value is not None and not math.isnan(value)], np.float64)
    if not len(known):
        return Estimate(math.nan, math.nan, math.nan, 0)
    drawn = np.random.default_rng(SEED).integers(len(known), size=(RESAMPLES, len(known)))
    tail = (1 - SHARE) / 2
    low, high = np.quantile(known[drawn].mean(axis=1), (tail, 1 - tail))
    return Estimate(float(known.mean()), float(low), float(high), len(known))


def paired_difference(ours: Values, theirs: Values) -> Estimate:
    """Estimate the mean of `ours - theirs` over the units that have both."""
    pairs = zip(ours, theirs, strict=True)
    return estimate([None if a is None or b is None else a - b for a, b in pairs])
