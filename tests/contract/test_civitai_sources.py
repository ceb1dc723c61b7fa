"""Prompts come from galleries or showcases, and the data set reads both alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from diffagent.civitai.client import CivitaiClient
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawler import showcase_images
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.dabench.filter.record_filters import Record, media_type
from diffagent.dabench.filter.resolve import Resolver
from diffagent.localcivitai.faults import Faults
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.server import serve
from diffagent.schemas.runtime import RuntimeConfig
from tests.contract.conftest import MODELS
from tests.contract.test_civitai_crawl import ALL, rows, run
from tests.contract.test_civitai_refresh import World, changes
from tests.contract.test_civitai_refresh import run as refresh
from tests.dabench.dabench_records import image, model

SHOWCASE = ALL.model_copy(update={"image_source": "showcase", "max_models": 20})


def with_showcase(ident: int) -> dict[str, Any]:
    """A model whose version shows five pictures: three usable, one of level X, one video."""
    made = model(ident)
    (version,) = made["modelVersions"]
    shown = []
    for number in range(5):
        picture = image(ident * 1000 + number, version["id"])
        for key in ("nsfwLevel", "stats"):
            del picture[key]
        shown.append({**picture, "nsfwLevel": 8 if number == 3 else 1, "hash": "U"})
    shown[4]["type"] = "video"
    del shown[1]["id"]  # as in records of early 2023: only the file's name has it
    return {**made, "modelVersions": [{**version, "images": shown}]}


def in_gallery(ident: int, number: int) -> dict[str, Any]:
    made = image(ident * 1000 + number, ident * 100)
    return {**made, "_context": {"modelVersionId": ident * 100}, "username": "nobody"}


@pytest.mark.parametrize("source", ["showcase", "versions"])
def test_the_data_set_reads_pictures_of_both(tmp_path: Path, source: str) -> None:
    models = [with_showcase(ident) for ident in (1, 2)]
    images = [in_gallery(ident, number) for ident in (1, 2) for number in range(3)]
    config = CrawlConfig(site="x", image_source=source)
    with serve(Replay.load(models, images, None), Faults()) as url:
        snapshot = run(url, tmp_path, config)
    assert snapshot.manifest.metrics["schema_drift"] == {}
    for item in rows(snapshot, "images"):
        assert item["modelVersionIds"] == [item["id"] // 1000 * 100]
        assert item["username"] == "nobody"
        record = Record(item, Resolver())
        assert record.level[0] == 1 and media_type(record, FilterConfig()) is None
    made = filter_records.run(
        FilterConfig(), {"snapshot": [snapshot]}, RuntimeConfig(store=str(tmp_path))
    )
    records = pq.read_table(made.file("records-00000.parquet")).to_pylist()
    assert [r["id"] for r in records] == [1000, 1001, 1002, 2000, 2001, 2002]
    assert {(r["model_id"], r["version_id"]) for r in records} == {(1, 100), (2, 200)}
    assert {r["creator"] for r in records} == {"nobody"}


def test_ten_pictures_of_each_version(site: str, tmp_path: Path) -> None:
    snapshot = run(site, tmp_path, SHOWCASE)
    found = rows(snapshot, "images")
    assert len(found) == 20 * 10
    assert all(i["meta"] == {"prompt": "synthetic"} for i in found)
    assert {tuple(i["modelVersionIds"]) for i in found} == {
        (1000 + n,) for n in range(MODELS - 19, MODELS + 1)
    }
    assert {i["baseModel"] for i in found} == {"SD 1.5", "SDXL 1.0"}


def test_a_showcase_leaves_out_what_images_would_not_list() -> None:
    pictures: list[Any] = [
        {"id": 1, "nsfwLevel": 1},
        {"id": 2, "nsfwLevel": 4},
        {"id": 3, "minor": True},
        {"id": 4, "poi": True},
        {"id": 5, "type": "video"},
        {"url": "https://image.civitai.com/x/original=true/6.jpeg", "nsfw": "None"},
        {"url": "https://image.civitai.com/x/without-id.jpeg"},
        {"id": "7", "meta": {"id": 7, "meta": {"prompt": "nested"}}},
        None,
    ]
    version = {"id": 10, "baseModel": "SD 1.5", "images": pictures}
    found = showcase_images(version, None, adult=False)
    assert [i["id"] for i in found] == [1, 6, 7]
    assert found[2]["meta"] == {"prompt": "nested"}
    assert "username" not in found[0]
    assert [i["id"] for i in showcase_images(version, "a", adult=True)] == [1, 2, 6, 7]
    assert showcase_images({"id": 1, "images": None}, None, adult=True) == []


def test_galleries_are_asked_for_metadata_pictures_and_levels(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    send = CivitaiClient._send

    def remember(self: CivitaiClient, url: str, **options: Any) -> Any:
        if url.endswith("/images"):
            asked.append(dict(options["params"]))
        return send(self, url, **options)

    monkeypatch.setattr(CivitaiClient, "_send", remember)
    run(site, tmp_path, CrawlConfig(site="x", image_source="versions", max_models=2))
    assert {params["modelVersionId"] for params in asked} == {1229, 1230}
    for params in asked:
        assert params["withMeta"] == "true" and params["type"] == "image"
        assert params["browsingLevel"] == 1 and params["period"] == "AllTime"


def test_a_refresh_looks_at_showcases_of_what_changed(tmp_path: Path) -> None:
    world = World(models=30, images=0)
    config = ALL.model_copy(update={"image_source": "showcase"})
    first = refresh(world, tmp_path, config)
    assert refresh(world, tmp_path, config, refresh_share=1.0) == first
    shown = world.models[7]["modelVersions"][0]["images"]
    shown.insert(0, {**shown[0], "id": 990_000})
    second = refresh(world, tmp_path, config, refresh_share=0.0)
    assert changes(second) == {
        "versions": {"changed": [1007]},
        "images": {"added": [990_000]},
    }
    assert len(rows(second, "images")) == 301, "the tenth is not shown any more, but known"
