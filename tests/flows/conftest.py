"""One temporary Prefect database for all flow tests, and a toy plan of four quick nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from diffagent import pipeline
from diffagent.pipeline import Node
from tests.flows.toy_stages import Number


@pytest.fixture(scope="session", autouse=True)
def prefect_database() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def toy_plan(monkeypatch: pytest.MonkeyPatch) -> dict[str, Node]:
    """crawl -> filter -> {sample-0, sample-1} -> shard, then sft in the next group."""
    group, toys = "build-dabench", "tests.flows.toy_stages"
    shards = ("sample-0", "sample-1")
    nodes = [
        Node("crawl", f"{toys}:source", Number(value=3), {}, group),
        Node("filter", f"{toys}:double", Number(value=2), {"numbers": ("crawl",)}, group),
        *(
            Node(f"sample-{i}", f"{toys}:double", Number(value=i), {"numbers": ("filter",)}, group)
            for i in (0, 1)
        ),
        Node(
            "shard",
            f"{toys}:total",
            Number(value=0),
            {"numbers": shards},
            group,
        ),
        Node("sft", f"{toys}:total", Number(value=0), {"numbers": ("shard",)}, "train-sft"),
    ]
    plan = {node.key: node for node in nodes}
    monkeypatch.setattr(pipeline, "plan", lambda config: plan)
    return plan


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "rewards: {scorers: [{name: clip, model: tiny-clip}], unify: chatgen}\n"
        f"runtime: {{store: {tmp_path / 'store'}}}\n"
    )
    return path
