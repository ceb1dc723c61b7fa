"""The official packages at full size score the same file with the same numbers.

A gigabyte or two and half a minute each, so they are marked slow; one model is in memory at a time.
"""

import gc

import numpy as np
import pytest

from benchmarks import official_rewards as official
from diffagent.rewards.score_stage import score_pictures

PICTURES = 3


@pytest.mark.full_size
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("metric", official.METRICS)
def test_full_size_scores_are_the_packages_own(metric, tmp_path):
    official.write_release(metric, tmp_path)
    files = official.write_pictures(tmp_path / "pictures", PICTURES, 300)
    prompts = official.write_prompts(PICTURES, candidates=2)
    expected = official.load_official(metric, tmp_path, "cpu")(prompts, files)
    gc.collect()  # theirs goes before ours comes
    scorer = official.load_ours(metric, tmp_path)
    got = score_pictures([scorer], prompts, files, batch_size=2, threads=1)
    assert not got.failures
    np.testing.assert_allclose(got.metrics[metric], expected, atol=2e-5)
    assert np.std(expected) > 1e-2, "or the same number for all would pass"
