"""The model store against a Civitai over real sockets: what it finds, refuses and survives."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from safetensors.numpy import save
from typer.testing import CliRunner

from diffagent.civitai.client import CivitaiClient
from diffagent.cli.main import app
from diffagent.errors import (
    CivitaiError,
    ConfigError,
    DiffAgentError,
    DownloadsDisabled,
    EarlyAccess,
    Forbidden,
    NotFound,
    RenderError,
    ServerError,
)
from diffagent.localcivitai.faults import Faults, Profile
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.server import serve
from diffagent.render.files.model_store import ModelStore
from diffagent.render.files.references import Reference, find, parse_reference
from diffagent.retries import Patience
from tests.conftest import ROOT

QUICK = Patience(first=0.01, longest=0.05, budget=10.0)
TOKEN = "a-token-of-nobody"


def weights(number: float, size: int = 30_000) -> bytes:
    return save({"unet.weight": np.full(size, number, dtype=np.float32)})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def header(tensors: dict[str, Any], data: bytes, length: int | None = None) -> bytes:
    raw = json.dumps(tensors).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensor(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def zip_bomb() -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    return file.getvalue()


GOOD, LORA, PRUNED, VAE = weights(1), weights(2), weights(3), weights(4)
#: Files with the right hash that must not be loaded, and what is said of them.
HARMFUL: dict[str, tuple[bytes, str]] = {
    "pickle": (b"\x80\x02}q\x00." + bytes(2000), "a pickle"),
    "zip bomb": (zip_bomb(), "a zip archive or a PyTorch pickle"),
    "absurd header": (header({}, bytes(100), length=2**62), "a header of 4611686018427387904"),
    "header beyond the file": (header({}, b"", length=5000), "cut off after 10 bytes"),
    "nan": (weights(float("nan")), "'unet.weight' holds NaN"),
    "infinity": (weights(float("inf")), "'unet.weight' holds NaN or infinity"),
    "overlap": (
        header({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6)),
        "tensor 'b' starts at 2, not at 4",
    ),
    "path": (header({"../../.bashrc": tensor(0, 4)}, bytes(4)), "holds a path"),
    "web page": (b"<!DOCTYPE html><html>please log in</html>", "instead of a file"),
}


def a_file(ident: int, content: bytes, **fields: Any) -> dict[str, Any]:
    digest = sha256(content).upper()
    return {
        "id": ident,
        "name": "model.safetensors",
        "type": "Model",
        "sizeKB": len(content) / 1024,
        "metadata": {"format": "SafeTensor"},
        "pickleScanResult": "Success",
        "virusScanResult": "Success",
        "hashes": {"SHA256": digest, "AutoV2": digest[:10], "BLAKE3": digest[::-1]},
        "downloadUrl": "set",
        "primary": True,
        **fields,
    }


def a_model(
    number: int, *files: dict[str, Any], version: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    """Model ``number`` with version 1000 + number."""
    about = {"id": 1000 + number, "name": "v1", "baseModel": "SDXL 1.0", "files": list(files)}
    head = {"id": number, "name": f"Model {number}", "type": "Checkpoint"}
    return {**head, "modelVersions": [{**about, **(version or {})}], **fields}


MODELS = [
    a_model(1, a_file(11, GOOD, name="../../../evil.safetensors")),
    a_model(
        2,
        a_file(21, LORA),
        a_file(22, PRUNED, primary=False, metadata={"format": "SafeTensor", "size": "pruned"}),
        a_file(23, VAE, primary=False, type="VAE"),
        type="LORA",
    ),
    a_model(
        3,
        a_file(31, weights(5)),
        version={"availability": "EarlyAccess", "earlyAccessEndsAt": "2030-01-01T00:00:00.000Z"},
    ),
    a_model(4, a_file(41, weights(6)), version={"usageControl": "Generation"}),
    a_model(5, a_file(51, weights(7)), mode="Archived"),
    a_model(6, a_file(61, weights(8), pickleScanResult="Pending", virusScanMessage="ok")),
    a_model(7, a_file(71, weights(9), virusScanResult="Danger", virusScanMessage="Trojan")),
    a_model(8, a_file(81, weights(10), metadata={"format": "PickleTensor"})),
    a_model(9, type="VAE"),
    *(
        a_model(100 + n, a_file(1000 + n, content))
        for n, (content, _) in enumerate(HARMFUL.values())
    ),
]
CONTENTS = [GOOD, LORA, PRUNED, VAE, *map(weights, range(5, 11)), *(c for c, _ in HARMFUL.values())]


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    folder = tmp_path_factory.mktemp("files")
    files = {sha256(content): folder / sha256(content) for content in CONTENTS}
    for content in CONTENTS:
        files[sha256(content)].write_bytes(content)
    return Replay.load(MODELS, [], files)


@pytest.fixture(scope="module")
def site(replay: Replay) -> Iterator[str]:
    with serve(replay, Faults()) as url:
        yield url


@contextmanager
def opened(url: str, directory: Path, **options: Any) -> Iterator[tuple[ModelStore, CivitaiClient]]:
    with (
        CivitaiClient(url, patience=QUICK, token=TOKEN) as client,
        ModelStore(directory, client, **options) as store,
    ):
        yield store, client


def kept(directory: Path) -> list[str]:
    """Files with weights, whole or in part, and notes about them."""
    return sorted(p.name for p in directory.glob("??/*") if p.suffix != ".lock")


# --- what people write ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "urn:air:sdxl:checkpoint:civitai:1@1001",
        "URN:AIR:sdxl:model:civitai:1@1001.safetensor",
        "air:sdxl:checkpoint:civitai:1@1001+11",
        "civitai:1",
        " 1001 ",
        "https://civitai.com/models/1/a-name?modelVersionId=1001",
        "https://civitai.red/models/1",
        "https://civitai.com/api/download/models/1001?type=Model&format=SafeTensor",
        sha256(GOOD),
        sha256(GOOD)[:10].upper(),
        sha256(GOOD)[::-1],
        f"hash:{sha256(GOOD)[:10]}",
    ],
)
def test_a_model_is_fetched_by_what_people_write(site: str, tmp_path: Path, reference: str) -> None:
    with opened(site, tmp_path) as (store, client):
        entry = find(client, reference)
        assert entry.air == "urn:air:sdxl:checkpoint:civitai:1@1001"
        path = store.fetch(entry)
    assert path == tmp_path / sha256(GOOD)[:2] / f"{sha256(GOOD)}.safetensors"
    assert path.read_bytes() == GOOD
    assert not list(tmp_path.rglob("*evil*")), "the site's file name is never a path"


def test_the_file_of_a_version_that_has_many_is_chosen_or_named(site: str) -> None:
    with CivitaiClient(site) as client:
        for reference, content in (
            ("1002", PRUNED),
            ("civitai:2@1002+21", LORA),
            (sha256(LORA), LORA),
            ("civitai:2@1002+23", VAE),
            (sha256(VAE)[:10], VAE),
        ):
            assert find(client, reference).sha256 == sha256(content), reference
        assert find(client, "1002").air == "urn:air:sdxl:lora:civitai:2@1002"


@pytest.mark.parametrize(
    ("reference", "error", "said"),
    [
        ("../../etc/passwd", ConfigError, "is not an AIR"),
        ("urn:air:sdxl:checkpoint:huggingface:1@2", ConfigError, "is not an AIR"),
        ("https://example.com/models/", ConfigError, "is not an AIR"),
        ("abc", ConfigError, "is not an AIR"),
        ("civitai:2@1001", NotFound, "version 1001 is of model 1, not 2"),
        ("civitai:1@1001+12", NotFound, "has no such file"),
        ("999", NotFound, "404"),
        ("f" * 64, NotFound, "404"),
        ("1009", NotFound, "no such file"),
        ("1006", RenderError, r"'Model 6'.*scan not passed.*pickle scan 'Pending'.*virus.*\(ok\)"),
        ("1007", RenderError, r"virus scan 'Danger' \(Trojan\)"),
        ("1008", RenderError, "no safetensors file"),
    ],
)
def test_what_cannot_be_fetched_is_told(
    site: str, reference: str, error: type[DiffAgentError], said: str
) -> None:
    with CivitaiClient(site) as client, pytest.raises(error, match=said):
        find(client, reference)


def test_scans_count_unless_told_otherwise_and_never_for_pickles(site: str, tmp_path: Path) -> None:
    with opened(site, tmp_path) as (store, client):
        assert store.fetch(find(client, "1006", require_scans=False)).read_bytes() == weights(8)
        with pytest.raises(RenderError, match="no safetensors file"):
            find(client, "1008", require_scans=False)


def test_references_are_read_without_a_site() -> None:
    assert parse_reference("urn:air:sd1:lora:civitai:12@34+56") == Reference(34, 12, None, 56)
    assert parse_reference("https://civitai.com/models/12?modelVersionId=34") == Reference(34, 12)
    assert parse_reference("1234567890") == Reference(version=1234567890)
    assert parse_reference("hash:1234567890") == Reference(digest="1234567890")
    assert parse_reference("ABCDEF1234") == Reference(digest="abcdef1234")


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_harmful_file_with_the_right_hash_is_refused_and_not_kept(
    site: str, tmp_path: Path, kind: str
) -> None:
    content, said = HARMFUL[kind]
    patience = Patience(first=0.01, longest=0.05, budget=0.3)
    with (
        CivitaiClient(site, patience=patience) as client,
        ModelStore(tmp_path, client) as store,
        pytest.raises(DiffAgentError, match=said) as refused,
    ):
        store.fetch(find(client, sha256(content)))
    if isinstance(refused.value, RenderError):
        assert refused.value.reason == "bad-model-file"
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    ("version", "error", "said"),
    [
        (1003, EarlyAccess, r"'Model 3'.*Early Access.*2030-01-01.*bought it"),
        (1004, DownloadsDisabled, "'Model 4'.*has disabled downloads"),
        (1005, NotFound, "'Model 5'.*archived"),
    ],
)
def test_what_the_site_does_not_give_is_told_by_name(
    site: str, tmp_path: Path, version: int, error: type[CivitaiError], said: str
) -> None:
    with opened(site, tmp_path) as (store, client), pytest.raises(error, match=said) as refused:
        store.fetch(find(client, str(version)))
    assert type(refused.value) is error and not refused.value.retryable
    assert TOKEN not in str(refused.value)
    assert kept(tmp_path) == []


# --- faults of the way ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["truncated", "html", "error_file", "unavailable", "timeout"])
def test_a_broken_way_is_gone_again(replay: Replay, tmp_path: Path, kind: str) -> None:
    faults = Faults(Profile({kind: 0.6}), seed=3)
    with serve(replay, faults) as url, opened(url, tmp_path) as (store, client):
        for version, content in ((1001, GOOD), (1002, PRUNED)):
            assert store.fetch(find(client, str(version))).read_bytes() == content
    assert faults.injected[kind] > 0
    assert [name for name in kept(tmp_path) if ".unchecked" in name] == []


@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["resumed", "range ignored"])
@pytest.mark.parametrize(
    "start",
    [GOOD[:50_000], GOOD, LORA[:50_000], LORA, GOOD * 2, b"<html>not this</html>"],
    ids=["half", "all", "half of another", "another", "too long", "a page"],
)
def test_a_download_goes_on_from_whatever_is_there(
    replay: Replay, tmp_path: Path, start: bytes, rate: float
) -> None:
    part = tmp_path / sha256(GOOD)[:2] / f"{sha256(GOOD)}.unchecked.part"
    part.parent.mkdir()
    part.write_bytes(start)
    faults = Faults(Profile({"no_range": rate}))
    with serve(replay, faults) as url, opened(url, tmp_path) as (store, client):
        assert store.fetch(find(client, "1001")).read_bytes() == GOOD
    assert (faults.injected["no_range"] > 0) == (rate > 0)


def test_several_processes_share_one_download(replay: Replay, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from diffagent.civitai.client import CivitaiClient\n"
        "from diffagent.render.files.model_store import ModelStore\n"
        "url, directory, sha256 = sys.argv[1:]\n"
        "file = SimpleNamespace(model='', air='', size_bytes=None, sha256=sha256,\n"
        "    download_path='/api/download/models/1001')\n"
        "sys.stdin.read()\n"
        "with CivitaiClient(url) as client, ModelStore(Path(directory), client) as store:\n"
        "    print(store.fetch(file))\n"
    )
    faults = Faults(Profile({"slow": 0.0}))
    with serve(replay, faults) as url:
        command = [sys.executable, "-c", code, url, str(tmp_path), sha256(GOOD)]
        pipe = subprocess.PIPE
        others = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
            for _ in range(2)
        ]
        paths = {other.communicate(timeout=120)[0].strip() for other in others}
    assert paths == {str(tmp_path / sha256(GOOD)[:2] / f"{sha256(GOOD)}.safetensors")}
    served = {key: n for key, n in faults._attempts.items() if key.startswith("/delivery/")}
    assert served == {f"/delivery/{sha256(GOOD)}": 1}


# --- a site that is no Civitai --------------------------------------------------------------

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def host(
    answers: dict[str, list[Answer]],
) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """A server that gives the answers of each path in turn, the last one again and again."""
    asked: list[tuple[str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, dict(self.headers)))
            turn = answers[self.path]
            (turn.pop(0) if len(turn) > 1 else turn[0])(self)

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def send(status: int, body: bytes = b"", *, length: bool = True, **headers: Any) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response_only(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), str(value))
        if length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def to(url: str) -> Answer:
    return send(307, Location=url)


DOWNLOAD = "/api/download/models/1"
FILE = {"Content_Type": "application/octet-stream"}


@contextmanager
def storage(*answers: Answer) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """A site whose download leads to these answers; what they were asked for."""
    with (
        host({"/file": list(answers)}) as (url, asked),
        host({DOWNLOAD: [to(f"{url}/file")]}) as (
            site,
            _,
        ),
    ):
        yield site, asked


def get(url: str, path: Path, budget: float = 10.0, **expected: Any) -> bytes:
    patience = Patience(first=0.01, longest=0.02, budget=budget)
    with CivitaiClient(url, patience=patience, token=TOKEN) as client:
        return client.download(1, path / "file", **expected).read_bytes()


def test_the_token_stays_with_the_site_however_often_storage_redirects(tmp_path: Path) -> None:
    with (
        host({"/last": [send(200, GOOD, **FILE)]}) as (second, last_asked),
        host({"/first": [to(f"{second}/last")]}) as (first, first_asked),
        host({DOWNLOAD: [to(f"{first}/first")]}) as (site, asked),
    ):
        assert get(site, tmp_path, sha256=sha256(GOOD)) == GOOD
    assert asked[0][1]["Authorization"] == f"Bearer {TOKEN}"
    for _, headers in first_asked + last_asked:
        assert "Authorization" not in headers and TOKEN not in str(headers)


def test_an_address_that_expired_is_asked_for_again(tmp_path: Path) -> None:
    answers = {"/file": [send(403, b"<Error>expired</Error>"), send(200, GOOD, **FILE)]}
    with host(answers) as (storage, _), host({DOWNLOAD: [to(f"{storage}/file")]}) as (site, asked):
        assert get(site, tmp_path, sha256=sha256(GOOD)) == GOOD
    assert len(asked) == 2


@pytest.mark.parametrize("other", [LORA, LORA + b"longer"], ids=["same size", "other size"])
def test_a_file_that_changes_on_the_way_is_begun_anew(tmp_path: Path, other: bytes) -> None:
    """Half of one file came, then the site has another one behind the same address."""

    def half(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response_only(200)
        handler.send_header("Content-Length", str(len(GOOD)))
        handler.end_headers()
        handler.wfile.write(GOOD[:100_000])
        handler.close_connection = True

    def rest(handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        span = f"bytes {start}-{len(other) - 1}/{len(other)}"
        send(206 if wanted else 200, other[start:], Content_Range=span)(handler)

    with storage(half, rest) as (site, asked):
        assert get(site, tmp_path, sha256=sha256(other)) == other
    assert "Range" in asked[1][1] and "Range" not in asked[-1][1]


def test_what_an_earlier_run_left_counts_only_with_a_hash_to_check_it(tmp_path: Path) -> None:
    with storage(send(200, GOOD, **FILE)) as (site, asked):
        (tmp_path / "file.part").write_bytes(LORA[:1000])
        assert get(site, tmp_path) == GOOD
    assert "Range" not in asked[0][1]


@pytest.mark.parametrize("length", [True, False], ids=["stated", "not stated"])
def test_a_file_of_another_size_is_stopped_before_it_fills_the_disk(
    tmp_path: Path, length: bool
) -> None:
    endless, got = send(200, bytes(range(256)) * 100_000, length=length, **FILE), [0]
    with (
        storage(endless) as (site, asked),
        pytest.raises(CivitaiError, match=r"not the one expected: .* instead of 5000"),
    ):
        get(site, tmp_path, size_bytes=5_000, on_bytes=lambda more: got.append(got[-1] + more))
    assert max(got) < 100_000
    assert len(asked) == 1, "a wrong record is not asked for twice"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_ends_early_without_a_length_is_continued(tmp_path: Path) -> None:
    half = send(200, GOOD[:60_000], length=False, **FILE)
    span = f"bytes 60000-{len(GOOD) - 1}/{len(GOOD)}"
    rest = send(206, GOOD[60_000:], Content_Range=span, **FILE)
    with storage(half, rest) as (site, asked):
        assert get(site, tmp_path, sha256=sha256(GOOD), size_bytes=len(GOOD)) == GOOD
    assert asked[1][1]["Range"] == "bytes=60000-"


@pytest.mark.parametrize("body", [b'{"error":"Model file not found"}', b"<!DOCTYPE html><html>"])
@pytest.mark.parametrize("kind", ["application/octet-stream", "application/json", "text/html", ""])
def test_an_error_is_never_saved_as_a_file(tmp_path: Path, body: bytes, kind: str) -> None:
    (tmp_path / "file.part").write_bytes(GOOD[:1000])
    with (
        storage(send(200, body, Content_Type=kind)) as (site, _),
        pytest.raises(ServerError, match="instead of a file"),
    ):
        get(site, tmp_path, 0.2, sha256=sha256(GOOD), size_bytes=len(GOOD))
    assert (tmp_path / "file.part").read_bytes() == GOOD[:1000], "what had come is kept"
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("target", "error", "said"),
    [
        ("/login?returnUrl=/models/1&reason=download-auth", Forbidden, "log-in required"),
        ("/pricing?reason=early-access&returnUrl=x", EarlyAccess, "early access"),
        ("/model-versions/1", Forbidden, "redirected to the page '/model-versions/1'"),
    ],
)
def test_pages_that_the_site_sends_browsers_to_are_understood(
    tmp_path: Path, target: str, error: type[Forbidden], said: str
) -> None:
    with (
        host({DOWNLOAD: [send(302, Location=target)]}) as (site, asked),
        pytest.raises(error, match=said),
    ):
        get(site, tmp_path)
    assert len(asked) == 1


def test_a_redirect_to_what_can_be_read_on_the_way_is_not_followed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = []

    def answer(url: str, **_: Any) -> requests.Response:
        sent.append(url)
        response = requests.Response()
        response.status_code, response.url = 307, url
        response.raw = BytesIO()
        response.headers["Location"] = "http://storage.example/file"
        return response

    with CivitaiClient("https://civitai.example") as client:
        monkeypatch.setattr(client, "_send", answer)
        with pytest.raises(CivitaiError, match="not https"):
            client.download(1, tmp_path / "file")
    assert sent == ["https://civitai.example/api/download/models/1"]


# --- the command line -----------------------------------------------------------------------


def invoke(*arguments: Any, fails: type[Exception] | None = None) -> str:
    result = CliRunner().invoke(app, ["models", *map(str, arguments)])
    if fails:
        assert isinstance(result.exception, fails), result.output
        return str(result.exception)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_the_commands_fetch_list_pin_and_evict(site: str, tmp_path: Path) -> None:
    models = ["--models", tmp_path]
    out = invoke("fetch", "civitai:1@1001", "1002", "--site", site, *models)
    paths = [Path(line) for line in out.split()]
    assert [path.read_bytes() for path in paths] == [GOOD, PRUNED]
    assert (
        Path(invoke("fetch", sha256(GOOD), "--site", "http://127.0.0.1:9", *models).strip())
        == (paths[0])
    ), "no site is asked for what is there by its hash"
    out = invoke("list", *models)
    assert "Model 1 urn:air:sdxl:checkpoint:civitai:1@1001" in out and "2 files, 0.000 GB" in out
    assert "pinned" in invoke("pin", sha256(GOOD)[:12], *models)
    listed = {file["sha256"]: file for file in json.loads(invoke("list", "--json", *models))}
    assert listed[sha256(GOOD)]["pinned"] and not listed[sha256(PRUNED)]["pinned"]
    assert "pinned" in invoke("evict", "civitai:1@1001", *models, fails=ConfigError)
    assert "Model 2" in invoke("evict", "--limit-gb", "0.0001", *models)
    assert [path.exists() for path in paths] == [True, False]
    invoke("unpin", "Model 1", *models)
    invoke("evict", "Model 1", *models)
    assert kept(tmp_path) == []
    assert "not one" in invoke("pin", "Model 1", *models, fails=ConfigError)
    assert "--limit-gb" in invoke("evict", *models, fails=ConfigError)


def test_the_commands_import_and_scan_folders(site: str, tmp_path: Path) -> None:
    folder = tmp_path / "webui"
    for name, content in (
        ("webui.py", b""),
        ("models/Stable-diffusion/good.safetensors", GOOD),
        ("models/Lora/bad.safetensors", HARMFUL["nan"][0]),
        ("models/VAE/old.pt", HARMFUL["pickle"][0]),
        ("embeddings/word.safetensors", LORA),
        ("venv/lib/test.safetensors", VAE),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    models = ["--models", tmp_path / "cache"]
    rows = [json.loads(line) for line in invoke("scan", folder, "--json", *models).splitlines()]
    assert [(Path(row["path"]).name, row["type"]) for row in rows] == [
        ("word.safetensors", "TextualInversion"),
        ("bad.safetensors", "LORA"),
        ("good.safetensors", "Checkpoint"),
        ("old.pt", "VAE"),
    ]
    assert rows[2]["sha256"] == sha256(GOOD)
    assert "PickleTensor" in rows[3]["refused"]
    out = invoke("fetch", "1001", "--folder", folder, "--site", site, *models)
    assert Path(out.strip()) == folder / "models/Stable-diffusion/good.safetensors"

    result = CliRunner().invoke(app, ["models", "import", str(folder), *map(str, models)])
    assert result.exit_code == 1
    assert "bad.safetensors" in result.output and "holds NaN" in result.output
    assert {f["sha256"] for f in json.loads(invoke("list", "--json", *models))} == {
        sha256(GOOD),
        sha256(LORA),
    }
    missing = invoke("fetch", "1001", "--folder", tmp_path / "no", *models, fails=ConfigError)
    assert "is not there" in missing


def test_the_command_refuses_by_name(site: str, tmp_path: Path) -> None:
    models = ["--models", tmp_path, "--site", site]
    assert "has disabled downloads" in invoke("fetch", "1004", *models, fails=DownloadsDisabled)
    assert "--allow-unscanned" in invoke("fetch", "1006", *models, fails=RenderError)
    assert invoke("fetch", "1006", "--allow-unscanned", *models).strip().endswith(".safetensors")


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_file_is_fetched_again(site: str, tmp_path: Path, damage: str) -> None:
    models = ["--models", tmp_path, "--site", site]
    path = Path(invoke("fetch", "1001", *models).strip())
    for reference in (sha256(GOOD), "civitai:1@1001"):
        damaged = GOOD[:-9] if damage == "cut" else GOOD[:-1] + bytes([GOOD[-1] ^ 1])
        path.write_bytes(damaged)
        assert invoke("fetch", reference, *models).strip().endswith(str(path))
        assert path.read_bytes() == GOOD


def test_a_record_of_an_impossible_size_evicts_nothing(site: str, tmp_path: Path) -> None:
    with opened(site, tmp_path) as (store, client):
        entry, other = find(client, "1001"), find(client, "1002")
        store.fetch(entry)
        store.release(entry)
        with pytest.raises(RenderError, match="does not fit on the disk") as refused:
            store.fetch(replace(other, size_bytes=10**15))
        assert refused.value.reason == "no-room"
        assert [file.sha256 for file in store.cache.files()] == [entry.sha256]


def test_a_disk_that_fills_is_a_line(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CivitaiClient, "download", full)
    with opened(site, tmp_path) as (store, client):
        with pytest.raises(RenderError, match=r"'Model 1' cannot be stored.*No space left") as said:
            store.fetch(find(client, "1001"))
        assert said.value.reason == "no-room"


def test_import_tells_what_it_refuses_and_takes_the_rest(tmp_path: Path) -> None:
    good, odd, link = (tmp_path / f"{name}.safetensors" for name in ("good", "odd", "link"))
    good.write_bytes(GOOD)
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    odd.write_bytes(header({"__metadata__": {"a": 5}, "w": entry}, b"1234"))  # type: ignore[dict-item]
    link.symlink_to(tmp_path / "nowhere")
    paths = [tmp_path / "nope", odd, link, good]
    models = ["--models", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, ["models", "import", *map(str, paths), *models])
    assert result.exit_code == 1
    assert "nope': there is no such file" in result.output
    assert "its __metadata__ has 5 for 'a'" in result.output
    assert "link.safetensors': there is no such file" in result.output
    (row,) = json.loads(invoke("list", "--json", *models))
    assert (row["sha256"], row["imported"]) == (sha256(GOOD), True)
    assert "imported" in invoke("list", *models)
    assert invoke("evict", "--limit-gb", "0", *models) == ""
    assert "evicted" in invoke("evict", "--limit-gb", "0", "--imported", *models)
    out = invoke("scan", tmp_path, *models)
    assert "refused: 'odd.safetensors' is refused: its __metadata__ has 5" in out


@pytest.mark.parametrize(
    "text", ["1\u00b2", "9" * 5000, "http://[", "https://civitai.com/models/" + "9" * 5000]
)
def test_odd_references_are_refused_in_a_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no address|is not an AIR"):
        parse_reference(text)
    assert parse_reference("https://civitai.com/models/1?modelVersionId=\u00b2").version is None


def test_import_tells_what_cannot_be_drawn_with(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(save({"x.weight": np.zeros((4, 4), np.uint8)}))
    arguments = ["models", "import", str(path), "--models", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "not drawn with" in result.output and "packed or quantised as U8" in result.output


def test_one_bad_reference_stops_no_other(site: str, tmp_path: Path) -> None:
    references = ["1001", "nonsense", "1004", "1002"]
    arguments = ["models", "fetch", *references, "--models", str(tmp_path), "--site", site]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError) and "'nonsense'" in str(result.exception)
    assert "has disabled downloads" in result.output
    assert kept(tmp_path) == sorted(
        f"{sha256(content)}.{end}" for content in (GOOD, PRUNED) for end in ("json", "safetensors")
    )
