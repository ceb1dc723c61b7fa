"""A refresh asks for what can have changed, and loses nothing whatever the site answers."""

from __future__ import annotations

import copy
import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from diffagent.civitai.client import CivitaiClient
from diffagent.civitai.pagination import Page
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.errors import CivitaiError, Forbidden, NotFound, ServerError
from diffagent.localcivitai.faults import Faults, Profile
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.server import serve
from diffagent.schemas.payloads import content
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact
from tests.contract.conftest import IMAGES, MODELS, synthetic_image, synthetic_model
from tests.contract.test_civitai_crawl import ALL, HOSTILE, rows

FEED = ALL
GALLERIES = ALL.model_copy(update={"image_source": "versions"})
Records = dict[int, dict[str, Any]]


class World:
    """The synthetic site, to be changed between crawls."""

    def __init__(self, models: int = MODELS, images: int = IMAGES) -> None:
        self.models: Records = {n: synthetic_model(n) for n in range(1, models + 1)}
        self.images: Records = {i["id"]: i for i in map(synthetic_image, range(images))}

    @contextmanager
    def site(self, profile: Profile | None = None, seed: int = 0) -> Iterator[str]:
        """Serve it as it is now."""
        records = [copy.deepcopy(list(kind.values())) for kind in (self.models, self.images)]
        with serve(Replay.load(*records, None), Faults(profile or Profile(), seed)) as url:
            yield url


def run(world: World, store: Path, config: CrawlConfig = FEED, **options: Any) -> Artifact:
    """Crawl the world, or refresh the crawl that is in the store."""
    faults = {key: options.pop(key) for key in ("profile", "seed") if key in options}
    cache = {"directory": options.pop("cache", None)}
    runtime = RuntimeConfig(store=str(store), site=options, cache=cache)
    with world.site(**faults) as url:
        return crawl.run(config, {}, runtime, site_url=url, refresh=True)


def changes(snapshot: Artifact) -> dict[str, dict[str, list[int]]]:
    """What changes.json says, without what is empty."""
    said = orjson.loads(snapshot.file("changes.json").read_bytes())
    said.pop("previous")
    for hows in said.values():
        for how, found in list(hows.items()):
            assert found["count"] == len(found["ids"])
            hows[how] = found["ids"]
            if not found["ids"]:
                del hows[how]
    return {kind: hows for kind, hows in said.items() if hows}


