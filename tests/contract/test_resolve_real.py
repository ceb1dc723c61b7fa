"""On showcases of real checkpoints, where the truth is known, the resolver keeps its word."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.resolve import CONFIDENCE, FIRST_VERSION
from tests.conftest import SHARED_DATA

DUMP = SHARED_DATA / "civitai"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_resolve.py"

pytestmark = pytest.mark.skipif(
    not (DUMP / "images.jsonl.gz").exists(), reason="the records of ../shared are not here"
)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The benchmark, whose count of what is right is tested here too."""
    spec = importlib.util.spec_from_file_location("bench_resolve", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_resolve"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(benchmark: ModuleType) -> Any:
    return benchmark.World(DUMP)


def test_checkpoints_of_showcases(world: Any) -> None:
    answers = [
        (shown, found.best)
        for shown in world.shown
        if not shown.fits
        and (found := world.resolve(shown)) is not None
        and not found.doubt(FilterConfig().min_confidence)
    ]
    held_out = sum(not shown.fits for shown in world.shown)
    versions = [best.version.version_id == shown.version_id for shown, best in answers]
    models = [best.version.model_id == shown.model_id for shown, best in answers]
    precision = sum(versions) / len(answers)
    assert len(answers) > 0.76 * held_out
    assert precision > 0.93
    assert sum(models) > 0.98 * len(answers)
    promised = sum(best.confidence for _, best in answers) / len(answers)
    assert abs(promised - precision) < 0.03


def test_constants_are_what_the_benchmark_measures(benchmark: ModuleType, world: Any) -> None:
    made = benchmark.fit(world)
    assert {kind: made.confidence(kind) for kind in made.seen} == dict(CONFIDENCE)
    assert made.first_version == FIRST_VERSION
