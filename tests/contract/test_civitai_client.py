"""The client survives what the site does, and gives its secrets to nobody."""

from __future__ import annotations

import random
import threading
import time
from functools import partial
from itertools import count

import orjson
import pytest

from diffagent.civitai.client import USER_AGENT, CivitaiClient
from diffagent.civitai.pagination import walk_items
from diffagent.errors import (
    BadCursor,
    CivitaiError,
    ConfigError,
    Forbidden,
    NotFound,
    PageCap,
    RateLimited,
    ServerError,
)
from diffagent.localcivitai.faults import TRANSPORT, Faults, Profile
from diffagent.retries import Patience
from tests.contract.conftest import FILE_SHA256, MODEL_FILE

QUICK = Patience(first=0.001, longest=0.01, budget=60.0, read_timeout=10.0)
TOKEN = "secret-of-the-test"


def client_of(url: str, **options: object) -> CivitaiClient:
    return CivitaiClient(url, **{"patience": QUICK, **options})


@pytest.mark.parametrize("kind", TRANSPORT)
def test_every_fault_of_an_answer_is_survived(faulty, kind):
    faults = Faults(Profile({kind: 0.3 if kind == "too_many_wait" else 0.6}), seed=3)
    with faulty(faults) as url, client_of(url) as client:
        found = [
            i["id"] for i in walk_items(partial(client.get_images, limit=100, browsingLevel=31))
        ]
        assert client.get_by_hash(FILE_SHA256)["id"] == 1001
        assert client.get_model_page(1)["checkpointType"] == "Trained"
    assert len(found) == len(set(found)) == 619
    assert faults.injected[kind] > 0
    assert client.retries > 0 or kind == "slow"


@pytest.mark.parametrize("kind", ["empty", "duplicate", "moved", "loop"])
def test_every_fault_of_a_page_is_survived(faulty, kind):
    faults = Faults(Profile({kind: 0.6}), seed=1)
    with faulty(faults) as url, client_of(url) as client:
        models = [
            m["id"]
            for m in walk_items(partial(client.get_models, limit=20, nsfw="true", sort="Newest"))
        ]
    assert sorted(models) == list(range(1, 231))
    assert faults.injected[kind] > 0


def test_stale_cursors_start_the_listing_again(faulty):
    faults = Faults(Profile(deploy_every=4, deploys=2))
    with faulty(faults) as url, client_of(url) as client:
        models = [
            m["id"]
            for m in walk_items(partial(client.get_models, limit=30, nsfw="true", sort="Newest"))
        ]
        asked = client.requests
        with pytest.raises(BadCursor):
            client.get_models("-5", sort="Newest")
    assert sorted(models) == list(range(1, 231))
    assert asked > 2 * 230 / 30
    assert faults.epoch == 2


def test_faults_are_equal_for_equal_seeds():
    def struck(seed: int) -> list[str | None]:
        faults = Faults("hostile", seed=seed)
        return [faults.transport(f"/x?{n}", a) for n in range(200) for a in range(4)]

    assert struck(1) == struck(1) != struck(2)
    assert all(fault is None for fault in struck(1)[3::4])


def test_what_cannot_succeed_is_raised_at_once(site):
    with client_of(site) as client:
        with pytest.raises(NotFound, match="No model with id 999"):
            client.get_model(999)
        with pytest.raises(PageCap, match="cursors"):
            client.get_models(page=11, limit=100)
        with pytest.raises(BadCursor):
            client.get_images("1|2|3|4|5")
        with pytest.raises(Forbidden, match="CIVITAI_TOKEN"):
            client.get_models(favorites="false")
        with pytest.raises(CivitaiError, match="Number must be"):
            client.get_models(limit=101)
        assert client.retries == 0


