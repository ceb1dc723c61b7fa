"""Intervals: closed forms, coverage on simulated data, pairing, missing values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffagent.evaluation.bootstrap import (
    bootstrap_intervals,
    resampled_means,
    wilson_interval,
    wins,
)


def column(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def test_resampled_means_agree_with_a_loop() -> None:
    values = np.array([[1.0, 5.0], [2.0, math.nan], [4.0, -1.0]])
    got = resampled_means(values, samples=400, rng=np.random.default_rng(7))
    rng = np.random.default_rng(7)
    draws = np.concatenate([rng.multinomial(3, [1 / 3] * 3, size=k) for k in (250, 150)])
    for counts, means in zip(draws, got, strict=True):
        rows = np.repeat(values, counts, axis=0)
        assert means[0] == pytest.approx(rows[:, 0].mean())
        second = rows[:, 1][np.isfinite(rows[:, 1])]
        assert math.isnan(means[1]) if not second.size else means[1] == pytest.approx(second.mean())


def test_the_spread_is_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 1))
    means = resampled_means(values, samples=4000, rng=np.random.default_rng(1))
    error = values.std() / math.sqrt(400)  # of the empirical distribution
    assert means.std() == pytest.approx(error, rel=0.05)
    (interval,) = bootstrap_intervals(values, samples=4000)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        sample = rng.exponential(1.0, size=(80, 1))  # skewed, as rewards with a floor are
        (i,) = bootstrap_intervals(sample, samples=400, confidence=0.9, seed=trial)
        hits += i.low <= 1.0 <= i.high
    assert 0.83 <= hits / 300 <= 0.95  # 0.9, with 300 trials' own spread of 0.017 and the skew


def test_pairing_sees_what_separate_intervals_cannot() -> None:
    rng = np.random.default_rng(4)
    prompt = rng.normal(0, 5, size=200)  # some prompts are hard for everyone
    a, b = prompt + rng.normal(0.3, 0.2, size=200), prompt + rng.normal(0, 0.2, size=200)
    first, second, paired = bootstrap_intervals(np.stack([a, b, a - b], axis=1))
    assert first.low < second.high
    assert paired.low > 0.2 and paired.high < 0.4
    assert paired.mean == pytest.approx(first.mean - second.mean)


def test_columns_of_one_call_share_their_resamples() -> None:
    values = np.random.default_rng(5).normal(size=(30, 1))
    one, two = bootstrap_intervals(np.concatenate([values, 2 * values], axis=1), samples=200)
    assert (two.low, two.high) == (pytest.approx(2 * one.low), pytest.approx(2 * one.high))


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(6).normal(size=(50, 2))
    assert bootstrap_intervals(values, seed=1) == bootstrap_intervals(values, seed=1)
    assert bootstrap_intervals(values, seed=1) != bootstrap_intervals(values, seed=2)


def test_missing_values_do_not_count() -> None:
    (interval,) = bootstrap_intervals(column([1.0, math.nan, 3.0, math.nan]))
    assert (interval.mean, interval.n) == (2.0, 2)
    assert 1.0 <= interval.low < interval.high <= 3.0


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_nothing_to_average(values: list[float]) -> None:
    (interval,) = bootstrap_intervals(column(values))
    assert math.isnan(interval.mean) and math.isnan(interval.low) and interval.n == 0


def test_one_value_has_no_limits() -> None:
    (interval,) = bootstrap_intervals(column([2.0, math.nan]))
    assert (interval.mean, interval.n) == (2.0, 1)
    assert math.isnan(interval.low) and math.isnan(interval.high)


def test_a_rate_of_zero_is_not_certain() -> None:
    zeros = column([0.0] * 100)
    (rate,) = bootstrap_intervals(zeros, rates=[True])
    assert (rate.mean, rate.low) == (0.0, 0.0)
    z2 = 1.959964**2
    assert rate.high == pytest.approx(z2 / (100 + z2), rel=1e-5)  # Wilson's closed form at 0
    (ones,) = bootstrap_intervals(zeros + 1, rates=[True])
    assert ones.high == 1.0 and ones.low == pytest.approx(1 - rate.high)
    (difference,) = bootstrap_intervals(zeros)  # equal answers do differ by exactly nothing
    assert (difference.low, difference.high) == (0.0, 0.0)


def test_wilson_against_a_published_value() -> None:
    # Newcombe 1998, table I: 81 of 263 -> 0.2553 to 0.3662 (method 3)
    low, high = wilson_interval(81, 263, 0.95)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_ties_are_half_a_win() -> None:
    a, b = np.array([1.0, 2.0, 0.0, math.nan]), np.array([0.0, 2.0, 5.0, 1.0])
    assert wins(a, b)[:3].tolist() == [1.0, 0.5, 0.0]
    assert math.isnan(wins(a, b)[3])
