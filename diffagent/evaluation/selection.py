"""How good a ranking of models is, and how far its probabilities can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffagent.agent.selector import Choice
from diffagent.evaluation.bootstrap import Array, Interval
from diffagent.schemas.api import T2IAPI

CUTOFFS = (1, 5, 10)


def ranking_metrics(choices: Sequence[Choice], truth: T2IAPI) -> dict[str, float]:
    """Accuracy at 1, 5 and 10 and reciprocal rank, of the model and of its version.

    Several calls of one model are one choice of a model. Invalid answers take a place in the
    ranking and are never right.
    """
    calls = [(c.text, "") if c.verdict.api is None else _name(c.verdict.api) for c in choices]
    wanted = _name(truth)
    ranks = {
        "model": _rank(list(dict.fromkeys(model for model, _ in calls)), wanted[0]),
        "version": _rank(list(dict.fromkeys(calls)), wanted),
    }
    found: dict[str, float] = {}
    for what, rank in ranks.items():
        found |= {f"{what}@{k}": float(rank <= k) for k in CUTOFFS}
        found[f"{what}_mrr"] = 1 / rank
    return found


def _name(api: T2IAPI) -> tuple[str, str]:
    return api.model, api.version


def _rank(ranked: Sequence[object], wanted: object) -> float:
    return ranked.index(wanted) + 1 if wanted in ranked else float("inf")


@dataclass(frozen=True)
class Bin:
    """Predictions of about one probability: their mean, and how many of them were right."""

    predicted: float
    right: float
    n: int


def reliability(probabilities: Array, right: Array, bins: int = 10) -> list[Bin]:
    """The reliability curve in bins of equal mass, lowest probabilities first.

    Args:
        probabilities: (n,) of what was chosen.
        right: (n,) 1 or 0: whether it was right.
        bins: how many; fewer where there are fewer predictions.
    """
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return [Bin(float(probabilities[p].mean()), float(right[p].mean()), len(p)) for p in parts]


def expected_calibration_error(probabilities: Array, right: Array, bins: int = 10) -> float:
    """Mean distance of probability and accuracy over bins of equal mass (Nguyen & O'Connor 2015).

    NaN without predictions.
    """
    if not len(probabilities):
        return float("nan")
    found = reliability(probabilities, right, bins)
    return sum(b.n * abs(b.predicted - b.right) for b in found) / len(probabilities)


def clustered_intervals(
    values: Array,
    groups: NDArray[np.int64],
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """Mean and percentile interval of each column by a bootstrap over groups.

    Pictures of one group (one post, one series) stand and fall together, so groups are drawn.

    Args:
        values: (n, m) float, one row a prompt, none of them NaN.
        groups: (n,) which group a prompt is of.
        samples: number of resamples.
        confidence: of the interval, two-sided.
        seed: of the resamples, the same for all columns.
    """
    if not len(values):
        return [Interval(np.nan, np.nan, np.nan, 0)] * values.shape[1]
    _, places = np.unique(groups, return_inverse=True)
    sizes = np.bincount(places)
    sums = np.stack([np.bincount(places, weights=column) for column in values.T], axis=1)
    rng = np.random.default_rng(seed)
    means = np.empty((samples, values.shape[1]))
    for sample in range(samples):
        drawn = rng.integers(len(sizes), size=len(sizes))
        means[sample] = sums[drawn].sum(axis=0) / sizes[drawn].sum()
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    averages = values.mean(axis=0)
    return [
        Interval(float(mean), float(least), float(most), len(values))
        for mean, least, most in zip(averages, low, high, strict=True)
    ]