def test_retry_after_is_honoured(recorder):
    recorder.status, recorder.headers = 429, {"Retry-After": "1"}
    patience = Patience(first=0.001, longest=0.01, budget=1.5)
    started = time.monotonic()
    with client_of(recorder.url, patience=patience) as client, pytest.raises(RateLimited):
        client.get_model(1)
    assert time.monotonic() - started >= 1
    assert len(recorder.asked) == 2


def test_a_date_to_wait_for_is_read_by_the_site_s_clock(recorder, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this machine's clock is decades behind
    recorder.status = 503
    now = "Fri, 21 Nov 2036 10:00:00 GMT"
    recorder.headers = {"Retry-After": now.replace("00 GMT", "01 GMT"), "Date": now}
    patience = Patience(first=0.001, longest=0.01, budget=1.5)
    started = time.monotonic()
    with client_of(recorder.url, patience=patience) as client, pytest.raises(ServerError):
        client.get_model(1)
    assert 1 <= time.monotonic() - started < 20
    assert len(recorder.asked) == 2


def test_a_wait_that_the_site_asks_for_holds_all_threads(recorder):
    recorder.status, recorder.headers = 429, {"Retry-After": "1"}
    with client_of(recorder.url) as client:
        first = threading.Thread(target=client.get_model, args=(1,))
        first.start()
        while not client.retries:
            time.sleep(0.005)
        recorder.status, recorder.headers = 200, {"Content-Type": "application/json"}
        started = time.monotonic()
        assert client.get_model(2) == {}
        assert time.monotonic() - started > 0.3
        first.join()


def test_a_real_site_is_asked_once_a_second_and_patiently():
    rng, patience = random.Random(0), Patience()
    with CivitaiClient("https://civitai.com") as client:
        assert client._bucket.rate == 1.0
        assert client.patience == patience
        assert USER_AGENT.startswith("DiffAgent/") and "Mozilla" not in USER_AGENT
    pauses = [patience.pause(failures, rng) for failures in range(60)]
    assert 0.5 <= pauses[0] <= 1.0 and all(15 <= pause <= 30 for pause in pauses[5:])
    assert len(set(pauses)) == 60, "with jitter"


@pytest.mark.parametrize("status", [500, 502, 503, 504, 524, 429, 408])
def test_what_may_pass_is_tried_again(recorder, status):
    recorder.status, recorder.headers = status, {"Content-Type": "text/html"}
    patience = Patience(first=0.001, longest=0.002, budget=5.0)
    with client_of(recorder.url, patience=patience) as client:

        def recover() -> None:
            while not client.retries:
                time.sleep(0.001)
            recorder.headers = {"Content-Type": "application/json"}
            recorder.status = 200

        thread = threading.Thread(target=recover)
        thread.start()
        assert client.get_model(1) == {}
        thread.join()
        assert client.retries >= 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_what_cannot_pass_is_asked_once(recorder, status):
    recorder.status = status
    with client_of(recorder.url) as client, pytest.raises(CivitaiError):
        client.get_model(1)
    assert len(recorder.asked) == 1


def test_the_budget_ends_the_tries(recorder):
    recorder.status = 503
    patience = Patience(first=0.01, longest=0.02, budget=1.5)
    client = client_of(recorder.url, patience=patience)
    with client, pytest.raises(ServerError, match="gave up after"):
        client.get_model(1)
    assert len(recorder.asked) > 3


def test_nobody_listens():
    patience = Patience(first=0.01, longest=0.02, budget=0.1)
    client = client_of("http://127.0.0.1:9", patience=patience)
    with client, pytest.raises(ServerError, match="transfer broke"):
        client.get_model(1)


def test_the_token_goes_to_the_site_and_nowhere_else(recorder, site, monkeypatch, caplog, tmp_path):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("CIVITAI_TOKEN", TOKEN)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password other-secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with client_of(recorder.url) as client:
        assert client.get_model(1) == {}
        assert recorder.asked[0][1]["Authorization"] == f"Bearer {TOKEN}"
        assert recorder.asked[0][1]["User-Agent"].startswith("DiffAgent/")
    # The storage answers 400 to any Authorization, so this shows that none is sent.
    with client_of(site) as client:
        assert client.download(1001, tmp_path / "file", sha256=FILE_SHA256).stat().st_size
    recorder.asked.clear()
    with client_of(site) as client, pytest.raises(ConfigError):
        client.resolve_download(f"{recorder.url}/api/download/models/1")
    assert recorder.asked == []
    assert TOKEN not in caplog.text


def test_netrc_is_not_read(recorder, monkeypatch, tmp_path):
    monkeypatch.delenv("CIVITAI_TOKEN", raising=False)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password other-secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with client_of(recorder.url) as client:
        client.get_model(1)
    assert "Authorization" not in recorder.asked[0][1]


def test_a_foreign_next_page_gives_its_cursor_only(recorder):
    pages = count()

    def page() -> bytes:
        cursor = f"https://civitai.red/api/v1/models?limit=1&cursor=c{next(pages)}"
        return orjson.dumps({"items": [], "metadata": {"nextPage": cursor}})

    recorder.headers, recorder.body = {"Content-Type": "application/json"}, page()
    with client_of(recorder.url) as client:
        assert client.get_models().cursor == "c0"
        client.get_models("c0", limit=1)
    assert recorder.asked[1][0] == "/api/v1/models?limit=1&cursor=c0"


def test_a_redirect_to_the_log_in_page_is_forbidden(recorder):
    recorder.status, recorder.headers = 302, {"Location": "/login?returnUrl=x"}
    with client_of(recorder.url) as client, pytest.raises(Forbidden, match="log-in"):
        client.resolve_download(1)


def test_a_redirect_to_a_foreign_host_is_not_followed(recorder, site):
    recorder.status, recorder.headers = 302, {"Location": f"{site}/api/v1/models/1"}
    with client_of(recorder.url) as client, pytest.raises(CivitaiError, match="foreign host"):
        client.get_model(1)
    assert len(recorder.asked) == 1


def test_download_verifies(site, tmp_path):
    path = tmp_path / "model.safetensors"
    with client_of(site) as client:
        client.download(
            "/api/download/models/1001?fileId=5001",
            path,
            sha256=FILE_SHA256.upper(),
            size_bytes=len(MODEL_FILE),
        )
        assert path.read_bytes() == MODEL_FILE
        for wrong in ({"sha256": "0" * 64}, {"size_bytes": 5_000}):
            with pytest.raises(CivitaiError, match="not the one expected"):
                client.download(1001, tmp_path / "wrong", **wrong)
        with pytest.raises(NotFound):
            client.download(1002, tmp_path / "absent")
        with pytest.raises(Forbidden):
            client.download(1005, tmp_path / "early")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("start", [MODEL_FILE[:1000], MODEL_FILE, b"not this file", MODEL_FILE * 2])
def test_download_goes_on_from_what_is_there(site, tmp_path, start):
    (tmp_path / "model.part").write_bytes(start)
    with client_of(site) as client:
        client.download(1001, tmp_path / "model", sha256=FILE_SHA256)
    assert (tmp_path / "model").read_bytes() == MODEL_FILE


@pytest.mark.parametrize("kind", ["truncated", "html", "unavailable"])
def test_broken_downloads_are_continued(faulty, tmp_path, kind):
    faults = Faults(Profile({kind: 0.7}), seed=2)
    with faulty(faults) as url, client_of(url) as client:
        for number in range(4):
            path = client.download(1001, tmp_path / str(number), sha256=FILE_SHA256)
            assert path.read_bytes() == MODEL_FILE
    assert faults.injected[kind] > 0


def test_the_rate_is_kept(recorder):
    with client_of(recorder.url, requests_per_second=20.0) as client:
        started = time.monotonic()
        for number in range(5):
            client.get_model(number)
    assert time.monotonic() - started >= 4 / 20
