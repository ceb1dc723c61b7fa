"""Hostile sites and ways to them: the client's time, memory, disk and secrets are bounded."""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from diffagent.civitai import download, transport
from diffagent.civitai.address import Address
from diffagent.civitai.client import CivitaiClient
from diffagent.civitai.pagination import next_cursor
from diffagent.civitai.transport import Deadline
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.errors import CivitaiError, ConfigError, ServerError
from diffagent.render.files.references import parse_reference
from diffagent.retries import Patience
from diffagent.run_config import configure
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.t2i.catalogue import make_entry
from tests.conftest import ROOT
from tests.contract.conftest import FILE_SHA256, MODEL_FILE
from tests.contract.test_civitai_crawl import ALL, rows

QUICK = Patience(first=0.001, longest=0.01, budget=0.3, read_timeout=5.0, answer=0.3)
TOKEN = "0123456789abcdef-secret"
Talk = Callable[[socket.socket], None]


@contextmanager
def talker(talk: Talk) -> Iterator[str]:
    """A server that reads a request's headers and then does whatever it likes."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            try:
                data = b""
                while b"\r\n\r\n" not in data:
                    more = connection.recv(65536)
                    if not more:
                        return
                    data += more
                talk(connection)
            except OSError:
                return  # the client has hung up

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        over.set()
        listening.close()


def raw(text: bytes) -> Talk:
    return lambda connection: connection.sendall(text)


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", "Connection: close", *headers]
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


JSON = "Content-Type: application/json"


def client_of(url: str, **options: Any) -> CivitaiClient:
    return CivitaiClient(url, **{"patience": QUICK, **options})


# --- sizes ---


@functools.cache
def bomb(layers: int) -> bytes:
    if layers == 1:
        return gzip.compress(b'{"id":1,"x":"' + b"a" * (300 << 20) + b'"}', 1)
    return gzip.compress(bomb(layers - 1), 9)


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "302 Found"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_gzip_bomb_takes_no_memory(layers: int, status: str) -> None:
    headers = [
        JSON,
        f"Content-Encoding: {', '.join(['gzip'] * layers)}",
        "Location: http://other.example/",
    ]
    text = answer(bomb(layers), *headers, status=status)
    code = (
        "import resource, sys\n"
        "from diffagent.civitai.client import CivitaiClient\n"
        "from diffagent.retries import Patience\n"
        "from diffagent.errors import CivitaiError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "client = CivitaiClient(sys.argv[1], patience=Patience(0.5, 0.5, 9.0, answer=60.0))\n"
        "try:\n    client.get_model(1)\n"
        "except CivitaiError as error:\n    print(str(error)[:200])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    with talker(raw(text)) as url:
        done = subprocess.run(
            [sys.executable, "-c", code, url], capture_output=True, text=True, cwd=ROOT, check=True
        )
    said, grown = done.stdout.splitlines()
    assert int(grown) < 200 << 10, "kilobytes; the bomb unpacks to 300 MB"
    if status.startswith("200"):
        assert "more than 64 MB" in said


def test_a_page_of_too_many_items_is_refused() -> None:
    body = b'{"items": [' + b"{}," * 2_000 + b"{}]}"
    too_many = pytest.raises(ServerError, match="2001 items on a page")
    with talker(raw(answer(body, JSON))) as url, client_of(url) as client, too_many:
        client.get_images()
    body = b'{"items": [' + b"[]," * 4_000_000 + b"[]]}"
    too_many = pytest.raises(CivitaiError, match="more than 4,000,000 parts")
    patient = Patience()
    with (
        talker(raw(answer(body, JSON))) as url,
        client_of(url, patience=patient) as client,
        too_many,
    ):
        client.get_images()


def test_a_file_of_no_stated_size_ends_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_UNSTATED_BYTES", 3 << 20)
    sent = itertools.count()

    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            connection.sendall(b"\0" * (1 << 16))
            next(sent)

    with storage_behind(endless) as url, client_of(url) as client:
        with pytest.raises(CivitaiError, match="neither its record nor the site states a size"):
            client.download(1, tmp_path / "model")
        # With a size in the record it ends there.
        with pytest.raises(CivitaiError, match="not the one expected"):
            client.download(1, tmp_path / "model", size_bytes=1 << 20)
    assert not list(tmp_path.iterdir())
    assert next(sent) < 1_000


@contextmanager
def storage_behind(talk: Talk) -> Iterator[str]:
    """A site whose downloads lead to a storage that talks so."""
    with talker(talk) as storage:
        leads = answer(b"", f"Location: {storage}/file", status="307 Temporary Redirect")
        with talker(raw(leads)) as url:
            yield url


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "asked"), [(0, 0), (40 << 20, 1)])
def test_a_full_disk_is_said_before_and_while_it_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, asked: int
) -> None:
    body = b"\0" * (4 << 20)
    frees = itertools.chain([free], itertools.repeat(0))
    monkeypatch.setattr(download, "_DISK_STEP", 1 << 20)
    usage = lambda _: Usage(10 << 30, 0, next(frees) + (100 << 20 if asked else 0))  # noqa: E731
    monkeypatch.setattr(download.shutil, "disk_usage", usage)
    said = r"no room for .* are free; make room"
    with (
        storage_behind(raw(answer(body))) as url,
        client_of(url) as client,
        pytest.raises(CivitaiError, match=said) as caught,
    ):
        client.download(1, tmp_path / "model", sha256="0" * 64)
    assert not caught.value.retryable
    assert not (tmp_path / "model").exists()


def test_a_disk_that_is_full_all_of_a_sudden_is_no_traceback(tmp_path: Path) -> None:
    """A limit of the process on file sizes stands for the disk: the same OSError."""
    code = (
        "import errno, sys\nfrom pathlib import Path\n"
        "from diffagent.civitai import download\n"
        "from diffagent.civitai.client import CivitaiClient\n"
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "download._DISK_FULL = (errno.EFBIG,)\n"
        "try:\n    CivitaiClient(sys.argv[1]).download(1, Path(sys.argv[2]))\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    with storage_behind(raw(answer(b"\0" * 1_000_000))) as url:
        command = [sys.executable, "-c", code, url, str(tmp_path / "model")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("CivitaiError 1: no room for")


# --- time ---

SLOW_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SLOW: dict[str, tuple[bytes, bytes]] = {
    "status line": (b"", b"HTTP/1.1 " + b"0" * 10_000),
    "headers": (SLOW_HEAD, b"X-Slow: " + b"x" * 10_000),
    "body": (SLOW_HEAD + b"Content-Length: 10000\r\n\r\n", b"[" * 10_000),
    "chunk sizes": (SLOW_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 10_000),
    "chunks": (SLOW_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n[\r\n" * 2_000),
}


@pytest.mark.parametrize(("head", "rest"), SLOW.values(), ids=list(SLOW))
@pytest.mark.parametrize("is_file", [False, True], ids=["answer", "file"])
def test_a_byte_now_and_then_does_not_outlive_the_budget(
    tmp_path: Path, head: bytes, rest: bytes, is_file: bool
) -> None:
    sent = itertools.count()

    def trickle(connection: socket.socket) -> None:
        connection.sendall(head)
        for byte in rest[:400]:  # 20 seconds
            connection.sendall(bytes([byte]))
            next(sent)
            time.sleep(0.05)

    site = storage_behind(trickle) if is_file else talker(trickle)
    with site as url, client_of(url) as client, pytest.raises(ServerError, match="gave up"):
        if is_file:
            client.download(1, tmp_path / "model", sha256="0" * 64, size_bytes=10_000)
        else:
            client.get_model(1)
    assert next(sent) < 200


def test_a_deadline_moves_with_bytes_that_are_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(transport.time, "monotonic", lambda: now)
    slow, fast, fixed = Deadline(10, 100), Deadline(10, 100), Deadline(10)
    for second in range(1, 31):
        now = float(second)
        slow.gained(50)
        fast.gained(150)
        fixed.gained(10**9)
    assert slow.left() == fixed.left() == -20
    assert fast.left() == 10


# --- nonsense ---

NONSENSE: dict[str, bytes] = {
    "no status line": b"nonsense\r\n\r\n",
    "status of letters": b"HTTP/1.1 abc OK\r\n\r\n",
    "status 99999": b"HTTP/1.1 99999 OK\r\n\r\n",
    "status 0": b"HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n",
    "status 204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "status 102": b"HTTP/1.1 102 Processing\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"",
    "NULs": b"\0" * 1000,
    "endless header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    "1000 headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "header without colon": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n{}",
    "length of letters": answer(b"{", JSON, "Content-Length: abc"),
    "negative length": answer(b"{", JSON, "Content-Length: -5"),
    "superscript length": answer(b"{", JSON, "Content-Length: \u00b2"),
    "two lengths": answer(b"{", JSON, "Content-Length: 1, 2"),
    "length of 5000 digits": answer(b"{", JSON, "Content-Length: " + "9" * 5_000),
    "chunk size of letters": answer(b"xyz\r\n{}\r\n", JSON, "Transfer-Encoding: chunked"),
    "negative chunk": answer(b"-5\r\n{}\r\n", JSON, "Transfer-Encoding: chunked"),
    "huge chunk": answer(b"f" * 30 + b"\r\n{", JSON, "Transfer-Encoding: chunked"),
    "endless chunk line": answer(b"0" * 70_000, JSON, "Transfer-Encoding: chunked"),
    "unknown encoding": answer(b"{", JSON, "Content-Encoding: nonsense"),
    "no gzip": answer(b"not gzip", JSON, "Content-Encoding: gzip"),
    "cut gzip": answer(gzip.compress(b"{}" * 99)[:20], JSON, "Content-Encoding: gzip"),
    "ten encodings": answer(b"x", JSON, "Content-Encoding: " + ",".join(["gzip"] * 10)),
    "charset": answer(b'{"a":', "Content-Type: application/json; charset=nonsense"),
    "bad cookie": answer(b"{", JSON, "Set-Cookie: \x01=;expires=x;max-age=y", "Set-Cookie: ="),
    "deep error": answer(b'{"error":' * 1000 + b"1" + b"}" * 1000, JSON, status="400 Bad Request"),
    "deep issue": answer(
        b'{"error":{"issues":[{"path":[' + b"[" * 900 + b"]" * 900 + b"]}]}}",
        JSON,
        status="400 Bad Request",
    ),
    **{
        f"retry after {text[:12]!r}": answer(
            b"", f"Retry-After: {text}", date, status="503 Unavailable"
        )
        for text in ("abc", "1e999", "nan", "-5", "\u00b2", "Fri, 99 Xyz 99999 99:99:99", "9" * 999)
        for date in ("Date: Mon, 01 Jan 0001 00:00:00 GMT",)
    },
    **{
        f"location {text[:30]!r}": answer(b"", f"Location: {text}", status="302 Found")
        for text in (
            *("http://[", "http://[::1", "//", "http://", "http:///x", "http://:80/x", "::::"),
            *("http://host:port/", "http://host:99999/", "http://h:\u00b2/", "ftp://host/x"),
            *("javascript:alert(1)", "http://a b/", "http://\u00e9/", "http://%/", "http://*/"),
            *("x" * 60_000, "\x00"),
            *("http://[fe80::1%25eth0]/", "http://[v1.x]/", "http://a..b:/", "http://host\\x", ""),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE.values(), ids=list(NONSENSE))
def test_nonsense_is_an_error_in_one_line(tmp_path: Path, text: bytes) -> None:
    patience = Patience(first=0.001, longest=0.01, budget=0.03, read_timeout=1.0, answer=1.0)
    with talker(raw(text)) as url, client_of(url, patience=patience) as client:
        for call in (
            lambda: client.get_model(1),
            client.get_models,
            lambda: client.get_model_page(1),
            lambda: client.get_ids_by_hash(["0" * 64]),
        ):
            with pytest.raises(CivitaiError) as caught:
                call()
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        with contextlib.suppress(CivitaiError):  # an address on the site itself is one
            client.resolve_download(1)
    with storage_behind(raw(text)) as url, client_of(url, patience=patience) as client:
        with pytest.raises(CivitaiError) as caught:
            client.download(1, tmp_path / "model", sha256="0" * 64)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        {"nextPage": ""},
        {"nextPage": 5},
        {"nextPage": "http://h:x/?page=2"},
        {},
    ],
)
def test_a_next_page_that_is_none_ends_the_listing(metadata: dict[str, Any]) -> None:
    assert next_cursor(metadata) is None


@pytest.mark.parametrize("page", ["http://[::1", "\\\\@?cursor", "https://h\\@x/\0", "later"])
def test_a_next_page_that_cannot_be_read_is_not_taken_for_the_end(page: str) -> None:
    with pytest.raises(ServerError, match="names no next page"):
        next_cursor({"nextPage": page})


@pytest.mark.parametrize("cursor", [[], {}, True, "x" * 3_000, ["a"]])
def test_a_cursor_that_is_none_is_an_error(cursor: object) -> None:
    with pytest.raises(ServerError, match="a cursor that is none"):
        next_cursor({"nextCursor": cursor})


@pytest.mark.parametrize(
    "text",
    [
        *("http://[", "http://[::1/models/5", "http://x/models/" + "9" * 5_000),
        *("urn:air:sdxl:lora:civitai:" + "9" * 5_000, "civitai:1@" + "9" * 5_000, "\x00", ""),
    ],
    ids=lambda text: text[:20],
)
def test_references_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="an AIR"):
        parse_reference(text)
    assert parse_reference("http://x/models/5?modelVersionId=\u00b2").version is None


@pytest.mark.parametrize("link", ["http://[?type=VAE", "\\?type=VAE#x", "?type=VAE", "x?type=VAE"])
def test_a_download_address_of_a_record_is_never_parsed(link: str) -> None:
    model = {"id": 1, "type": "LORA", "name": "x"}
    file = {"name": "x.safetensors", "downloadUrl": link}
    entry = make_entry(model, {"id": 2, "baseModel": "SD 1.5"}, file)
    assert entry.download_path == "/api/download/models/2?type=VAE"


# --- addresses ---


@pytest.mark.parametrize(
    "text",
    [
        *("https://civitai.com\\@evil.example/", "https://civitai.com\\.evil.example/"),
        *("https://civitai.com@evil.example/", "https://civitai.com:443@evil.example/"),
        *("https://user:password@civitai.com/", "https://evil.example\t.civitai.com/"),
        *("https://evil.example%2f.civitai.com/", "https://evil.example%23@civitai.com/"),
        *("https:\\\\evil.example/", "/\\evil.example/", "https://civitai.com\r\nHost: x/"),
        *("https://civitai.com:443:80/", "https://[civitai.com]/", "https://civitai\u3002com/"),
        *("https://\uff43ivitai.com/", "https://civitai.com;evil.example/", "https://civitai.com&x/"),
    ],
)  # fmt: skip
def test_addresses_that_parsers_read_differently_are_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Address.parse(text, "https://civitai.com/api/v1/models")
    assert "password" not in str(caught.value)


def test_addresses_are_sent_as_they_were_checked() -> None:
    base = "https://civitai.com/api/v1/models?limit=1"
    for text, url in {
        "/x?y=a b#z": "https://civitai.com/x?y=a%20b",
        "HTTPS://CIVITAI.RED:8443/A": "https://civitai.red:8443/A",
        "//b2.civitai.com/file/x.y?sig=%2B+/@": "https://b2.civitai.com/file/x.y?sig=%2B+/@",
        "http://[::1]:80": "http://[::1]:80/",
        "?cursor=1|2": "https://civitai.com/api/v1/models?cursor=1%7C2",
        "/n\u00e4me": "https://civitai.com/n%C3%A4me",
        "http://my_host/@x": "http://my_host/@x",
    }.items():
        assert Address.parse(text, base).url == url
    assert Address.parse("http://127.9.9.9/").is_loopback
    assert Address.parse("http://[::1]/").is_loopback
    assert not Address.parse("http://127.0.0.1.evil.example/").is_loopback
    assert Address.parse("https://x.civitai.com").is_site
    assert not Address.parse("https://civitai.com.evil.example").is_site


@pytest.mark.parametrize(
    "form", ["{other}\\@{own}", "{own}\\@{other}", "{own}@{other}", "//{other}"]
)
def test_no_redirect_leads_to_another_host(recorder: Any, form: str) -> None:
    other = recorder.url.removeprefix("http://")
    asked: list[str] = []

    def redirect(connection: socket.socket) -> None:
        own = f"127.0.0.1:{connection.getsockname()[1]}"
        asked.append(own)
        place = form.format(own=own, other=other)
        place = place if place.startswith("//") else f"http://{place}"
        connection.sendall(answer(b"", f"Location: {place}/api/v1/models/1", status="302 Found"))

    with (
        talker(redirect) as url,
        client_of(url, token=TOKEN) as client,
        pytest.raises(CivitaiError, match="not followed"),
    ):
        client.get_model(1)
    assert asked and not recorder.asked


@pytest.mark.parametrize(
    "site",
    [
        "https://user:pass-word@civitai.com",
        "https://user:pa/ss-word@civitai.com",
        "http://pass-word@127.0.0.1:1",
        "https://civitai.com/?token=pass-word",
    ],
)
def test_a_secret_in_the_site_is_refused_and_not_repeated(site: str) -> None:
    data = {
        "crawl": {"site": site},
        "rewards": {"scorers": [{"name": "clip", "model": "tiny-clip"}], "unify": "chatgen"},
    }
    with pytest.raises(ConfigError, match="CIVITAI_TOKEN") as caught:
        configure(data, None, "run.yaml")
    assert "pass-word" not in str(caught.value)
    with pytest.raises(ConfigError) as refused:
        CivitaiClient(site if "?" not in site else "https://pass-word@x")
    assert "pass-word" not in str(refused.value)
    assert CrawlConfig(site="dump:/data/me@home").site == "dump:/data/me@home"


# --- the token ---


def test_no_token_over_plain_http(
    recorder: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The recorder is the proxy, so that another host can be asked without a network."""
    monkeypatch.setenv("CIVITAI_TOKEN", TOKEN)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, recorder.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with client_of("http://mirror.example", requests_per_second=99) as client:
        assert client.get_model(1) == {}
    (asked,) = recorder.asked
    assert asked[0] == "http://mirror.example/api/v1/models/1"
    assert "Authorization" not in asked[1]
    assert "the token is not sent" in caplog.text and TOKEN not in caplog.text


