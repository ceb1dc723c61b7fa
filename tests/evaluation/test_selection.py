"""Ranks, calibration and clustered intervals against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from diffagent.agent.selector import Choice
from diffagent.agent.verify import verify
from diffagent.evaluation.selection import (
    clustered_intervals,
    expected_calibration_error,
    ranking_metrics,
    reliability,
)
from diffagent.schemas.api import T2IAPI
from tests.agent.agent_world import make_catalogue

CATALOGUE = make_catalogue()


def call(model: str, version: str = "v1.0", steps: int = 20) -> T2IAPI:
    params = {"sampler": "DDIM", "steps": steps, "cfg_scale": 7, "width": 64, "height": 64}
    record = {"model": model, "version": version, "base_model": "SD 1.5", "params": params}
    return T2IAPI.model_validate(record)


def choice(text: str) -> Choice:
    return Choice(text, verify(text, CATALOGUE))


def test_ranks_are_of_different_models_and_invalid_answers_take_a_place() -> None:
    texts = [call("Inkline", steps=10), call("Inkline", steps=20), call("Flatland", "v2.0")]
    choices = [choice("no api"), *(choice(api.to_json()) for api in texts)]
    found = ranking_metrics(choices, call("Flatland"))
    assert (found["model@1"], found["model@5"], found["model_mrr"]) == (0, 1, 1 / 3)
    assert (found["version@10"], found["version_mrr"]) == (0, 0)  # another version of it
    assert ranking_metrics(choices, call("Flatland", "v2.0"))["version_mrr"] == 1 / 3
    assert ranking_metrics(choices, call("Graphite"))["model_mrr"] == 0


def test_calibration_error_of_bins_of_equal_mass() -> None:
    chances = np.array([0.9, 0.1, 0.9, 0.1])
    right = np.array([1.0, 0.0, 0.0, 0.0])
    bins = reliability(chances, right, bins=2)
    assert [(b.predicted, b.right, b.n) for b in bins] == [(0.1, 0.0, 2), (0.9, 0.5, 2)]
    assert expected_calibration_error(chances, right, bins=2) == pytest.approx((0.1 + 0.4) / 2)
    assert expected_calibration_error(np.array([0.5, 0.5]), np.array([1.0, 0.0]), 1) == 0
    assert np.isnan(expected_calibration_error(np.zeros(0), np.zeros(0)))


def test_an_interval_over_groups_is_wider_than_over_prompts() -> None:
    values = np.repeat(np.random.default_rng(0).integers(2, size=40), 10).astype(float)[:, None]
    groups = np.repeat(np.arange(40), 10)
    [clustered] = clustered_intervals(values, groups)
    [single] = clustered_intervals(values, np.arange(400))
    assert clustered.mean == single.mean == values.mean()
    assert clustered.n == 400
    assert clustered.high - clustered.low > 2 * (single.high - single.low)
    assert clustered_intervals(values, groups) == [clustered]
    assert clustered_intervals(values[:0], groups[:0])[0].n == 0
