"""A whole pipeline at small size on the sandbox, through a real Prefect server and worker."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import yaml
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from tests.conftest import ROOT

BUSY = Retry(total=10, status_forcelist=[503], allowed_methods=None, backoff_factor=0.5)

#: configs/sandbox.yaml with everything that costs time made small.
SMALL = {
    "dabench": {"rows_per_shard": 200},
    "sft": {"hidden_size": 64, "num_hidden_layers": 2, "max_steps": 150, "save_steps": 50},
    "sampling": {"num_prompts": 8, "num_shards": 2, "num_candidates": 3},
    "rrhf": {"num_train_epochs": 1, "save_steps": 2},
    "evaluation": {"num_prompts": 6, "report_prompts": 3, "bootstrap_samples": 200},
}


def small_config(directory: Path, store: Path) -> Path:
    """Write the small configuration with its store; returns the file."""
    config = yaml.safe_load((ROOT / "configs/sandbox.yaml").read_text())
    for section, values in SMALL.items():
        config[section] = {**config[section], **values}
    config["runtime"]["store"] = str(store)
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Prefect:
    """A running server and worker; ``api`` answers JSON, ``command`` runs the command line."""

    url: str
    environment: dict[str, str]

    def api(self, method: str, path: str, **body: object) -> object:
        with requests.Session() as session:
            # Prefect answers 503 while SQLite is locked; its own client retries as well.
            session.mount("http://", HTTPAdapter(max_retries=BUSY))
            answer = session.request(method, f"{self.url}/api{path}", json=body or None, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def command(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *words],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"prefect {' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run_deployment(self, name: str, timeout: float, **parameters: object) -> dict[str, object]:
        """Run a deployment through the worker; returns the finished flow run."""
        deployment = self.api("GET", f"/deployments/name/{name}/{name}")
        run = self.api(
            "POST",
            f"/deployments/{deployment['id']}/create_flow_run",
            parameters={**deployment["parameters"], **parameters},
            state={"type": "SCHEDULED"},
            idempotency_key=uuid.uuid4().hex,
        )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            run = self.api("GET", f"/flow_runs/{run['id']}")
            if run["state"]["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
                return run
            time.sleep(0.5)
        raise TimeoutError(f"{name} is {run['state']['name']} after {timeout:.0f} s")

    def task_states(self, flow_run_id: str) -> dict[str, str]:
        """Final state name of every task run of a flow run."""
        runs = self.api(
            "POST",
            "/task_runs/filter",
            flow_runs={"id": {"any_": [flow_run_id]}},
        )
        return {run["name"]: run["state"]["name"] for run in runs}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "DIFFAGENT_HOME": str(ROOT),
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "diffagent",
    }
    log = (home / "log.txt").open("w")

    def start(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", *words],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    processes = [start("server", "start", "--host", "127.0.0.1", "--port", str(port))]
    try:
        server = Prefect(url, environment)
        _wait_until_healthy(url, processes[0], home / "log.txt")
        server.command("work-pool", "create", "--type", "process", "diffagent")
        server.command("deploy", "--all")
        processes.append(start("worker", "start", "--pool", "diffagent"))
        yield server
    finally:
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        log.close()


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(360):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if requests.get(f"{url}/api/health", timeout=2).ok:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.5)
    raise TimeoutError(log.read_text()[-3000:])


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    return found
