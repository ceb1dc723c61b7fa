"""The local Civitai answers as the site does: filters, limits, cursors, shapes, errors."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import orjson
import pytest
import requests
from bs4 import BeautifulSoup

from tests.contract.conftest import BIG_VERSION, FILE_SHA256, MODEL_FILE, MODELS


def get(site: str, path: str, **params: object) -> requests.Response:
    return requests.get(site + path, params=params, timeout=30, allow_redirects=False)


def items(site: str, kind: str, **params: object) -> list[dict]:
    answer = get(site, f"/api/v1/{kind}", **params)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


@pytest.mark.parametrize(("kind", "limit"), [("models", 101), ("images", 201)])
def test_a_limit_above_the_maximum_is_400_with_an_error_object(site, kind, limit):
    answer = get(site, f"/api/v1/{kind}", limit=limit)
    assert answer.status_code == 400
    assert answer.json()["error"]["name"] == "ZodError"
    assert len(items(site, kind, limit=limit - 1)) == limit - 1


def test_default_limit_is_100(site):
    assert len(items(site, "models", nsfw="true")) == 100
    assert len(items(site, "images")) == 100


@pytest.mark.parametrize("kind", ["models", "images"])
def test_pages_beyond_1000_items_are_refused_with_429(site, kind):
    answer = get(site, f"/api/v1/{kind}", limit=100, page=11)
    assert answer.status_code == 429
    assert "cursors" in answer.json()["error"]
    assert get(site, f"/api/v1/{kind}", limit=100, page=10).status_code == 200


def test_page_mode_gives_a_cursor_but_its_next_page_carries_the_page(site):
    metadata = get(site, "/api/v1/images", limit=10, page=2).json()["metadata"]
    assert (metadata["currentPage"], metadata["pageSize"]) == (2, 10)
    assert parse_qs(urlsplit(metadata["nextPage"]).query)["page"] == ["3"]
    assert metadata["nextCursor"]


def test_query_refuses_page_and_has_offsets_for_cursors(site):
    assert get(site, "/api/v1/models", query="model 2", page=1).status_code == 400
    body = get(site, "/api/v1/models", query="synthetic", limit=10).json()
    assert body["metadata"]["nextCursor"] == "10"
    following = get(site, "/api/v1/models", query="synthetic", limit=10, cursor="10").json()
    assert {m["id"] for m in body["items"]}.isdisjoint(m["id"] for m in following["items"])


@pytest.mark.parametrize("name", ["favorites", "hidden"])
def test_naming_a_private_filter_is_401(site, name):
    assert get(site, "/api/v1/models", **{name: "false"}).status_code == 401


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("models", {"types": "LORA,LoCon"}),
        ("models", {"browsingLevel": "1"}),
        ("models", {"sort": "Best"}),
        ("models", {"ids": "1,x"}),
        ("models", {"cursor": "nonsense"}),
        ("images", {"cursor": "1|2|3|4"}),
        ("images", {"sort": "Newest", "cursor": "5|10005"}),
        ("images", {"nsfw": "perhaps"}),
        ("images", {"type": "painting"}),
    ],
)
def test_wrong_parameters_are_400(site, kind, params):
    assert get(site, f"/api/v1/{kind}", **params).status_code == 400


def test_types_are_repeated_and_type_is_ignored(site):
    both = items(site, "models", types=["LORA", "Checkpoint"])
    assert {m["type"] for m in both} == {"LORA", "Checkpoint"}
    assert {m["type"] for m in items(site, "models", types="LORA")} == {"LORA"}
    assert {m["type"] for m in items(site, "models", type="LORA")} == {"LORA", "Checkpoint"}


def test_model_filters(site):
    assert {m["id"] for m in items(site, "models", ids="1,2,400")} == {1, 2}
    assert {m["id"] for m in items(site, "models", modelVersionIds="1003")} == {3}
    assert {m["creator"]["username"] for m in items(site, "models", username="maker1")} == {
        "maker1"
    }
    assert all("even" in m["tags"] for m in items(site, "models", tag="even"))
    found = items(site, "models", baseModels="SDXL 1.0")
    assert {m["modelVersions"][0]["baseModel"] for m in found} == {"SDXL 1.0"}


def test_sorts(site):
    ids = [m["id"] for m in items(site, "models", sort="Newest")]
    assert ids == sorted(ids, reverse=True)
    ids = [m["id"] for m in items(site, "models", sort="Most Downloaded")]
    assert ids == sorted(ids)
    likes = [i["stats"]["likeCount"] for i in items(site, "images", sort="Most Reactions")]
    assert likes == sorted(likes, reverse=True)


@pytest.mark.parametrize("sort", ["Newest", "Oldest", "Most Reactions", "Random"])
def test_a_walk_by_cursors_gives_everything_once(site, sort):
    seen, cursor = [], None
    while True:
        params = {"sort": sort, "limit": 37, "browsingLevel": 31}
        body = get(site, "/api/v1/images", cursor=cursor, **params).json()
        seen += [item["id"] for item in body["items"]]
        cursor = body["metadata"].get("nextCursor")
        if cursor is None:
            break
    # 620 pictures; one shows a minor and is never listed.
    assert len(seen) == len(set(seen)) == 619


def test_default_browsing_level_is_pg(site):
    assert not any(m["nsfw"] for m in items(site, "models"))
    assert {i["nsfwLevel"] for i in items(site, "images", limit=200)} == {"None"}


def test_nsfw_widens_models_and_selects_images(site):
    models = items(site, "models", nsfw="true")
    assert {m["nsfw"] for m in models} == {True, False}
    assert {i["nsfwLevel"] for i in items(site, "images", nsfw="true")} == {"Mature"}
    levels = {i["nsfwLevel"] for i in items(site, "images", nsfw="X", limit=200)}
    assert levels == {"None", "Mature"}


def test_meta_needs_to_be_asked_for_and_is_nested_for_a_model(site):
    assert {str(i["meta"]) for i in items(site, "images", limit=10)} == {"None"}
    flat = items(site, "images", limit=10, withMeta="true", modelVersionId=BIG_VERSION)
    assert all("prompt" in i["meta"] for i in flat)
    nested = items(site, "images", limit=10, withMeta="true", modelId=MODELS)
    assert all(i["meta"]["id"] == i["id"] and "prompt" in i["meta"]["meta"] for i in nested)
    flat = items(site, "images", limit=10, withMeta="true", modelId=MODELS, flatMeta="true")
    assert all("prompt" in i["meta"] for i in flat)
    (image,) = items(site, "images", imageId=10_004, withMeta="true")
    assert image["meta"] == {"id": 10_004, "meta": None}


def test_images_filter_by_version_and_media(site):
    found = items(site, "images", modelVersionId=1004)
    assert 10_007 in {i["id"] for i in found}  # through civitaiResources
    assert all(1004 in i["modelVersionIds"] for i in found)
    assert [i["id"] for i in items(site, "images", type="video")] == [10_003]


def test_minors_and_annotations_never_leave(site):
    assert items(site, "images", imageId=10_006) == []
    for item in [*items(site, "models"), *items(site, "images")]:
        assert not [key for key in item if key.startswith("_")]


def test_a_model_has_no_meta_and_links_to_the_host_asked(site):
    model = get(site, "/api/v1/models/1").json()
    (version,) = model["modelVersions"]
    assert len(version["images"]) == 20
    assert not any("meta" in image for image in version["images"])
    assert version["downloadUrl"] == f"{site}/api/download/models/1001"
    assert "checkpointType" not in model
    assert "settings" not in version


def test_a_version_has_ten_pictures_with_meta(site):
    version = get(site, "/api/v1/model-versions/1001").json()
    assert version["modelId"] == 1
    assert version["model"]["type"] == "Checkpoint"
    assert version["air"] == "urn:air:sd1:checkpoint:civitai:1@1001"
    other = get(site, "/api/v1/model-versions/1003").json()
    assert other["air"] == "urn:air:sdxl:checkpoint:civitai:3@1003"
    assert len(version["images"]) == 10
    assert all("meta" in image for image in version["images"])


def test_by_hash_takes_any_case_and_the_earliest_version(site):
    path = "/api/v1/model-versions/by-hash/"
    assert get(site, path + FILE_SHA256).json()["id"] == 1001
    assert get(site, path + FILE_SHA256[:10].upper()).json()["id"] == 1001
    assert get(site, path + "AbCdEf12").json()["id"] == 1009
    assert get(site, path + "00000000").json() == {"error": "Model not found"}


def test_missing_records_are_404(site):
    answer = get(site, "/api/v1/models/999")
    assert (answer.status_code, answer.json()) == (404, {"error": "No model with id 999"})
    assert get(site, "/api/v1/model-versions/999").status_code == 404
    assert get(site, "/api/v1/models/abc").status_code == 400


def test_tags_and_creators_have_numbered_pages(site):
    tags = get(site, "/api/v1/tags").json()
    assert {tag["name"] for tag in tags["items"]} == {"synthetic", "even", "odd"}
    creators = get(site, "/api/v1/creators", limit=2).json()
    assert creators["metadata"]["totalPages"] == 2
    second = requests.get(creators["metadata"]["nextPage"], timeout=30).json()
    assert len(creators["items"] + second["items"]) == 3


def test_a_download_redirects_to_another_origin_that_refuses_the_token(site):
    answer = get(site, "/api/download/models/1001")
    assert answer.status_code == 307
    target = answer.headers["Location"]
    assert urlsplit(target).netloc != urlsplit(site).netloc
    assert requests.get(target, timeout=30).content == MODEL_FILE
    part = requests.get(target, headers={"Range": "bytes=1000-"}, timeout=30)
    assert (part.status_code, part.content) == (206, MODEL_FILE[1000:])
    refused = requests.get(target, headers={"Authorization": "Bearer x"}, timeout=30)
    assert refused.status_code == 400
    assert requests.get(target.partition("?")[0], timeout=30).status_code == 403
    # The storage is no API.
    origin = "http://" + urlsplit(target).netloc
    assert requests.get(f"{origin}/api/v1/models", timeout=30).status_code == 404


@pytest.mark.parametrize(
    ("version", "status"), [(1005, 403), (1006, 401), (1007, 410), (4242, 404)]
)
def test_closed_downloads(site, version, status):
    assert get(site, f"/api/download/models/{version}").status_code == status


def test_a_file_can_be_chosen_by_id(site):
    assert get(site, "/api/download/models/1001", fileId=5001).status_code == 307
    assert get(site, "/api/download/models/1001", fileId=1).status_code == 404


def test_the_page_redirects_to_its_slug_and_holds_the_state(site):
    answer = get(site, "/models/1")
    assert answer.status_code == 308
    assert answer.headers["Location"] == "/models/1/synthetic-model-1"
    page = requests.get(f"{site}/models/1", timeout=30).text
    script = BeautifulSoup(page, "html.parser").find("script", id="__NEXT_DATA__")
    state = orjson.loads(script.get_text())
    query = state["props"]["pageProps"]["trpcState"]["json"]["queries"][0]
    assert query["queryKey"][0] == ["model", "getById"]
    assert query["state"]["data"]["checkpointType"] == "Trained"
    assert get(site, "/models/999").status_code == 404
