"""What a stage tells of its progress is on the dashboard."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import Log

from diffagent.artifacts import StageContext, StageResult, stage
from diffagent.threads import ContextThreadPool
from flows.build_dabench import build_dabench
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


def test_a_dashboard_that_is_away_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*args: object, **options: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(_stage, "create_progress_artifact", away)
    _stage.DashboardProgress("crawl")(0.5, "half")
    assert "nobody there" in caplog.text
