"""Bootstrap confidence intervals over prompts (Efron 1979, percentile method).

The prompt is the unit that is drawn, with all selectors' answers to it: every column of one
call sees the same resamples, so differences between selectors stay paired per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_CHUNK = 250  # resamples held at a time: (250, 10_000 prompts) float64 is 20 MB


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` prompts and its confidence limits; NaN where n is too small."""

    mean: float
    low: float
    high: float
    n: int


def resampled_means(values: Array, *, samples: int, rng: np.random.Generator) -> Array:
    """Means of each column over prompts drawn with replacement.

    Args:
        values: (n, m) float; a prompt a row; NaN: this column has no value for the prompt.
        samples: number of resamples, B.
        rng: source of the draws.

    Returns:
        (B, m) float; NaN where a resample drew no prompt that has a value.
    """
    n, m = values.shape
    present = np.isfinite(values)
    filled = np.where(present, values, 0.0)
    means = np.empty((samples, m))
    for start in range(0, samples, _CHUNK):
        stop = min(start + _CHUNK, samples)
        # Drawing n of n with replacement is one multinomial draw of how often each is taken.
        counts = rng.multinomial(n, np.full(n, 1 / n), size=stop - start).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means[start:stop] = (counts @ filled) / (counts @ present.astype(np.float64))
    return means


def bootstrap_intervals(
    values: Array,
    *,
    rates: Sequence[bool] | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """Mean and percentile interval of each column.

    Where all values of a rate are 0, or all 1, resampling cannot tell how uncertain it is (its
    interval is a point); Wilson's interval is given instead.

    Args:
        values: (n, m) float; a prompt a row, a quantity a column, NaN where it has no value.
        rates: which columns are rates, with values from 0 to 1; none by default.
        samples: number of resamples.
        confidence: of the interval, two-sided.
        seed: of the resamples, the same for all columns.

    Returns:
        m intervals. A column with no value has NaN throughout, one with a single value has NaN
        limits.
    """
    if values.shape[0] == 0:
        return [Interval(math.nan, math.nan, math.nan, 0)] * values.shape[1]
    means = resampled_means(values, samples=samples, rng=np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    result = []
    kinds = rates if rates is not None else [False] * values.shape[1]
    for column, resampled, is_rate in zip(values.T, means.T, kinds, strict=True):
        observed = column[np.isfinite(column)]
        mean = float(observed.mean()) if observed.size else math.nan
        if observed.size < 2:
            low = high = math.nan
        elif is_rate and mean in (0.0, 1.0):
            low, high = wilson_interval(int(mean) * observed.size, observed.size, confidence)
        else:
            low, high = (float(q) for q in np.nanquantile(resampled, [tail, 1 - tail]))
        result.append(Interval(mean, low, high, int(observed.size)))
    return result


def wilson_interval(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = hits / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def wins(a: Array, b: Array) -> Array:
    """1 where ``a`` is above ``b``, 0.5 where they are equal, 0 below, NaN where one is missing.

    The mean is the win rate of ``a`` over ``b`` with ties counted half.
    """
    result: Array = (np.sign(a - b) + 1) / 2
    return result
