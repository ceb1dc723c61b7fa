"""Dumps in parquet, snapshots and instruction-API releases are sites like any other."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.dabench.dataset import open_dataset
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.dabench.tools.export import export_dabench
from diffagent.errors import ConfigError, SchemaError
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.sources import dump, open_source
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact
from tests.contract.conftest import synthetic_image, synthetic_model
from tests.contract.test_civitai_crawl import ALL, rows
from tests.contract.test_civitai_refresh import World
from tests.contract.test_civitai_refresh import run as refresh
from tests.dabench.dabench_sets import make_dabench

MODELS = [synthetic_model(n) for n in range(1, 41)]
IMAGES = [synthetic_image(n) for n in range(8, 60)]


def site_of(source: str, store: Path, config: CrawlConfig = ALL) -> Artifact:
    return crawl.run(config, {}, RuntimeConfig(store=str(store)), site_url=source)


def test_a_note_of_a_dump_enters_the_request_and_the_manifest(tmp_path: Path) -> None:
    dump.write_dump(tmp_path, MODELS, IMAGES)
    config = ALL.model_copy(update={"site": f"dump:{tmp_path}"})
    plain = crawl.identity(config, {})
    note = {"source": "built from drawings", "limits": ["none"]}
    (tmp_path / "about.json").write_text(json.dumps({**note, "version": 1}))
    first = crawl.identity(config, {})
    snapshot = site_of(config.site, tmp_path / "store", config)
    assert snapshot.manifest.metrics["about"] == note
    (tmp_path / "about.json").write_text(json.dumps({**note, "version": 2}))
    assert len({plain, first, crawl.identity(config, {})}) == 3
    (tmp_path / "about.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"about\.json.*is not usable"):
        site_of(config.site, tmp_path / "store", config)


def texts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nested columns as text with JSON, annotations left out."""
    return [
        {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in r.items() if k[0] != "_"}
        for r in records
    ]


def table_of(records: list[dict[str, Any]]) -> pa.Table:
    columns = dict.fromkeys(key for record in records for key in record)
    return pa.table({key: [record.get(key) for record in records] for key in columns})


