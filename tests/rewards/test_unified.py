"""The unified score against closed forms and the published table."""

import json

import numpy as np
import pytest

from diffagent.errors import ConfigError, ScoreError
from diffagent.rewards.unified import MetricReference, Unifier, chatgen_terms, read_reference

REFERENCE = {
    "clip": MetricReference(0.25, 0.05, "c"),
    "hps_v2": MetricReference(0.27, 0.01, "h"),
    "image_reward": MetricReference(0.0, 1.0, "i"),
}
EQUAL = dict.fromkeys(REFERENCE, 1.0)


@pytest.mark.parametrize(
    ("fid", "clip", "hps", "image_reward", "unified"),
    [  # arXiv 2411.17176, table 4
        (32.7, 64.6, 20.2, -34.6, 37.3),
        (21.3, 69.9, 23.5, 2.4, 59.0),
        (20.8, 70.7, 23.9, 4.0, 60.7),
        (19.1, 72.9, 25.1, 8.9, 65.9),
        (41.4, 70.6, 23.4, -3.1, 52.5),
        (40.7, 72.5, 25.0, 5.1, 59.2),
    ],
)
def test_chatgen_score_with_fid_added_reproduces_the_published_rows(
    fid, clip, hps, image_reward, unified
):
    raw = [np.array([x]) for x in (clip / 250, hps / 100, image_reward / 100)]
    without_fid = sum(term[0] for term in chatgen_terms(*raw).values())
    assert (100 - fid + without_fid) / 4 == pytest.approx(unified, abs=0.06)


def test_zscore_is_the_weighted_mean_of_standardised_metrics():
    unifier = Unifier("zscore", {"clip": 1, "hps_v2": 2, "image_reward": 1}, -10, REFERENCE)
    got = unifier.unify({"clip": [0.30, 0.25], "hps_v2": [0.26, 0.27], "image_reward": [2, 0]})
    np.testing.assert_allclose(got, [(1 * 1 + 2 * -1 + 1 * 2) / 4, 0.0], atol=1e-12)


def test_chatgens_weights_are_equal_as_published_unless_others_are_given():
    metrics = {"clip": [0.3], "hps_v2": [0.27], "image_reward": [0.5]}
    assert Unifier("chatgen", EQUAL, -10).unify(metrics) == pytest.approx([(75 + 120 + 50) / 3])
    weights = {"clip": 1, "hps_v2": 0, "image_reward": 3}
    assert Unifier("chatgen", weights, -10).unify(metrics) == pytest.approx([(75 + 150) / 4])


@pytest.mark.parametrize("method", ["zscore", "chatgen"])
def test_invalid_calls_are_below_every_valid_one(method):
    unifier = Unifier(method, EQUAL, -10, REFERENCE)
    metrics = {"clip": [-1.0, 0.3, np.nan], "hps_v2": [-1, 0.3, 0], "image_reward": [-50, 1, 0]}
    scores = unifier.unify(metrics, np.array([True, True, False]))
    assert scores[2] == -10
    assert scores[2] < scores[0] < scores[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_refused_with_metric_and_row(bad):
    unifier = Unifier("zscore", EQUAL, -10, REFERENCE)
    metrics = {"clip": [0.1, 0.2], "hps_v2": [0.2, bad], "image_reward": [0, 0]}
    with pytest.raises(ScoreError, match=r"hps_v2 is (nan|inf) for picture 1"):
        unifier.unify(metrics)


def test_missing_metrics_and_wrong_lengths_are_refused():
    unifier = Unifier("zscore", EQUAL, -10, REFERENCE)
    with pytest.raises(ScoreError, match="hps_v2"):
        unifier.unify({"clip": [0.1], "image_reward": [0]})
    with pytest.raises(ScoreError, match="shape"):
        unifier.unify({"clip": [0.1], "hps_v2": [0.1, 0.2], "image_reward": [0]})


def test_a_unifier_that_cannot_work_is_a_config_error():
    with pytest.raises(ConfigError, match="chatgen"):
        Unifier("chatgen", {"clip": 1.0}, -10)
    with pytest.raises(ConfigError, match="hps_v2"):
        Unifier("zscore", EQUAL, -10, {k: v for k, v in REFERENCE.items() if k != "hps_v2"})
    with pytest.raises(ConfigError, match="weights"):
        Unifier("zscore", dict.fromkeys(EQUAL, 0.0), -10, REFERENCE)
    with pytest.raises(ConfigError, match="std"):
        Unifier("zscore", {"clip": 1.0}, -10, {"clip": MetricReference(0.0, 0.0, "c")})


def test_digest_follows_what_changes_the_score():
    base = Unifier("zscore", EQUAL, -10, REFERENCE)
    moved = {**REFERENCE, "clip": MetricReference(0.26, 0.05, "c")}
    others = [
        Unifier("zscore", EQUAL, -10, moved),
        Unifier("zscore", {**EQUAL, "clip": 2.0}, -10, REFERENCE),
        Unifier("zscore", EQUAL, -20, REFERENCE),
        Unifier("chatgen", EQUAL, -10),
        Unifier("chatgen", {**EQUAL, "clip": 2.0}, -10),
        Unifier("zscore", EQUAL, -10, REFERENCE, {"note": "other pictures"}),
    ]
    assert len({u.digest for u in [base, *others]}) == 7
    assert base.digest == Unifier("zscore", dict(EQUAL), -10, dict(REFERENCE)).digest


def test_reference_files_are_read_or_refused_by_name(tmp_path):
    file = tmp_path / "reference.json"
    metrics = {"clip": {"mean": 1, "std": 2, "digest": "d"}}
    file.write_text(json.dumps({"note": "drawings", "pictures": 9, "metrics": metrics}))
    assert read_reference(file) == (
        {"clip": MetricReference(1.0, 2.0, "d")},
        {"note": "drawings", "pictures": 9},
    )
    for text in ("[]", "{", '{"metrics": {"clip": {"mean": 1}}}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"reference\.json"):
            read_reference(file)
