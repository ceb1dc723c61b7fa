"""The tasks' states, read back from Prefect: Cached, retried, failed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun

from flows.group_flows import build_dabench, train_sft
from tasks import stages

pytestmark = pytest.mark.usefixtures("toy_plan")

TASKS = 5  # of the toy plan's first group


def run(config_file: Path, **parameters: object) -> tuple[State, dict[str, str], dict[str, int]]:
    """Run the flow; returns its state, and the final state name and run count of each task."""
    state = build_dabench(str(config_file), return_state=True, **parameters)
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        deadline = time.monotonic() + 60
        # A task's states reach the server as events, which it may read after the flow has ended.
        while not _told(runs := client.read_task_runs(flow_run_filter=wanted)):
            assert time.monotonic() < deadline, [(r.name, r.state) for r in runs]
            time.sleep(0.1)
    return state, {r.name: r.state.name for r in runs}, {r.name: r.run_count for r in runs}


def _told(runs: list[TaskRun]) -> bool:
    ends = [r.state and (r.state.is_final() or r.state.name == "NotReady") for r in runs]
    return len(ends) == TASKS and all(ends)


def test_second_run_is_cached_and_says_so(config_file: Path) -> None:
    state, names, _ = run(config_file)
    assert state.is_completed() and "DABench is in" in state.message
    assert set(names.values()) == {"Completed"}
    assert set(names) == {"crawl", "filter", "sample-0", "sample-1", "shard"}

    state, names, _ = run(config_file)
    assert set(names.values()) == {"Cached"}
    assert "Nothing new" in state.message


def test_a_lost_artifact_is_rebuilt_and_nothing_else(config_file: Path, tmp_path: Path) -> None:
    run(config_file)
    built = {
        p.parent: p.stat().st_mtime_ns
        for p in (tmp_path / "store").glob("*/[0-9a-f]*/manifest.json")
    }
    lost = next((tmp_path / "store/toy-total").glob("[0-9a-f]*/manifest.json")).parent
    shutil.rmtree(lost)
    _, names, _ = run(config_file)
    assert names.pop("shard") == "Completed"
    assert set(names.values()) == {"Cached"}
    now = {
        p.parent: p.stat().st_mtime_ns
        for p in (tmp_path / "store").glob("*/[0-9a-f]*/manifest.json")
    }
    assert now.keys() == built.keys()
    assert [p for p in now if now[p] != built[p]] == [lost]


def test_a_damaged_artifact_is_rebuilt(config_file: Path, tmp_path: Path) -> None:
    run(config_file)
    next((tmp_path / "store/toy-source").glob("*/number")).write_text("a longer text")
    _, names, _ = run(config_file)
    assert names.pop("crawl") == "Completed"
    assert set(names.values()) == {"Cached"}, "the same content again: nothing after it changed"


def test_refresh(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_text("5")
    monkeypatch.setenv("TOY_SOURCE", str(source))
    run(config_file)
    state, names, _ = run(config_file, refresh=True)
    assert names.pop("crawl") == "Completed" and set(names.values()) == {"Cached"}
    assert "Nothing new" in state.message

    source.write_text("6")
    state, names, _ = run(config_file, refresh=True)
    assert set(names.values()) == {"Completed"} and "Nothing new" not in state.message
    _, names, _ = run(config_file)
    assert set(names.values()) == {"Cached"}, "the refreshed snapshot is what later runs use"
    assert len(list((tmp_path / "store/toy-source").glob("[0-9a-f]*/number"))) == 2, (
        "the old one is kept"
    )


def test_only_retryable_errors_are_retried(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = stages.task_of("sample-0").with_options(retry_delay_seconds=[0, 0])
    monkeypatch.setattr(
        stages, "_task", lambda name: impatient if name == "sample" else stages.stage_task(name)
    )
    faults = tmp_path / "faults"
    monkeypatch.setenv("TOY_FAULTS", str(faults))
    faults.write_text("retryable retryable")
    state, names, counts = run(config_file)
    assert state.is_completed() and counts["sample-1"] == 3

    shutil.rmtree(tmp_path / "store")
    faults.write_text("final")
    state, names, counts = run(config_file)
    assert state.is_failed() and counts["sample-1"] == 1
    assert "sample-1" in state.message and "never again" in state.message
    assert names["sample-0"] == "Completed", "the other shard is not lost"


def test_a_missing_group_is_named(config_file: Path) -> None:
    state = train_sft(str(config_file), return_state=True)
    assert state.is_failed() and "build-dabench" in state.message
    run(config_file)
    assert train_sft(str(config_file), return_state=True).is_completed()
