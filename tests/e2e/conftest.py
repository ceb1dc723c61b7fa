"""A whole pipeline at small size on the sandbox, through a real Prefect server and worker."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
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


@pytest.fixture(scope="session", autouse=True)
def _site(sandbox_site: Path) -> None:
    """The configurations name the sandbox's site."""


def small_config(directory: Path, store: Path) -> Path:
    """Write the small configuration with its store; returns the file."""
    config = yaml.safe_load((ROOT / "configs/sandbox.yaml").read_text())
    for section, values in SMALL.items():
        config[section] = {**config[section], **values}
    config["runtime"]["store"] = str(store)
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Prefect:
    """A running server and worker; ``api`` answers JSON, ``command`` runs a command line."""

    url: str
    store_url: str
    store: Path
    environment: dict[str, str]
    log: Path
    worker: subprocess.Popen[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def api(self, method: str, path: str, **body: object) -> object:
        with requests.Session() as session:
            # Prefect answers 503 while SQLite is locked; its own client retries as well.
            session.mount("http://", HTTPAdapter(max_retries=BUSY))
            if not self.headers:
                client = uuid.uuid4().hex
                token = session.get(f"{self.url}/api/csrf-token?client={client}", timeout=60).json()
                self.headers = {
                    "Prefect-Csrf-Client": client,
                    "Prefect-Csrf-Token": token["token"],
                }
            answer = session.request(
                *(method, f"{self.url}/api{path}"),
                json=body or None,
                headers=self.headers,
                timeout=60,
            )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start ``python -m WORDS``, which writes into the log."""
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *words],
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start_worker(self) -> None:
        self.worker = self.start("prefect", "worker", "start", "--pool", "diffagent")

    def command(self, *words: str) -> str:
        """Run ``python -m WORDS``; returns its output."""
        done = subprocess.run(
            [sys.executable, "-m", *words],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run_deployment(self, name: str, timeout: float, **parameters: object) -> dict[str, object]:
        """Run a deployment through the worker; returns the finished flow run."""
        return self.wait(self.submit(name, **parameters), timeout)

    def submit(self, name: str, **parameters: object) -> str:
        """Start a run of a deployment; returns its id."""
        deployment = self.api("GET", f"/deployments/name/{name}/{name}")
        run = self.api(
            "POST",
            f"/deployments/{deployment['id']}/create_flow_run",
            parameters={**deployment["parameters"], **parameters},
            state={"type": "SCHEDULED"},
            idempotency_key=uuid.uuid4().hex,
        )
        return str(run["id"])

    def wait(self, run_id: str, timeout: float, *types: str) -> dict[str, object]:
        """Wait until a run is in a state of ``types``, by default a final one; returns the run."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            run = self.api("GET", f"/flow_runs/{run_id}")
            if run["state"]["type"] in (types or FINAL):
                return run
            time.sleep(0.5)
        raise TimeoutError(f"{run['name']} is {run['state']['name']} after {timeout:.0f} s")

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
    home, port, store_port = tmp_path_factory.mktemp("prefect"), free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "DIFFAGENT_HOME": str(ROOT),
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",  # 60 by default
        "DIFFAGENT_STORE_URL": f"http://127.0.0.1:{store_port}",
    }
    store, store_url = home / "store", environment["DIFFAGENT_STORE_URL"]
    server = Prefect(url, store_url, store, environment, home / "log.txt")
    ports = ("--port", str(port), "--store-port", str(store_port))
    process = server.start("flows.serve_dashboard", "--store", str(store), *ports)
    try:
        wait_until_healthy(url, process, server.log)
        server.command("prefect", "work-pool", "create", "--type", "process", "diffagent")
        server.command("prefect", "deploy", "--all")
        server.start_worker()
        yield server
    finally:
        for running in filter(None, (server.worker, process)):
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()


def browser(chromium: str, profile: str) -> list[str]:
    """Command of a headless Chromium that asks for nothing on its own."""
    return [
        chromium,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={profile}",
    ]


def dump_dom(chromium: str, page: str, *options: str) -> str:
    """The text of a page after its scripts have run in a headless Chromium."""
    with tempfile.TemporaryDirectory() as profile:
        dom = subprocess.run(
            [
                *browser(chromium, profile),
                *("--virtual-time-budget=20000", "--timeout=60000", *options, "--dump-dom", page),
            ],
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        ).stdout
    return " ".join(re.sub(r"<[^>]+>", " ", dom).split())


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(360):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if requests.get(f"{url}/api/health", timeout=10).ok:
                return
        except (requests.ConnectionError, requests.Timeout):
            pass
        time.sleep(0.5)
    raise TimeoutError(log.read_text()[-3000:])


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    return found