def tombstones(snapshot: Artifact) -> set[tuple[str, int]]:
    return {(row["kind"], row["id"]) for row in rows(snapshot, "gone")}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every request of the test, in order."""
    seen: list[str] = []
    send = CivitaiClient._send

    def remember(self: CivitaiClient, url: str, **options: Any) -> Any:
        seen.append(f"{url.partition('/api/v1')[2]} {dict(options.get('params') or {})}")
        return send(self, url, **options)

    monkeypatch.setattr(CivitaiClient, "_send", remember)
    return seen


def test_an_unchanged_refresh_costs_few_requests_and_finds_nothing_new(tmp_path, asked):
    world = World()
    first = run(world, tmp_path)
    asked.clear()
    for model in world.models.values():  # people go on downloading and liking
        model["stats"]["downloadCount"] += 1000
        model["modelVersions"][0]["stats"] = {"downloadCount": 5}
        model["modelVersions"][0]["files"][0]["scannedAt"] = "2026-01-01T00:00:00.000Z"
    for image in world.images.values():
        image["stats"]["likeCount"] += 1
    assert run(world, tmp_path) == first
    # Two pages of models (one and the overlap), the other 30 by ids, two pages of images.
    assert len(asked) == 5
    assert not list(tmp_path.glob("crawl/.*partial"))
    assert len(list(tmp_path.glob("crawl/[0-9a-f]*/manifest.json"))) == 1


def test_new_models_and_images_are_found_and_nothing_else_is_asked_for(tmp_path, asked):
    world = World()
    run(world, tmp_path)
    world.models[231] = synthetic_model(231)
    world.models[5]["modelVersions"].insert(
        0, {**synthetic_model(900)["modelVersions"][0], "id": 9000}
    )
    world.models[6]["description"] = "<p>Another one.</p>"
    world.images[10_900] = synthetic_image(900)
    asked.clear()
    second = run(world, tmp_path)
    assert changes(second) == {
        "models": {"added": [231], "changed": [6]},
        "versions": {"added": [1231, 9000]},
        "images": {"added": [10_900]},
    }
    # Walks that found something are made twice: 3 + 3 pages of either, and 1 batch.
    assert len(asked) <= 13
    with world.site() as url:
        fresh = crawl.run(FEED, {}, RuntimeConfig(store=str(tmp_path / "x")), site_url=url)
    assert second.content_digest == fresh.content_digest
    assert list(map(content, rows(second, "models"))) == list(map(content, rows(fresh, "models")))


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_faults_change_nothing_in_a_refresh(tmp_path, seed):
    world = World()
    run(world, tmp_path)
    for number in range(231, 340):
        world.models[number] = synthetic_model(number)
    for number in range(620, 900):
        world.images[10_000 + number] = synthetic_image(number)
    second = run(world, tmp_path, profile=HOSTILE, seed=seed)
    with world.site() as url:
        fresh = crawl.run(FEED, {}, RuntimeConfig(store=str(tmp_path / "x")), site_url=url)
    assert second.content_digest == fresh.content_digest
    assert tombstones(second) == set()


def test_what_is_gone_keeps_its_record_and_gets_a_tombstone_until_it_is_back(tmp_path):
    world = World()
    world.models[9]["modelVersions"].append(
        {**synthetic_model(900)["modelVersions"][0], "id": 9009}
    )
    first = run(world, tmp_path)
    away = {n: world.models.pop(n) for n in (3, 120, 230)}
    version = world.models[9]["modelVersions"].pop()
    image = world.images.pop(10_100)
    second = run(world, tmp_path)
    expected = {("models", 3), ("models", 120), ("models", 230)}
    expected |= {("versions", 9009)}
    assert tombstones(second) == expected, "the feed was not walked to the end: nothing is said"
    assert changes(second) == {
        "models": {"removed": [3, 120, 230]},
        "versions": {"removed": [9009]},
    }
    for row in rows(second, "gone"):
        assert row["reason"] == "404" and len(row["date"]) == 10
    old, new = ({m["id"]: m for m in rows(s, "models")} for s in (first, second))
    assert old == new, "the last good records stay, the version's too"
    assert run(world, tmp_path) == second

    third = run(world, tmp_path, reconcile=True)
    assert tombstones(third) == expected | {("images", 10_100)}
    assert changes(third) == {"images": {"removed": [10_100]}}
    assert image["id"] in {i["id"] for i in rows(third, "images")}
    assert third.manifest.metrics["recall"] == {"models": 1.0, "versions": 1.0, "images": 1.0}

    world.models |= away
    world.models[9]["modelVersions"].append(version)
    world.images[10_100] = image
    fourth = run(world, tmp_path, reconcile=True)
    assert tombstones(fourth) == set()
    assert changes(fourth) == {
        "models": {"returned": [3, 120, 230]},
        "versions": {"returned": [9009]},
        "images": {"returned": [10_100]},
    }
    assert fourth.content_digest == first.content_digest


def test_a_model_that_is_back_is_found_whatever_batches_leave_out(tmp_path, monkeypatch):
    world, leaves_out = World(), Profile({"missing": 1.0})
    run(world, tmp_path)
    away = world.models.pop(3)
    assert tombstones(run(world, tmp_path)) == {("models", 3)}
    world.models[3] = away
    with monkeypatch.context() as later:  # long gone: asked for in batches alone
        later.setattr("diffagent.crawl.refresh._REQUESTED_DAYS", -1)
        assert tombstones(run(world, tmp_path, profile=leaves_out)) == {("models", 3)}
    found = run(world, tmp_path, profile=leaves_out)
    assert tombstones(found) == set()
    assert changes(found) == {"models": {"returned": [3]}}


def generations(snapshot: Artifact) -> dict[str, dict[int, int]]:
    """Id -> generation of models, versions and images."""
    models = rows(snapshot, "models")
    versions = [version for model in models for version in model["modelVersions"]]
    kinds = {"models": models, "versions": versions, "images": rows(snapshot, "images")}
    return {k: {i["id"]: i["_generation"] for i in items} for k, items in kinds.items()}


def said_generations(snapshot: Artifact) -> list[int]:
    lines = snapshot.file("generations.jsonl").read_bytes().splitlines()
    said = [orjson.loads(line) for line in lines]
    assert all(len(row["date"]) == 10 for row in said)
    return [row["generation"] for row in said]


def test_an_item_keeps_the_generation_of_its_first_crawl(tmp_path):
    world = World(models=40, images=60)
    first = run(world, tmp_path)
    assert {g for kind in generations(first).values() for g in kind.values()} == {0}
    assert run(world, tmp_path) == first and said_generations(first) == [0]

    version = {**synthetic_model(900)["modelVersions"][0], "id": 9009}
    world.models[9]["modelVersions"].insert(0, version)
    world.models[41], world.images[10_900] = synthetic_model(41), synthetic_image(900)
    world.models[6]["description"] = "changed"
    away = world.models.pop(3)
    second = run(world, tmp_path)
    new = generations(second)
    assert said_generations(second) == [0, 1]
    assert {(k, i) for k, items in new.items() for i, g in items.items() if g} == {
        *(("models", 41), ("versions", 1041), ("versions", 9009), ("images", 10_900))
    }

    world.models[3] = away
    world.models[41]["description"] = "changed"
    world.models[42] = synthetic_model(42)
    third = run(world, tmp_path)
    assert changes(third)["models"]["returned"] == [3]
    new |= {k: new[k] | {i: 2} for k, i in (("models", 42), ("versions", 1042))}
    assert generations(third) == new
    assert said_generations(third) == [0, 1, 2]

    # A site that replays the snapshot shows nothing of it, and its crawl begins at 0.
    with serve(Replay.load(rows(third, "models"), rows(third, "images"), None), Faults()) as url:
        again = crawl.run(FEED, {}, RuntimeConfig(store=str(tmp_path / "x")), site_url=url)
    assert again.content_digest == third.content_digest
    assert {g for kind in generations(again).values() for g in kind.values()} == {0}


def test_a_snapshot_of_before_there_were_generations_is_generation_0(tmp_path):
    world = World(models=20, images=20)
    first = run(world, tmp_path)
    first.file("generations.jsonl").unlink()
    manifest = orjson.loads(first.file("manifest.json").read_bytes())
    for part in first.glob("[mi]*/*.jsonl.gz"):
        text = gzip.decompress(part.read_bytes()).replace(b'"_generation":0,', b"")
        part.write_bytes(gzip.compress(text))
    manifest["files"] = []
    first.file("manifest.json").write_bytes(orjson.dumps(manifest))
    world.models[21] = synthetic_model(21)
    second = run(world, tmp_path)
    assert said_generations(second) == [0, 1]
    assert changes(second) == {"models": {"added": [21]}, "versions": {"added": [1021]}}
    assert second.manifest.metrics["schema_drift"] == {}


def answering(
    monkeypatch: pytest.MonkeyPatch, name: str, answer: Callable[[int], dict[str, Any]]
) -> None:
    monkeypatch.setattr(CivitaiClient, name, lambda self, ident: answer(ident))


def fail(ident: int) -> dict[str, Any]:
    raise ServerError("524")


def refuse(ident: int) -> dict[str, Any]:
    raise Forbidden("401")


@pytest.mark.parametrize(
    "answer",
    [
        fail,
        refuse,
        lambda ident: {},
        lambda ident: {"id": ident},
        lambda ident: {"error": "x", "id": 1},
    ],
    ids=["524", "401", "empty", "hollow", "another"],
)
def test_a_broken_answer_is_no_reason_to_touch_a_good_record(tmp_path, monkeypatch, answer):
    world = World()
    first = run(world, tmp_path)
    del world.models[3], world.models[230]
    answering(monkeypatch, "get_model", answer)
    second = run(world, tmp_path)
    assert second == first, "neither tombstone nor change"


def test_a_site_that_has_lost_too_much_to_answer_stops_the_refresh(tmp_path, monkeypatch):
    world = World()
    run(world, tmp_path)
    for number in range(1, 8):
        del world.models[number]
    answering(monkeypatch, "get_model", fail)
    with pytest.raises(ServerError):
        run(world, tmp_path)


def test_lost_metadata_and_lost_versions_replace_nothing(tmp_path):
    """2026-06: metadata became null for everyone who did not ask; versions can be []."""
    world = World()
    first = run(world, tmp_path)
    for image in world.images.values():
        image["meta"] = None
    assert run(world, tmp_path) == first
    assert run(world, tmp_path, reconcile=True) == first


def test_items_that_a_batch_leaves_out_are_asked_for_singly(tmp_path, asked):
    world = World()
    first = run(world, tmp_path)
    asked.clear()
    assert run(world, tmp_path, profile=Profile({"missing": 0.3})) == first
    single = [request for request in asked if request.startswith("/models/")]
    assert 2 <= len(single) <= 20


def test_an_unchanged_gallery_costs_one_request_and_shares_take_turns(tmp_path, asked):
    world = World(models=40, images=60)
    first = run(world, tmp_path, GALLERIES)
    looked: list[set[str]] = []
    for _ in range(4):
        asked.clear()
        assert run(world, tmp_path, GALLERIES, refresh_share=0.25) == first
        galleries = [r.partition("modelVersionId': ")[2].split(",")[0] for r in asked]
        looked.append({version for version in galleries if version})
        assert len(looked[-1]) == 10
        assert len(asked) == 10 + 1  # and the one page of models
    assert len(set.union(*looked)) == 40, "each gallery had its turn"


def test_galleries_of_what_changed_are_looked_at(tmp_path, asked):
    world = World(models=40, images=60)
    run(world, tmp_path, GALLERIES)
    world.models[7]["description"] = "new"
    world.models[41] = synthetic_model(41)
    picture = synthetic_image(500)
    picture["_context"] = {"modelVersionId": 1041}
    world.images[10_500] = picture
    other = synthetic_image(501)
    other["_context"] = {"modelVersionId": 1002}
    world.images[10_501] = other
    second = run(world, tmp_path, GALLERIES, refresh_share=0.0)
    assert changes(second) == {
        "models": {"added": [41], "changed": [7]},
        "versions": {"added": [1041]},
        "images": {"added": [10_500]},
    }
    third = run(world, tmp_path, GALLERIES, refresh_share=0.0, reconcile=True)
    assert changes(third) == {"images": {"added": [10_501]}}
    recall = third.manifest.metrics["recall"]
    assert recall["models"] == recall["versions"] == 1
    shown = len(rows(third, "images"))
    assert recall["images"] == pytest.approx(1 - 1 / shown)


def test_a_picture_that_its_gallery_lost_gets_a_tombstone(tmp_path):
    world = World(models=40, images=60)
    run(world, tmp_path, GALLERIES)
    known = next(i for i in world.images.values() if i["_context"]["modelVersionId"] == 1013)
    del world.images[known["id"]]
    second = run(world, tmp_path, GALLERIES, refresh_share=1.0)
    assert tombstones(second) == {("images", known["id"])}
    assert known["id"] in {i["id"] for i in rows(second, "images")}


def test_a_gallery_that_times_out_keeps_its_pictures(tmp_path, monkeypatch):
    world = World(models=40, images=60)
    first = run(world, tmp_path, GALLERIES)
    ask = CivitaiClient.get_images

    def get_images(self: CivitaiClient, cursor: str | None = None, **params: object) -> Page:
        if params.get("modelVersionId") in (1013, 1020):
            raise ServerError("524")
        return ask(self, cursor, **params)

    monkeypatch.setattr(CivitaiClient, "get_images", get_images)
    assert run(world, tmp_path, GALLERIES, refresh_share=1.0) == first


def test_pages_are_read_again_for_what_changed(tmp_path, monkeypatch):
    world = World(models=40, images=10)
    config = FEED.model_copy(update={"model_pages": 3})
    first = run(world, tmp_path, config)
    assert [page["id"] for page in rows(first, "pages")] == [1, 2, 3]
    for number in (1, 2, 3):
        world.models[number]["stats"]["downloadCount"] = 0
    assert run(world, tmp_path, config) == first, "others are the most downloaded now"
    world.models[2]["modelVersions"][0]["settings"] = {"strength": 0.5}
    world.models[2]["description"] = "new"
    second = run(world, tmp_path, config)
    strengths = [page["versions"][0]["settings"]["strength"] for page in rows(second, "pages")]
    assert strengths == [0.8, 0.5, 0.8]

    def broken(self: CivitaiClient, ident: int) -> dict[str, Any]:
        raise NotFound("no page")

    world.models[2]["description"] = "newer"
    monkeypatch.setattr(CivitaiClient, "get_model_page", broken)
    third = run(world, tmp_path, config)
    assert rows(third, "pages") == rows(second, "pages"), "a good page stays"


def test_a_refresh_goes_on_where_it_was_stopped(tmp_path, asked):
    world = World()
    run(world, tmp_path)
    world.models[231] = synthetic_model(231)
    world.images[10_900] = synthetic_image(900)
    with pytest.raises(CivitaiError, match="budget_seconds"):
        run(world, tmp_path, budget_seconds=1e-9)
    first = len(list(asked))
    second = run(world, tmp_path)
    assert changes(second)["models"] == {"added": [231]}
    with world.site() as url:
        fresh = crawl.run(FEED, {}, RuntimeConfig(store=str(tmp_path / "x")), site_url=url)
    assert second.content_digest == fresh.content_digest
    assert first > 0


def test_a_refresh_that_was_stopped_is_not_taken_for_a_reconciliation(tmp_path, asked):
    world = World()
    run(world, tmp_path)
    world.models[231] = synthetic_model(231)
    world.images[9_999] = {**synthetic_image(1), "id": 9_999}  # at the listing's end
    with pytest.raises(CivitaiError, match="budget_seconds"):
        run(world, tmp_path, budget_seconds=1e-9)
    asked.clear()
    second = run(world, tmp_path, reconcile=True)
    assert "'cursor'" not in asked[0], "from the start"
    assert changes(second)["images"] == {"added": [9_999]}
    recall = second.manifest.metrics["recall"]
    assert recall["models"] == pytest.approx(230 / 231)
    assert recall["images"] == pytest.approx(618 / 619)


def test_limits_keep_the_newest_after_a_refresh_too(tmp_path):
    world = World()
    config = FEED.model_copy(update={"max_models": 50, "max_images": 80})
    run(world, tmp_path, config)
    for number in range(231, 260):
        world.models[number] = synthetic_model(number)
        world.images[11_000 + number] = {**synthetic_image(number + 1000), "id": 11_000 + number}
    second = run(world, tmp_path, config)
    with world.site() as url:
        fresh = crawl.run(config, {}, RuntimeConfig(store=str(tmp_path / "x")), site_url=url)
    assert second.content_digest == fresh.content_digest
