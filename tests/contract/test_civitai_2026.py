"""The site's changes of 2026: the client, the local server and the filters know each."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests

from diffagent.civitai.client import CivitaiClient
from diffagent.civitai.pagination import walk_items
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.errors import BadCursor, CivitaiError, EarlyAccess, NotFound
from diffagent.localcivitai import server
from diffagent.localcivitai.faults import Faults
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.server import serve
from diffagent.render.files.references import parse_reference
from diffagent.schemas.payloads import paid_access
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact
from diffagent.t2i.metadata.values import air
from tests.contract.conftest import FILE_SHA256, synthetic_image, synthetic_model
from tests.contract.test_civitai_client import QUICK


def models(**changes: Any) -> list[dict[str, Any]]:
    """Six models; model 1 and its version have the changes that belong to them."""
    found = [synthetic_model(n) for n in (1, 2, 3, 4, 7, 11)]
    of_version = ("paidAccess", "earlyAccessEndsAt", "stats", "availability")
    for key, value in changes.items():
        (found[0]["modelVersions"][0] if key in of_version else found[0])[key] = value
    return found


def kept(records: list[dict[str, Any]], store: Path, **options: Any) -> tuple[Artifact, set[str]]:
    """The filtered snapshot of a site with these models, and why models were dropped."""
    runtime = RuntimeConfig(store=str(store))
    config = CrawlConfig(site="http://synthetic", model_types=(), image_source="feed")
    with serve(Replay.load(records, []), Faults()) as url:
        snapshot = crawl.run(config, {}, runtime, site_url=url)
    made = filter_records.run(FilterConfig(**options), {"snapshot": [snapshot]}, runtime)
    steps = made.manifest.funnels[0].steps
    return made, {f"{step.filter}: {step.reason}" for step in steps if step.dropped}


@pytest.mark.parametrize(
    ("paid", "reason"),
    [
        ({"permanent": True, "endsAt": None}, "paid access"),
        ({"permanent": True, "endsAt": "2020-01-01T00:00:00.000Z"}, "paid access"),
        ({"permanent": False, "endsAt": "2999-01-01T00:00:00.000Z"}, "early access"),
        ({"permanent": False, "endsAt": "2020-01-01T00:00:00.000Z"}, ""),
        ({"permanent": False, "endsAt": None}, ""),
        ({"endsAt": 1_900_000_000}, "early access"),
        (True, "paid access"),
        (False, ""),
        (None, ""),
    ],
)
def test_what_must_be_paid_for_is_not_available(tmp_path: Path, paid: Any, reason: str) -> None:
    records = models(paidAccess=paid)
    _, reasons = kept(records, tmp_path)
    closed = {f"file_availability: {r}" for r in ("paid access", "early access")}
    assert bool(reasons & closed) == bool(reason)
    assert paid_access(records[0]["modelVersions"][0], "2026-11-30") == reason
    with (
        serve(Replay.load(records, []), Faults()) as url,
        CivitaiClient(url, patience=QUICK) as client,
    ):
        if reason:
            with pytest.raises(EarlyAccess):
                client.resolve_download(1001)
        else:
            assert "/delivery/" in client.resolve_download(1001)


def test_an_early_access_ends_on_its_day() -> None:
    version = {"earlyAccessEndsAt": "2026-07-27T10:00:00.000Z"}
    assert paid_access(version, "2026-07-27") == "early access"
    assert paid_access(version, "2026-07-28") == ""
    assert paid_access(version, "") == "early access", "an unknown day is no evidence"


def test_hidden_counts_are_not_zero(tmp_path: Path) -> None:
    filters = (*FilterConfig().models, "downloads")
    _, reasons = kept(models(stats={"downloadCount": None}), tmp_path, models=filters)
    assert "downloads: downloads not stated" in reasons
    assert "downloads: too few downloads" not in reasons
    made, reasons = kept(models(stats={}), tmp_path / "any", models=filters, min_downloads=0)
    assert not any(reason.startswith("downloads") for reason in reasons)
    assert made.manifest.rows["catalogue"] > 0


def test_a_default_listing_shows_minors_and_the_filter_drops_them(tmp_path: Path) -> None:
    _, reasons = kept(models(minor=True), tmp_path)
    assert "nsfw: minor" in reasons
    _, reasons = kept(models(poi=True), tmp_path / "poi")
    assert "nsfw: real person" in reasons


def test_by_hash_gives_the_earliest_and_its_model() -> None:
    records = models()
    twin = synthetic_model(9)
    twin["modelVersions"][0]["files"] = records[0]["modelVersions"][0]["files"]
    undated = synthetic_model(10)
    undated["modelVersions"][0]["files"] = records[0]["modelVersions"][0]["files"]
    del undated["modelVersions"][0]["publishedAt"]
    twin["modelVersions"][0]["publishedAt"] = "2023-01-01T00:00:00.000Z"
    unknown = "f" * 64
    with (
        serve(Replay.load([undated, *records, twin], []), Faults()) as url,
        CivitaiClient(url, patience=QUICK) as client,
    ):
        assert client.get_by_hash(FILE_SHA256.upper())["id"] == 1009
        second = hashlib.sha256(b"2").hexdigest()
        assert client.get_ids_by_hash([second, FILE_SHA256, unknown]) == {
            second: (2, 1002),
            FILE_SHA256: (9, 1009),
        }
        assert client.get_ids_by_hash([]) == {}
        route = f"{url}/api/v1/model-versions/by-hash"
        answers = requests.post(route, json=[second.upper()], timeout=30).json()
        assert [(v["id"], v["modelId"]) for v in answers] == [(1002, 2)]
        for body in (b"{", b'["short"]', b"[1]", orjson.dumps([second] * 101), b"x" * (2 << 20)):
            assert requests.post(route, data=body, timeout=30).status_code == 400
        assert requests.post(f"{route}/ids", json=[second] * 101, timeout=30).status_code == 200


def test_an_id_that_is_out_of_range_is_not_found(recorder: Any) -> None:
    recorder.status, recorder.body = 400, orjson.dumps({"error": "out of range"})
    with CivitaiClient(recorder.url, patience=QUICK) as client:
        for call in (client.get_model, client.get_version):
            with pytest.raises(NotFound):
                call(2**31)
            with pytest.raises(CivitaiError, match="not an answer") as caught:
                call(5)
            assert not isinstance(caught.value, NotFound)
    assert client.retries == 0
    with serve(Replay.load(models(), []), Faults()) as url:
        for ident in (2**60, 10**30):
            for route in ("models", "model-versions"):
                answer = requests.get(f"{url}/api/v1/{route}/{ident}", timeout=30)
                assert answer.status_code == 400


def test_tags_of_pictures_come_when_they_are_asked_for() -> None:
    image = {**synthetic_image(1), "tags": [7, 9]}
    with serve(Replay.load(models(), [image, synthetic_image(2)]), Faults()) as url:
        route = f"{url}/api/v1/images?browsingLevel=31&sort=Oldest"
        without = requests.get(route, timeout=30).json()["items"]
        with_tags = requests.get(f"{route}&withTags=true", timeout=30).json()["items"]
    assert [item.get("tags") for item in without] == [None, None]
    assert [item.get("tags") for item in with_tags] == [[7, 9], None]


def test_a_search_ends_at_its_last_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_SEARCH_HITS", 40)
    records = [synthetic_model(n) for n in range(1, 101)]
    with (
        serve(Replay.load(records, []), Faults()) as url,
        CivitaiClient(url, patience=QUICK) as client,
    ):
        hits = list(
            walk_items(partial(client.get_models, query="synthetic", limit=20, nsfw="true"))
        )
        assert len(hits) == 40
        assert len(list(walk_items(partial(client.get_models, limit=20, nsfw="true")))) == 100
        for cursor in ("40", "-1", "x", "1|2"):
            with pytest.raises(BadCursor):
                client.get_models(cursor, query="synthetic", limit=20)


@pytest.mark.parametrize("status", [408, 499, 500, 503])
def test_what_a_search_answers_when_it_is_busy_is_tried_again(recorder: Any, status: int) -> None:
    recorder.status = status
    recorder.headers = {"Content-Type": "application/json", "Retry-After": "0"}
    patience = type(QUICK)(first=0.001, longest=0.01, budget=0.1)
    with CivitaiClient(recorder.url, patience=patience) as client, pytest.raises(CivitaiError) as e:
        client.get_models()
    assert e.value.retryable and len(recorder.asked) > 1


def test_airs_of_2026() -> None:
    bare = synthetic_model(1)
    bare["modelVersions"][0]["files"][0]["type"] = "Diffusion Model"
    with (
        serve(Replay.load([bare, synthetic_model(2)], []), Faults()) as url,
        CivitaiClient(url, patience=QUICK) as client,
    ):
        assert client.get_version(1001)["air"] == "urn:air:sd1:diffusionmodel:civitai:1@1001"
        assert client.get_version(1002)["air"] == "urn:air:sd1:checkpoint:civitai:2@1002"
    reference = parse_reference("urn:air:flux1:diffusionmodel:civitai:12@34+56")
    assert (reference.model, reference.version, reference.file) == (12, 34, 56)
    kinds = frozenset({"checkpoint", "diffusionmodel"})
    assert air("urn:air:flux1:diffusionmodel:civitai:12@34+56", kinds) == 34
