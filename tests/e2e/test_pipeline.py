"""The whole DAG through a real Prefect server and worker, and what is left on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffagent.pipeline import find_cached, plan
from diffagent.run_config import load_config
from diffagent.store import Artifact, verify_artifact
from tests.conftest import ROOT
from tests.e2e.conftest import Prefect, dump_dom, small_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
GROUPS = ("build-dabench", "train-sft", "train-rrhf", "evaluate-agent")


@dataclass
class Finished:
    """The pipeline after its first run."""

    config: Path
    prefect: Prefect
    runs: dict[str, dict[str, object]]

    @property
    def artifacts(self) -> dict[str, Artifact]:
        settings = load_config(self.config)
        return find_cached(plan(settings), settings)


@pytest.fixture(scope="session")
def finished(prefect_server: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    directory = tmp_path_factory.mktemp("pipeline")
    config = small_config(directory, directory / "store")
    runs = {}
    for name in GROUPS:
        runs[name] = prefect_server.run_deployment(name, 900, config=str(config))
        state = runs[name]["state"]
        assert state["type"] == "COMPLETED", f"{name}: {state['message']}"
    return Finished(config, prefect_server, runs)


def test_every_artifact_is_whole(finished: Finished) -> None:
    nodes = plan(load_config(finished.config))
    assert finished.artifacts.keys() == nodes.keys()
    for artifact in finished.artifacts.values():
        verify_artifact(artifact)


def test_tasks_are_named_and_completed(finished: Finished) -> None:
    nodes = plan(load_config(finished.config))
    for group in GROUPS:
        states = finished.prefect.task_states(finished.runs[group]["id"])
        assert set(states) == {key for key, node in nodes.items() if node.group == group}
        assert set(states.values()) == {"Completed"}


def test_second_run_is_cached(finished: Finished) -> None:
    run = finished.prefect.run_deployment("run-pipeline", 300, config=str(finished.config))
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    children = finished.prefect.api(
        "POST", "/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run["id"]]}}
    )
    assert {child["state"]["type"] for child in children} == {"COMPLETED"}
    states = {}
    for child in children:
        states |= finished.prefect.task_states(child["id"])
    assert set(states.values()) == {"Cached"} and len(states) == len(finished.artifacts)


def test_refresh_with_nothing_new_says_so(finished: Finished) -> None:
    run = finished.prefect.run_deployment(
        "build-dabench", 300, config=str(finished.config), refresh=True
    )
    assert "Nothing new" in run["state"]["message"]
    states = finished.prefect.task_states(run["id"])
    assert states.pop("crawl") == "Completed" and set(states.values()) == {"Cached"}


def test_the_report_is_whole(finished: Finished) -> None:
    artifact = finished.artifacts["evaluate"]
    html = artifact.file("report.html").read_text()
    assert "data:image/png;base64," in html and "sandbox" in html.lower()
    assert "<script" not in html and "http://127.0.0.1" not in html
    metrics = json.loads(artifact.file("metrics.json").read_text())
    selectors = load_config(finished.config).evaluation.selectors
    assert tuple(metrics["selectors"]) == selectors
    assert all(0 < row["difference"]["n"] <= 6 for row in metrics["comparisons"])


def test_the_dashboard_shows_the_stages(finished: Finished, chromium: str) -> None:
    page = f"{finished.prefect.url}/runs/flow-run/{finished.runs['train-rrhf']['id']}"
    text = dump_dom(chromium, page)
    tasks = finished.prefect.task_states(finished.runs["train-rrhf"]["id"])
    assert "Deployment train-rrhf" in text and "Completed" in text
    assert f"{len(tasks)} Task runs" in text


def test_select_answers_with_an_api(finished: Finished) -> None:
    agent = finished.artifacts["rrhf"].path
    done = subprocess.run(
        [sys.executable, "-m", "diffagent", "select", "a red star on white", "--agent", str(agent)],
        capture_output=True,
        text=True,
        check=False,
    )
    # So small an agent may fail to name a model; then it says why and gives no API.
    if done.returncode == 0:
        assert json.loads(done.stdout)["model"].startswith("Sandbox")
    else:
        assert done.stdout == "" and "invalid" in done.stderr


def test_a_deleted_artifact_is_rebuilt_and_nothing_else(finished: Finished) -> None:
    before = {key: a.path / "manifest.json" for key, a in finished.artifacts.items()}
    times = {key: path.stat().st_mtime_ns for key, path in before.items()}
    shutil.rmtree(finished.artifacts["score-0"].path)
    run = finished.prefect.run_deployment("train-rrhf", 600, config=str(finished.config))
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    states = finished.prefect.task_states(run["id"])
    assert states.pop("score-0") == "Completed"
    assert set(states.values()) == {"Cached"}, "the same scores again: rrhf needs no second run"
    changed = [key for key, path in before.items() if path.stat().st_mtime_ns != times[key]]
    assert changed == ["score-0"]


@pytest.mark.parametrize(
    "key",
    ["crawl", "filter", "shard", "sft", "sample-0", "render-0", "score-0", "rrhf", "evaluate"],
)
def test_kill_9_then_the_same_command(
    finished: Finished, key: str, tmp_path: Path, kill_when_started: Callable[..., None]
) -> None:
    """Kill the stage as soon as it writes; the same command gives the same content."""
    expected = finished.artifacts
    store = tmp_path / "store"
    shutil.copytree(load_config(finished.config).runtime.store, store, symlinks=True)
    settings = load_config(finished.config, {"runtime.store": str(store)})
    nodes = plan(settings)
    directory = find_cached(nodes, settings)[key].path
    shutil.rmtree(directory)
    config = small_config(tmp_path, store)
    stage = key.split("-", maxsplit=1)[0]
    command = [sys.executable, "-m", "diffagent", "run", "--until", stage, "--config", str(config)]
    kill_when_started(command, directory)
    assert not directory.exists(), "nothing half-written is visible"
    subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, check=True)
    again = find_cached(nodes, settings)[key]
    assert again.content_digest == expected[key].content_digest
    verify_artifact(again)


@pytest.fixture
def kill_when_started() -> Callable[..., None]:
    """Start a command in a process group of its own and kill -9 it when it writes its artefact."""
    import signal
    import time

    def run(command: list[str], directory: Path) -> None:
        partial = directory.with_name(f".{directory.name}.partial")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while not (partial.exists() and any(partial.iterdir())) and not directory.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    return run
