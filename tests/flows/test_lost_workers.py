"""A lost worker costs its shard and nothing else: on Ray, and with Prefect's process workers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL

from diffagent import pipeline
from diffagent.pipeline import find_cached
from diffagent.store import verify_artifact
from flows._compose import configure
from flows.group_flows import build_dabench
from flows.run_stage import run_stage
from tasks import stages
from tests.conftest import ROOT
from tests.flows.toy_stages import slow_plan

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where slow stages say that they began, and wait for 'go'."""
    folder = tmp_path / "meeting"
    folder.mkdir()
    monkeypatch.setenv("TOY_MEETING", str(folder))
    monkeypatch.setattr(pipeline, "plan", slow_plan)
    impatient = stages.task_of("render-0").with_options(retry_delay_seconds=[0, 0])
    monkeypatch.setattr(
        stages, "_task", lambda name: impatient if name == "render" else stages.stage_task(name)
    )
    return folder


def shards(meeting: Path, what: str) -> list[str]:
    return [path.name.split(".")[0] for path in meeting.glob(f"*.{what}")]


def run_and_kill(
    config_file: Path, meeting: Path, runner: str, machine_of: Callable[[int], psutil.Process]
) -> tuple[State, set[str]]:
    """Run the flow; when two machines run shards, kill one, with all that it started.

    Returns the shards that ran there too: a Ray worker that waits for its parent's result gives
    its CPU away, so that they can be two.
    """
    lost: set[str] = set()

    def killer() -> None:
        deadline = time.monotonic() + 300
        while True:
            started = [path.name.split(".") for path in sorted(meeting.glob("*.started"))]
            machines = [machine_of(int(pid)) for _, pid, *_ in started]
            if len(set(machines)) == 2:
                break
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)
        processes = [machines[0], *machines[0].children(recursive=True)]
        for process in processes:
            process.kill()
        killed = {process.pid for process in processes}
        lost.update(
            path.name.split(".")[0]
            for path in meeting.glob("*.started")
            if int(path.name.split(".")[1]) in killed
        )
        Path(meeting, "go").touch()

    thread = threading.Thread(target=killer)
    thread.start()
    overrides = {"runtime.tasks.runner": runner, "runtime.tasks.lost_after_seconds": 20}
    state = build_dabench(str(config_file), overrides, return_state=True)
    thread.join()
    assert lost, "no two machines ran shards at once"
    return state, lost


def check_only_lost_shards_ran_twice(
    state: State, lost: set[str], config_file: Path, meeting: Path
) -> None:
    assert state.is_completed(), state.message
    assert Counter(shards(meeting, "ended")) == {str(i): 1 for i in range(3)}
    expected = {str(i): 1 + (str(i) in lost) for i in range(3)}
    assert Counter(shards(meeting, "started")) == expected
    settings = configure(str(config_file), {})
    found = find_cached(slow_plan(settings), settings)
    assert found.keys() == slow_plan(settings).keys()
    for artifact in found.values():
        verify_artifact(artifact)
    assert found["shard"].file("number").read_text() == str(3 * 3 + 0 + 1 + 2)


@pytest.fixture
def ray_cluster(meeting: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two Ray nodes of one CPU each on this machine, and a head that runs nothing."""
    pytest.importorskip("prefect_ray", reason="needs the extra ray: pip install 'diffagent[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, **small},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, **small)
    ray.init(
        address=cluster.address,
        namespace="prefect",
        log_to_driver=False,
        runtime_env={
            "env_vars": {"TOY_MEETING": str(meeting)},
            "worker_process_setup_hook": "tests.flows.toy_stages.use_slow_plan",
        },
    )
    cluster.wait_for_nodes()
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.usefixtures("ray_cluster")
def test_ray(config_file: Path, meeting: Path) -> None:
    """The whole node of a shard dies: its raylet and its workers."""

    def raylet(pid: int) -> psutil.Process:
        parent = psutil.Process(pid).parent()
        assert parent and "raylet" in parent.name()
        return parent

    state, lost = run_and_kill(config_file, meeting, "ray", raylet)
    check_only_lost_shards_ran_twice(state, lost, config_file, meeting)


@pytest.fixture
def workers(meeting: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two process workers, one flow run at a time each, that serve ``run-stage``."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="toys", type="process"), overwrite=True)
        client.create_deployment(
            flow_id=client.create_flow(run_stage),
            name="run-stage",
            entrypoint="tests/flows/toy_flow.py:run_stage",
            work_pool_name="toys",
            work_queue_name="cpu",
            pull_steps=[
                {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}
            ],
        )
    environment = {
        **os.environ,
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PYTHONPATH": str(ROOT),
    }
    command = ["worker", "start", "--pool", "toys", "--type", "process", "--limit", "1", "--name"]
    with Path(tmp_path, "workers.log").open("w") as log:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "prefect", *command, name],
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for name in ("one", "two")
        ]
        yield started
        for worker in started:
            for process in [*psutil.Process(worker.pid).children(recursive=True), worker]:
                process.kill()
            worker.wait()


def test_prefect_workers(
    config_file: Path, meeting: Path, workers: list[subprocess.Popen[bytes]]
) -> None:
    """The whole machine of a shard dies: its worker and what that started."""

    def worker_of(pid: int) -> psutil.Process:
        ours = {worker.pid for worker in workers}
        (worker,) = (p for p in psutil.Process(pid).parents() if p.pid in ours)
        return worker

    state, lost = run_and_kill(config_file, meeting, "workers", worker_of)
    check_only_lost_shards_ran_twice(state, lost, config_file, meeting)
    (shard,) = lost
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_flow_runs() if run.name == f"render-{shard}"]
    assert sorted(run.state.type.value for run in runs) == ["COMPLETED", "CRASHED"]
    assert any("no heartbeat" in (run.state.message or "") for run in runs)


def test_no_deployment_is_told(config_file: Path, meeting: Path) -> None:
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
    Path(meeting, "go").touch()
    state = build_dabench(str(config_file), {"runtime.tasks.runner": "workers"}, return_state=True)
    assert state.is_failed() and "prefect deploy --all" in state.message
    assert not shards(meeting, "started")


def test_a_missing_extra_is_told(
    config_file: Path, meeting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    state = build_dabench(str(config_file), {"runtime.tasks.runner": "ray"}, return_state=True)
    assert state.is_failed() and "diffagent[ray]" in state.message
    assert not shards(meeting, "started")
