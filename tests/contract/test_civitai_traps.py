"""What the API's users fall into, one by one: a crawl does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import requests

from diffagent.civitai.client import CivitaiClient, _SiteToken
from diffagent.civitai.pagination import Page, next_cursor
from diffagent.errors import CivitaiError, Forbidden, NotFound, PageCap, RateLimited, ServerError
from diffagent.localcivitai.faults import Faults
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.server import serve
from tests.contract.conftest import synthetic_model
from tests.contract.test_civitai_client import QUICK
from tests.contract.test_civitai_crawl import ALL, rows
from tests.contract.test_civitai_crawl import run as crawl
from tests.contract.test_civitai_refresh import World, run

#: Every parameter that a crawl may send. Not among them: ``favorites`` and ``hidden`` (401 when
#: they are only named), ``browsingLevel`` on /models (400), flags that any text makes true
#: (``supportsGeneration=false``), ``type`` on /models (ignored), ``page`` (ends at 1,000 items).
ALLOWED = {
    "models": {"cursor", "sort", "limit", "period", "nsfw", "types", "ids"},
    "images": {"cursor", "sort", "limit", "period", "type", "browsingLevel", "withMeta"}
    | {"modelVersionId", "imageId"},
}


@pytest.mark.parametrize("source", ["feed", "versions", "showcase"])
@pytest.mark.parametrize("nsfw", [False, True])
def test_no_parameter_is_one_of_the_traps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, nsfw: bool
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    send = CivitaiClient._send

    def remember(self: CivitaiClient, url: str, **options: Any) -> Any:
        assert "token=" not in url
        asked.append((url.partition("/api/v1/")[2], dict(options.get("params") or {})))
        return send(self, url, **options)

    monkeypatch.setattr(CivitaiClient, "_send", remember)
    world = World(models=30, images=60)
    kinds = ("LORA", "Checkpoint")
    config = ALL.model_copy(update={"image_source": source, "nsfw": nsfw, "model_types": kinds})
    run(world, tmp_path, config)
    del world.models[4], world.images[10_030]
    run(world, tmp_path, config)
    run(world, tmp_path, config, reconcile=True)
    listings = [(path, params) for path, params in asked if path in ALLOWED]
    assert {path for path, _ in listings} == {"models"} | (
        {"images"} if source != "showcase" else set()
    )
    for path, params in listings:
        assert params.keys() <= ALLOWED[path]
        assert (
            params["limit"] <= {"models": 100, "images": 200}[path] if "limit" in params else True
        )
        if path == "images":
            assert params["withMeta"] == "true"
            assert params["browsingLevel"] == (31 if nsfw or "imageId" in params else 1)
        else:
            assert params.get("types") == list(kinds) or "ids" in params
            assert params["period"] == "AllTime"
            assert params.get("nsfw", "true") == "true" and ("nsfw" in params) == nsfw


BODIES = {
    "text": {"error": "it says why"},
    "zod": {
        "error": {"issues": [{"path": ["limit"], "message": "it says why"}], "name": "ZodError"}
    },
    "trpc": {"code": "BAD_REQUEST", "message": "it says why", "issues": []},
    "message": {"message": "it says why"},
    "images": {"error": "it says why", "code": "BAD_REQUEST"},
}


@pytest.mark.parametrize("body", BODIES.values(), ids=list(BODIES))
def test_what_an_error_says_is_read_in_all_its_shapes(recorder: Any, body: Any) -> None:
    recorder.status, recorder.body = 400, orjson.dumps(body)
    client = CivitaiClient(recorder.url, patience=QUICK)
    with client, pytest.raises(CivitaiError, match="it says why"):
        client.get_model(1)
    assert len(recorder.asked) == 1


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (
            401,
            {"error": "Unauthorized", "message": "Downloads are disabled"},
            Forbidden,
            "CIVITAI_TOKEN",
        ),
        (401, {"code": "UNAUTHORIZED", "message": "Unauthorized", "issues": []}, Forbidden, "401"),
        (403, {"error": "Early Access", "deadline": "2030-01-01"}, Forbidden, "Early Access"),
        (404, {"error": "Missing model file"}, NotFound, "Missing model file"),
        (
            429,
            {"error": "You've requested too many pages, please use cursors instead"},
            PageCap,
            "cursors",
        ),
    ],
)
def test_an_error_is_what_its_body_says(
    recorder: Any, status: int, body: Any, error: type[CivitaiError], says: str
) -> None:
    recorder.status, recorder.body = status, orjson.dumps(body)
    client = CivitaiClient(recorder.url, patience=QUICK)
    with client, pytest.raises(error, match=says):
        client.get_model(1)
    assert len(recorder.asked) == 1, "none of them is tried again"


@pytest.mark.parametrize("status", [499, 524])
def test_what_may_pass_has_no_json(recorder: Any, status: int) -> None:
    recorder.status, recorder.headers = status, {"Content-Type": "text/html"}
    recorder.body = b"<!doctype html><title>524: A timeout occurred</title>"
    patience = type(QUICK)(first=0.001, longest=0.01, budget=0.1)
    client = CivitaiClient(recorder.url, patience=patience)
    with client, pytest.raises(ServerError, match=str(status)):
        client.get_model(1)
    assert len(recorder.asked) > 1


def test_a_429_of_the_edge_is_tried_again_and_one_of_the_page_cap_is_not(recorder: Any) -> None:
    recorder.status, recorder.headers = 429, {"Content-Type": "text/html"}
    patience = type(QUICK)(first=0.001, longest=0.01, budget=0.1)
    client = CivitaiClient(recorder.url, patience=patience)
    with client, pytest.raises(RateLimited):
        client.get_model(1)
        assert len(recorder.asked) > 1


def test_only_a_missing_cursor_ends_a_listing() -> None:
    assert (
        next_cursor({"nextCursor": "a|b", "totalItems": 3, "currentPage": 9, "totalPages": 9})
        == "a|b"
    )
    page_mode = {"nextCursor": "c", "nextPage": "https://civitai.com/api/v1/images?page=2"}
    assert next_cursor(page_mode) == "c"
    assert next_cursor({"nextCursor": 0}) == "0", "an offset"


def test_the_token_is_for_one_origin() -> None:
    sign = _SiteToken("https://civitai.com", "secret")
    for url, signed in (
        ("https://civitai.com/api/v1/models", True),
        ("https://civitai.red/api/v1/models", False),
        ("http://civitai.com/api/v1/models", False),
        ("https://civitai.com.evil.example/", False),
        ("https://b2.civitai.com/file/x", False),
    ):
        request = requests.Request("GET", url, auth=sign).prepare()
        assert ("Authorization" in request.headers) == signed, url


def odd_models() -> list[dict[str, Any]]:
    """What a site has too: hidden counts, no versions, no creator, taken down, levels as text."""
    hidden, empty, nobody, taken = (synthetic_model(n) for n in (1, 2, 3, 4))
    hidden["stats"] = {"downloadCount": None, "tippedAmountCount": None, "thumbsUpCount": 1}
    empty["modelVersions"] = []
    del nobody["creator"]
    taken |= {"mode": "TakenDown", "creator": None, "allowCommercialUse": None}
    taken["modelVersions"][0] |= {"images": [], "files": []}
    return [hidden, empty, nobody, taken]


def test_models_that_hide_or_lack_something_are_kept(tmp_path: Path) -> None:
    config = ALL.model_copy(update={"image_source": "showcase", "model_pages": 2})
    with serve(Replay.load(odd_models(), []), Faults()) as url:
        snapshot = crawl(url, tmp_path, config)
    found = {m["id"]: m for m in rows(snapshot, "models")}
    assert found.keys() == {1, 2, 3, 4}
    assert found[1]["stats"]["downloadCount"] is None and found[2]["modelVersions"] == []
    assert [page["id"] for page in rows(snapshot, "pages")] == [2, 3], "hidden counts come last"


def test_nested_metadata_of_one_picture_is_the_same_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/images?imageId= nests meta; asked for so, a known picture has not changed."""
    world = World(models=20, images=30)
    first = run(world, tmp_path)
    ask = CivitaiClient.get_images

    def hide(self: CivitaiClient, cursor: str | None = None, **params: Any) -> Page:
        page = ask(self, cursor, **params)
        if "imageId" in params:
            assert page.items[0]["meta"].keys() == {"id", "meta"}
            return page
        left = [item for item in page.items if item["id"] != 10_010]
        return Page.of(left, page.cursor)

    monkeypatch.setattr(CivitaiClient, "get_images", hide)
    assert run(world, tmp_path, reconcile=True) == first
