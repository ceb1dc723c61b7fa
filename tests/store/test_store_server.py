"""The store's server over a socket: results of finished artifacts, and nothing else."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from diffagent.schemas.manifest import Manifest
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact, StageContext, StageResult, stage
from diffagent.store.store_server import create_app
from tests.flows.toy_stages import Number

FILES = {
    "report.html": "<h1>Report</h1>",
    "metrics.json": "{}",
    "table.parquet": "PAR1",
    "images/a b.png": "picture",
    "weights.safetensors": "weights",
    "notes.txt": "text",
    ".hidden.json": "{}",
}


@stage("evaluate", version=1, config=Number)
def evaluate(config: Number, context: StageContext) -> StageResult:
    for name, text in FILES.items():
        path = context.out / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return StageResult(rows={"prompts": 1})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with other files next to its artifacts, as real ones have them."""
    store = tmp_path / "my store"
    for name, text in {
        "prefect/prefect.db": "SQLite",
        "prefect/storage/x/result.json": "{}",
        "crawl/abc/pages/1.html": "<script>",
        "crawl/abc/manifest.json": "{}",
        "evaluate/.abc.partial/report.html": "half",
        "evaluate/broken/report.html": "no manifest",
        "evaluate/broken/manifest.json": "{",
        "models/ab/model.json": "{}",
    }.items():
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "secret.json").write_text("secret")
    return store


@pytest.fixture
def artifact(store: Path) -> Artifact:
    return evaluate.run(Number(value=1), {}, RuntimeConfig(store=str(store)))


@pytest.fixture
def port(store: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(store), log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield int(listener.getsockname()[1])
        server.should_exit = True
        thread.join()


def ask(
    port: int, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request with this very path: no client normalises it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_results_are_served(artifact: Artifact, port: int) -> None:
    for name in ("report.html", "metrics.json", "table.parquet", "images/a%20b.png"):
        status, headers, body = ask(port, f"/evaluate/{artifact.path.name}/{name}")
        assert (status, body.decode()) == (200, FILES[name.replace("%20", " ")])
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "sandbox" in headers["Content-Security-Policy"]
    status, headers, body = ask(port, f"/evaluate/{artifact.path.name}/report.html", "HEAD")
    assert (status, body) == (200, b"")
    status, headers, body = ask(
        port, f"/evaluate/{artifact.path.name}/table.parquet", Range="bytes=1-2"
    )
    assert (status, body) == (206, b"AR"), "readers of parquet over HTTP request ranges"


def test_the_index_links_reports(artifact: Artifact, port: int) -> None:
    status, _, body = ask(port, "/")
    assert status == 200 and f'href="/evaluate/{artifact.path.name}/report.html"' in body.decode()
    assert "prefect" not in body.decode() and "broken" not in body.decode()


@pytest.mark.parametrize(
    "path",
    [
        "/prefect/prefect.db",
        "/prefect/storage/x/result.json",
        "/crawl/abc/pages/1.html",
        "/crawl/abc/manifest.json",
        "/evaluate/.abc.partial/report.html",
        "/evaluate/broken/report.html",
        "/models/ab/model.json",
        "/evaluate/NAME/manifest.json",
        "/evaluate/NAME/weights.safetensors",
        "/evaluate/NAME/notes.txt",
        "/evaluate/NAME/",
        "/evaluate/NAME",
        "/evaluate",
        "/../secret.json",
        "/evaluate/NAME/../../../secret.json",
        "/evaluate/NAME/..%2f..%2f..%2fsecret.json",
        "/%2e%2e/secret.json",
        "/..%5csecret.json",
        "//etc/passwd",
        "/evaluate/NAME/metrics.json%00.png",
        "/evaluate/NAME/" + "x" * 5000 + ".json",
    ],
)
def test_nothing_else_is(artifact: Artifact, port: int, path: str) -> None:
    status, headers, body = ask(port, path.replace("NAME", artifact.path.name))
    assert status == 404 and b"secret" not in body
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_links_out_of_the_store_are_not_followed(
    artifact: Artifact, port: int, store: Path, tmp_path: Path
) -> None:
    (artifact.path / "metrics.json").unlink()
    (artifact.path / "metrics.json").symlink_to(tmp_path / "secret.json")
    (store / "evaluate" / "linked").symlink_to(tmp_path)
    (artifact.path / "table.parquet").unlink()
    (artifact.path / "table.parquet").symlink_to(store / "prefect" / "prefect.db")
    for path in (
        f"/evaluate/{artifact.path.name}/metrics.json",
        f"/evaluate/{artifact.path.name}/table.parquet",
        "/evaluate/linked/secret.json",
    ):
        assert ask(port, path)[0] == 404
    assert (store / "evaluate" / "latest").is_symlink()
    assert ask(port, "/evaluate/latest/report.html")[0] == 200, "a link within the store is fine"


def test_a_changed_manifest_counts_at_once(artifact: Artifact, port: int) -> None:
    path = f"/evaluate/{artifact.path.name}/metrics.json"
    assert ask(port, path)[0] == 200
    manifest = artifact.manifest
    files = [entry for entry in manifest.files if entry.path != "metrics.json"]
    changed = Manifest.model_validate(manifest.model_dump() | {"files": files})
    (artifact.path / "manifest.json").write_text(changed.model_dump_json())
    assert ask(port, path)[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:4201", 200),
        ("LOCALHOST", 200),
        ("[::1]:4201", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:4201", 421),
        ("localhost.", 421),
        ("", 421),
        ("127.0.0.1, evil.example", 421),
    ],
)
def test_only_names_of_this_machine(artifact: Artifact, port: int, host: str, status: int) -> None:
    """A page whose host name resolves to this machine (DNS rebinding) states its own host."""
    got, _, body = ask(port, f"/evaluate/{artifact.path.name}/report.html", Host=host)
    assert got == status
    assert (b"Report" in body) == (status == 200)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_no_other_page(artifact: Artifact, port: int, origin: str) -> None:
    path = f"/evaluate/{artifact.path.name}/report.html"
    assert ask(port, path, Origin=origin)[0] == 403
    assert ask(port, path, Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_nothing_can_be_sent(artifact: Artifact, port: int) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask(port, f"/evaluate/{artifact.path.name}/report.html", method)[0] == 405


def test_a_store_that_is_not_there_yet(tmp_path: Path, port: int, store: Path) -> None:
    store.rename(tmp_path / "away")
    status, _, body = ask(port, "/")
    assert status == 200 and b"No report" in body
    assert ask(port, "/evaluate/a/report.html")[0] == 404
