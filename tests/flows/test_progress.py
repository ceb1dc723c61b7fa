"""What a stage tells of its progress is on the dashboard."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import Log

from diffagent.store import StageContext, StageResult, stage
from diffagent.threads import ContextThreadPool
from flows.group_flows import build_dabench
from tasks import _stage
from tests.flows import toy_stages
from tests.flows.toy_stages import Number, source


@stage("toy-source", version=1, config=Number)
def telling_source(config: Number, context: StageContext) -> StageResult:
    context.progress(None, "models: 120")
    context.progress(0.25, "galleries: 10 of 40, about 30 s left")
    context.progress(None, "pages: 3")
    return source.body(config, context)


@stage("toy-source", version=1, config=Number)
def waiting_source(config: Number, context: StageContext) -> StageResult:
    """Logs a retry as the client of a site does: in a thread of a pool."""
    log = logging.getLogger("diffagent.toy.client")
    with ContextThreadPool(1) as pool:
        pool.submit(log.warning, "HTTP 503: try 2 of 8 in 4 s").result()
        pool.submit(log.info, "answered").result()
    return source.body(config, context)


@pytest.mark.usefixtures("toy_plan")
def test_a_retry_is_in_the_log_of_the_run(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_stages, "source", waiting_source)
    state = build_dabench(str(config_file), return_state=True)
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    deadline = time.monotonic() + 30
    logged: dict[str, Log] = {}
    with get_client(sync_client=True) as client:
        while "answered" not in logged:  # logs reach the server in batches
            assert time.monotonic() < deadline, list(logged)
            time.sleep(0.2)
            logged = {line.message: line for line in client.read_logs(wanted)}
    retry = logged["HTTP 503: try 2 of 8 in 4 s"]
    assert retry.level == logging.WARNING and retry.task_run_id is not None


@pytest.mark.usefixtures("toy_plan")
def test_a_crawl_shows_how_far_it_is(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_stages, "source", telling_source)
    assert build_dabench(str(config_file), return_state=True).is_completed()
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["crawl-progress"]))
    with get_client(sync_client=True) as client:
        (artifact,) = client.read_artifacts(artifact_filter=wanted)
    assert (artifact.type, artifact.data) == ("progress", 25.0)
    assert artifact.description == "pages: 3"


CHANGES = {
    "models": {"added": 2, "changed": 0, "removed": 0, "returned": 0},
    "versions": {"added": 2, "changed": 1_000, "removed": 0, "returned": 0},
    "images": {"added": 0, "changed": 0, "removed": 31, "returned": 0},
}


@stage("toy-source", version=1, config=Number)
def changing_source(config: Number, context: StageContext) -> StageResult:
    """Reports what a refresh does, and the words of a stranger."""
    result = source.body(config, context)
    drift = {f"field {i}": "a\n# heading ![x](http://x.example/y) | <b>" for i in range(30)}
    metrics = {"changes": CHANGES, "schema_drift": drift} if context.previous else {}
    return dataclasses.replace(result, metrics=metrics)


@pytest.mark.usefixtures("toy_plan")
def test_a_refresh_shows_all_of_its_changes(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_stages, "source", changing_source)
    number = tmp_path / "number"
    monkeypatch.setenv("TOY_SOURCE", str(number))
    number.write_text("1")
    build_dabench(str(config_file))
    number.write_text("2")
    state = build_dabench(str(config_file), refresh=True, return_state=True)
    run = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
    with get_client(sync_client=True) as client:
        rows = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=run))
    shown = {row.key: row for row in rows}
    table = json.loads(shown["crawl-changes"].data)
    assert table == [{"items": kind, **counts} for kind, counts in CHANGES.items()]
    assert shown["crawl-changes"].description == (
        "2 models added, 2 versions added, 1,000 versions changed, 31 images removed"
    )
    summary = shown["crawl-summary"].data
    assert "There is news" in summary
    assert all(f"field {i} |" in summary for i in range(30)), "nothing is cut"
    assert "\n# heading" not in summary and "![" not in summary and "<b>" not in summary
    assert all(row.description for row in rows)


def test_a_dashboard_that_is_away_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*args: object, **options: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(_stage, "create_progress_artifact", away)
    _stage.DashboardProgress("crawl")(0.5, "half")
    assert "nobody there" in caplog.text