def test_a_dead_proxy_is_not_between_this_machine_and_itself(
    site: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with client_of(site) as client:
        assert client.download(1001, tmp_path / "m", sha256=FILE_SHA256).read_bytes() == MODEL_FILE
        assert client.retries == 0


ECHOES = {
    "error": lambda: answer(orjson.dumps({"error": f"bad key {TOKEN}"}), JSON, status="403 No"),
    "reason": lambda: answer(b"", status=f"403 {TOKEN}"),
    "type": lambda: answer(b"", f"Content-Type: {TOKEN}"),
    "location": lambda: answer(b"", f"Location: /login/../{TOKEN}", status="302 Found"),
    "own page": lambda: answer(b"", f"Location: /see/{TOKEN}", status="302 Found"),
    "cursor": lambda: answer(
        orjson.dumps({"items": [], "metadata": {"nextCursor": [TOKEN]}}), JSON
    ),
    "keys": lambda: answer(orjson.dumps({TOKEN: 1}), JSON),
}


@pytest.mark.parametrize("make", ECHOES.values(), ids=list(ECHOES))
def test_an_echoed_token_is_not_repeated(
    make: Callable[[], bytes], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    patience = Patience(first=0.001, longest=0.01, budget=0.03)
    with talker(raw(make())) as url, client_of(url, token=TOKEN, patience=patience) as client:
        for call in (client.get_models, lambda: client.get_model_page(1)):
            with pytest.raises(CivitaiError) as caught:
                call()
            assert TOKEN not in str(caught.value)
        with pytest.raises(CivitaiError) as caught:
            client.download(1, tmp_path / "model")
        assert TOKEN not in str(caught.value)
    assert TOKEN not in caplog.text


def test_an_echoed_token_is_in_no_snapshot(
    recorder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIVITAI_TOKEN", TOKEN)
    model = {"id": 1, "name": f"for {TOKEN}", "type": "LORA", "modelVersions": []}
    recorder.body = orjson.dumps({"items": [model], "metadata": {}})
    snapshot = crawl.run(ALL, {}, RuntimeConfig(store=str(tmp_path)), site_url=recorder.url)
    assert recorder.asked[0][1]["Authorization"] == f"Bearer {TOKEN}"
    assert rows(snapshot, "models")[0]["name"] == "for ***"


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "caf\u00e9", "\x1b[31m"])
def test_a_token_that_is_none_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(ConfigError, match="CIVITAI_TOKEN") as caught:
        CivitaiClient("https://civitai.com", token=token)
    assert token not in str(caught.value)
    assert CivitaiClient("https://civitai.com", token=" key\n")._token == "key"


# --- silence ---


def test_the_first_failure_is_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    patience = Patience(first=0.01, longest=0.02, budget=0.2)
    client = client_of("http://127.0.0.1:9", patience=patience)
    with client, pytest.raises(ServerError):
        client.get_model(1)
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1, "further failures are said every half minute"
    text = said[0].getMessage()
    assert (
        text.startswith("http://127.0.0.1:9: attempt 1 failed (") and "NewConnectionError" in text
    )
    assert re.search(r"next attempt in [\d.]+ s, the last one before \d\d:\d\d:\d\d$", text)


def test_a_server_that_is_silent_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_SILENCE", 0.05)

    def late(connection: socket.socket) -> None:
        while "sends nothing since" not in caplog.text:
            time.sleep(0.01)
        connection.sendall(answer(b"{}", JSON))

    patience = Patience(budget=60.0, read_timeout=60.0)
    with talker(late) as url, client_of(url, patience=patience) as client:
        assert client.get_model(1) == {}
        assert client.retries == 0


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--only", "crawl", "--config", "{config}"],
        ["models", "fetch", "--models", "{models}", "--site", "http://127.0.0.1:9", "12"],
    ],
    ids=["crawl", "models fetch"],
)
def test_commands_say_it_without_being_asked_to(tmp_path: Path, command: list[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "crawl: {site: 'http://127.0.0.1:9'}\n"
        "rewards: {scorers: [{name: clip, model: tiny-clip}], unify: chatgen}\n"
        f"runtime: {{store: {tmp_path / 'store'}}}\n"
    )
    words = [w.format(config=config, models=tmp_path / "models") for w in command]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffagent", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr
    try:
        for line in process.stderr:
            if "attempt 1 failed" in line:
                break
            assert "error" not in line, line
        else:
            pytest.fail("the command ended, or said nothing")
    finally:
        process.kill()
        process.communicate()


def test_flows_reach_prefect_s_server_on_this_machine_behind_a_proxy(recorder: Any) -> None:
    """The demo's flow talks to a server of its own, with httpx."""
    code = "import sys, flows, httpx; print(httpx.get(sys.argv[1]).text)"
    dead = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", code, recorder.url],
        env={**os.environ, **dead, "NO_PROXY": "other.example", "no_proxy": "other.example"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == "{}\n"


# --- https ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of mirror.example, with its key in the same file."""
    if not shutil.which("openssl"):
        pytest.skip("makes a certificate with openssl, which is not here")
    path = tmp_path_factory.mktemp("tls") / "mirror.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=mirror.example"
    names = ["-addext", "subjectAltName=DNS:mirror.example", "-keyout", f"{path}.key", "-out", path]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + Path(f"{path}.key").read_bytes())
    return path


@pytest.fixture
def tunnel(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Talk], None]]:
    """A proxy behind which https://mirror.example is: call it with how that talks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    talks: list[Talk] = []

    def connect(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(65536)
            talks[-1](secure)

    with talker(connect) as url:
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        yield talks.append


def test_bounds_hold_over_https_and_through_a_proxy(tunnel: Callable[[Talk], None]) -> None:
    sent = itertools.count()

    def trickle(connection: socket.socket) -> None:
        connection.sendall(SLOW_HEAD + b"Content-Length: 10000\r\n\r\n")
        for _ in range(400):
            connection.sendall(b"[")
            next(sent)
            time.sleep(0.05)

    with client_of("https://mirror.example", requests_per_second=99, token=TOKEN) as client:
        tunnel(raw(answer(b'{"id": 5}', JSON)))
        assert client.get_model(5) == {"id": 5}
        tunnel(raw(answer(b"", "Location: http://mirror.example/x", status="302 Found")))
        with pytest.raises(CivitaiError, match="not https; not followed"):
            client.get_model(5)
        tunnel(trickle)
        with pytest.raises(ServerError, match="gave up"):
            client.get_model(5)
    assert next(sent) < 200