def without_nothing(value: Any) -> Any:
    """A record without its nulls, which parquet does not tell from missing keys."""
    if isinstance(value, dict):
        return {k: without_nothing(v) for k, v in value.items() if v is not None}
    return [without_nothing(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The snapshot of the records as JSON lines."""
    folder = tmp_path_factory.mktemp("lines")
    for kind, records in (("models", MODELS), ("images", IMAGES)):
        lines = b"".join(
            orjson.dumps({k: v for k, v in r.items() if k[0] != "_"}) + b"\n" for r in records
        )
        (folder / f"{kind}.jsonl").write_bytes(lines)
    return site_of(f"dump:{folder}", folder / "store")


@pytest.mark.parametrize("nested", [False, True], ids=["text columns", "nested columns"])
def test_a_dump_in_parquet_is_the_same_site(plain: Artifact, tmp_path: Path, nested: bool) -> None:
    for kind, records in (("models", MODELS), ("images", IMAGES)):
        found = [{k: v for k, v in r.items() if k[0] != "_"} for r in records]
        for record in found if nested else ():
            record.pop("allowCommercialUse", None)  # three shapes fit in no nested column
            if isinstance(record.get("meta"), dict):
                record["meta"].pop("civitaiResources", None)
        table = table_of(found if nested else texts(records))
        pq.write_table(table, tmp_path / f"{kind}-0.parquet")
    made = site_of(f"dump:{tmp_path}", tmp_path / "store")
    if not nested:
        assert made.content_digest == plain.content_digest
    assert [i["id"] for i in rows(made, "images")] == [i["id"] for i in rows(plain, "images")]
    for old, new in zip(rows(plain, "models"), rows(made, "models"), strict=True):
        assert without_nothing(new["modelVersions"]) == without_nothing(old["modelVersions"])
    assert [i["meta"]["prompt"] for i in rows(made, "images")] == [
        i["meta"]["prompt"] for i in rows(plain, "images")
    ]


def test_nested_values_of_lines_may_be_text_with_json(plain: Artifact, tmp_path: Path) -> None:
    def nested(model: dict[str, Any]) -> dict[str, Any]:
        versions = [{**v, "files": json.dumps(v["files"])} for v in model["modelVersions"]]
        return {**model, "modelVersions": json.dumps(versions), "tags": json.dumps(model["tags"])}

    for kind, records in (("models", map(nested, MODELS)), ("images", iter(texts(IMAGES)))):
        lines = (orjson.dumps({k: v for k, v in r.items() if k[0] != "_"}) for r in records)
        (tmp_path / f"{kind}.jsonl").write_bytes(b"\n".join(lines))
    assert site_of(f"dump:{tmp_path}", tmp_path / "store").content_digest == plain.content_digest


def test_odd_parts_of_a_record_are_kept_as_the_site_would_send_them(tmp_path: Path) -> None:
    parts: list[Any] = [[None], [{"name": "no id"}], None, "text", [{"id": 2, "files": [None]}]]
    models = [{"id": n, "name": "x", "modelVersions": part} for n, part in enumerate(parts, 1)]
    (tmp_path / "models.jsonl").write_bytes(b"\n".join(map(orjson.dumps, models)))
    found = rows(site_of(f"dump:{tmp_path}", tmp_path / "store"), "models")
    assert len(found) == 5
    assert [m["modelVersions"] for m in found][:2] == [
        [None],
        [{"name": "no id", "_generation": 0}],
    ]
    assert found[4]["modelVersions"][0]["files"] == [None]


def test_a_line_without_end_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "_MAX_LINE", 1_000)
    lines = [b'{"id": 1}', b'{"id": 2, "name": "' + b"x" * 5_000 + b'"}', b'{"id": 3}']
    (tmp_path / "models.jsonl").write_bytes(b"\n".join(lines))
    replay = Replay.load(open_source(f"dump:{tmp_path}").models, [])
    assert [row.id for row in replay.models] == [1, 3]
    assert replay.drops == {"models": {"a line of more than 1000 bytes": 1}}


def test_a_table_of_pandas_is_read_too(tmp_path: Path) -> None:
    pd.DataFrame(texts(MODELS)).to_parquet(tmp_path / "models.parquet")
    frame = pd.DataFrame(texts(IMAGES))
    frame["createdAt"] = pd.Timestamp("2026-01-02T03:04:05.678Z")
    frame["width"] = [None, *frame["width"][1:]]  # becomes a float, and NaN
    frame.to_parquet(tmp_path / "images.parquet")
    records = open_source(f"dump:{tmp_path}")
    first, second, *_ = records.images
    assert first["createdAt"] == "2026-01-02T03:04:05.678Z"
    assert "width" not in first and second["width"] == 512
    assert first["meta"]["prompt"].startswith("synthetic picture")
    assert len(list(records.models)) == 40


def test_odd_cells_of_a_table_cost_their_row_or_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {
        "id": ["x", "2", "3", None],
        "tags": ["[]", "[1", '["a"]', None],
        "picture": [b"\x00", b"\x01", None, None],
        "worth": pa.array([None, None, None, None], pa.decimal128(5, 2)),
    }
    pq.write_table(pa.table(columns), tmp_path / "models.parquet")
    replay = Replay.load(open_source(f"dump:{tmp_path}").models, [])
    assert [replay.model(i) for i in range(2)] == [
        {"id": 2, "tags": "[1", "modelVersions": []},
        {"id": 3, "tags": ["a"], "modelVersions": []},
    ]
    reasons = {"its id is no whole number below 2^63": 1, "no id": 1}
    assert replay.drops == {"models": reasons}
    assert "models.parquet: row 1 is left out" in caplog.text


def test_damaged_dumps_say_where_and_what_to_do(tmp_path: Path) -> None:
    lines = b"".join(orjson.dumps(m) + b"\n" for m in MODELS)
    (tmp_path / "models.jsonl.gz").write_bytes(gzip.compress(lines)[:-30])
    with pytest.raises(ConfigError, match=r"damaged behind line \d+.*restore it"):
        list(open_source(f"dump:{tmp_path}").models)
    (tmp_path / "models.jsonl.gz").unlink()
    (tmp_path / "models.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="no whole parquet file"):
        list(open_source(f"dump:{tmp_path}").models)


def test_a_snapshot_is_a_site_without_what_was_gone(tmp_path: Path) -> None:
    world = World(models=30, images=40)
    refresh(world, tmp_path / "a")
    del world.models[3], world.images[10_010]
    world.models[31] = synthetic_model(31)
    second = refresh(world, tmp_path / "a", reconcile=True)
    with world.site() as url:
        there = crawl.run(ALL, {}, RuntimeConfig(store=str(tmp_path / "b")), site_url=url)
    again = site_of(f"dump:{second.path}", tmp_path / "c")
    assert again.content_digest == there.content_digest
    assert {m["_generation"] for m in rows(again, "models")} == {0}


# --- the release ---


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    """A dataset, and the same as instruction-API pairs."""
    made = make_dabench(tmp_path_factory.mktemp("made"))
    out = tmp_path_factory.mktemp("release") / "pairs"
    export_dabench(open_dataset(made.path), out, "instruction-api")
    return made, out


def pairs_of(snapshot: Artifact, store: Path) -> set[tuple[int, str, str]]:
    config = FilterConfig(require_scans=False)
    made = filter_records.run(config, {"snapshot": [snapshot]}, RuntimeConfig(store=str(store)))
    records = pq.read_table(made.file("records-00000.parquet")).to_pylist()
    return {(r["id"], r["prompt"], plain_api(r["api"])) for r in records}


def plain_api(text: str) -> str:
    """An API without what the release's dictionary does not have."""
    api = json.loads(text)
    return json.dumps({k: v for k, v in api.items() if k not in ("description", "air")})


def test_a_release_gives_its_pairs_back(release: tuple[Artifact, Path], tmp_path: Path) -> None:
    made, folder = release
    snapshot = site_of(f"release:{folder}", tmp_path)
    assert snapshot.manifest.metrics["schema_drift"] == {}
    rows = [r for p in made.glob("data/*.parquet") for r in pq.read_table(p).to_pylist()]
    expected = {(r["id"], r["prompt"], plain_api(r["api"])) for r in rows}
    assert pairs_of(snapshot, tmp_path) == expected


def test_other_names_are_said_in_a_file(release: tuple[Artifact, Path], tmp_path: Path) -> None:
    folder = tmp_path / "release"
    (folder / "maps").mkdir(parents=True)
    text = (release[1] / "train.json").read_text().replace('"instruction":', '"Input":')
    (folder / "all.json").write_text(text)
    mapping = (release[1] / "mapping/models.json").read_bytes()
    (folder / "maps/models.json").write_bytes(mapping)
    with pytest.raises(ConfigError, match=r"cannot read.*mapping/models.json.*names.json"):
        open_source(f"release:{folder}")
    (folder / "names.json").write_text('{"mapping": "maps/models.json", "instruction": "Input"}')
    assert len(list(open_source(f"release:{folder}").images)) == len(json.loads(text))
    (folder / "names.json").write_text('{"Prompt": "Input"}')
    with pytest.raises(ConfigError, match="unknown field 'Prompt'"):
        open_source(f"release:{folder}")


SURPRISES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "unknown key": (lambda p: p.update(extra=1), r"record 2: unknown key 'extra'; known are"),
    "no API": (lambda p: p.pop("API"), r"record 2: no key 'API'"),
    "text": (lambda p: p.update(instruction=5), r"'instruction' is int '5', expected str"),
    "steps": (
        lambda p: p["API"]["Params"].update(steps="20"),
        r"record 2, Params: 'steps' is a text",
    ),
    "flag": (lambda p: p["API"]["Params"].update(steps=True), r"'steps' is bool"),
    "Params": (lambda p: p["API"].update(Params=[]), r"'Params' is an array"),
    "model": (lambda p: p["API"].update(Model="Nobody"), r"no version .* of model 'Nobody'"),
    "base": (lambda p: p["API"].update({"Base Model": "SDXL 1.0"}), r"base model 'SDXL 1.0', but"),
    "LoRA": (lambda p: p["API"].update(LoRAs=[{"model": "x"}]), r"LoRA 1: no key 'version'"),
}


@pytest.mark.parametrize(("change", "says"), SURPRISES.values(), ids=list(SURPRISES))
def test_a_surprise_stops_with_file_record_and_remedy(
    release: tuple[Artifact, Path], tmp_path: Path, change: Callable[[Any], Any], says: str
) -> None:
    (tmp_path / "mapping").mkdir()
    (tmp_path / "mapping/models.json").write_bytes(
        (release[1] / "mapping/models.json").read_bytes()
    )
    pairs = json.loads((release[1] / "train.json").read_bytes())
    change(pairs[1])
    (tmp_path / "train.json").write_text(json.dumps(pairs))
    with pytest.raises(SchemaError, match=says) as caught:
        list(open_source(f"release:{tmp_path}").images)
    assert str(tmp_path / "train.json") in str(caught.value) and "names.json" in str(caught.value)


def test_a_dictionary_that_surprises_stops_too(
    release: tuple[Artifact, Path], tmp_path: Path
) -> None:
    (tmp_path / "mapping").mkdir()
    mapping = json.loads((release[1] / "mapping/models.json").read_bytes())
    name = sorted(mapping)[0]
    mapping[name]["versions"]["v1"] = {"version_id": "7"}
    (tmp_path / "mapping/models.json").write_text(json.dumps(mapping))
    with pytest.raises(
        SchemaError, match=rf"model '{name}', version 'v1': no key 'base_model'|is a text"
    ):
        open_source(f"release:{tmp_path}")
