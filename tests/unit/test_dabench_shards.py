"""The dataset: schema, splits without leaks, mappings, card, and the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.artifacts import Artifact
from diffagent.civitai.client import CivitaiClient
from diffagent.dabench.card import table
from diffagent.dabench.catalogue import Catalogue
from diffagent.dabench.filters import filter_records
from diffagent.dabench.lookup import SiteLookup
from diffagent.dabench.shards import build_dabench, read_split
from diffagent.dabench.splits import SPLITS, find_leaks
from diffagent.dabench.tables import read_rows, table_writer
from diffagent.errors import ArtifactError, NotFound
from schemas.config import DABenchConfig, FilterConfig, RuntimeConfig
from schemas.dabench import DABENCH
from tests.unit.dabench_records import image, model, snapshot, version

CONFIG = DABenchConfig(validation_fraction=0.3, test_fraction=0.3, rows_per_shard=10)


def filtered(directory: Path) -> Artifact:
    """60 pairs: every third prompt is nearly another's, and pairs of neighbours share a post."""
    things = ["red square", "blue star", "green circle"]
    images = [
        image(
            number,
            prompt=f"{things[number % 3]} number {number // 3} of many {things[number % 3]} shapes",
            steps=10 + number % 40,
        )
        | {"postId": number // 2}
        for number in range(60)
    ]
    lora = model(3, type="LORA", name="Ink", modelVersions=[version(300)])
    source = snapshot(directory / "snapshot", [model(1), model(2, nsfw=True), lora], images)
    runtime = RuntimeConfig(store=str(directory / "store"))
    return filter_records.run(FilterConfig(), {"snapshot": [source]}, runtime)


def build(directory: Path, config: DABenchConfig = CONFIG) -> Artifact:
    runtime = RuntimeConfig(store=str(directory / "store"))
    return build_dabench.run(config, {"filtered": [filtered(directory)]}, runtime)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(tmp_path_factory.mktemp("dabench"))


def test_every_record_is_in_one_split_and_none_leaks(made: Artifact) -> None:
    rows = [(split, row) for split in SPLITS for row in read_split(made, split)]
    assert sorted(row["id"] for _, row in rows) == list(range(60))
    for split in SPLITS:
        ids = [row["id"] for row in read_split(made, split)]
        assert ids == sorted(ids)
        assert made.manifest.rows[split] == len(ids)
    prompts, splits = [row["prompt"] for _, row in rows], [split for split, _ in rows]
    assert find_leaks(prompts, splits, CONFIG.near_duplicate_jaccard) == []
    of_group: dict[int, set[str]] = {}
    of_post: dict[int, set[str]] = {}
    for split, row in rows:
        of_group.setdefault(row["group"], set()).add(split)
        of_post.setdefault(row["post_id"], set()).add(split)
    assert all(len(found) == 1 for found in [*of_group.values(), *of_post.values()])


def test_shards_have_the_schema_and_the_size(made: Artifact) -> None:
    for path in made.glob("data/*.parquet"):
        assert pq.read_schema(path).equals(DABENCH)
        assert pq.read_metadata(path).num_rows <= CONFIG.rows_per_shard
        total = int(path.stem.rpartition("-")[2])
        assert len(made.glob(f"data/{path.name.split('-')[0]}-*.parquet")) == total


def test_two_builds_are_the_same_bytes(made: Artifact, tmp_path: Path) -> None:
    other = build(tmp_path)
    assert made.path != other.path
    assert [f.sha256 for f in made.manifest.files] == [f.sha256 for f in other.manifest.files]


def test_leftovers_of_an_interrupted_build_do_no_harm(made: Artifact, tmp_path: Path) -> None:
    source = filtered(tmp_path)
    runtime = RuntimeConfig(store=str(tmp_path / "store"))
    target = build_dabench.directory(CONFIG, {"filtered": [source]}, runtime)
    torn = target.with_name(f".{target.name}.partial") / "data" / made.glob("data/*")[0].name
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"PAR1 half a file")
    resumed = build_dabench.run(CONFIG, {"filtered": [source]}, runtime)
    assert resumed.content_digest == made.content_digest


def test_mappings_lead_from_names_to_files_and_schedulers(made: Artifact) -> None:
    models = orjson.loads(made.file("mapping/models.json").read_bytes())
    assert models["Synthetic 1"]["model_id"] == 1
    assert models["Synthetic 1"]["versions"]["v100"]["air"].endswith(":1@100")
    assert models["Ink"]["type"] == "LORA"
    samplers = orjson.loads(made.file("mapping/samplers.json").read_bytes())
    assert samplers["Euler a"]["scheduler"] == "EulerAncestralDiscreteScheduler"
    catalogue = Catalogue.load(made.path)
    assert catalogue.samplers == set(samplers)
    for row in read_split(made, "train"):
        assert catalogue.checkpoint(row["model"], row["version"]) is not None


def test_card_has_counts_funnels_distributions_and_licences(made: Artifact) -> None:
    card = made.file("README.md").read_text()
    assert "| all | 60 | 100.0 % |" in card
    assert "3 seen, 2 kept" in card
    assert "| nsfw | nsfw | 1 | 33.3 % |" in card
    assert "| Image, Rent | 2 |" in card
    assert "CreativeML Open RAIL-M" in card
    for name in ("model_type", "base_model", "nsfw", "file_availability"):
        assert f"(plots/{name}.png)" in card
        assert made.file(f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_no_pairs_is_an_error(tmp_path: Path) -> None:
    source = snapshot(tmp_path / "snapshot", [model(1)], [])
    runtime = RuntimeConfig(store=str(tmp_path / "store"))
    empty = filter_records.run(FilterConfig(), {"snapshot": [source]}, runtime)
    with pytest.raises(ArtifactError, match="no pairs"):
        build_dabench.run(CONFIG, {"filtered": [empty]}, runtime)


def test_cells_cannot_break_a_table() -> None:
    assert table(("name", "n"), [("a|b", 1200)]).splitlines()[1:] == [
        "| --- | ---: |",
        "| a\\|b | 1,200 |",
    ]


SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.string()), ("tags", pa.list_(pa.string()))])
ROW = st.fixed_dictionaries(
    {
        "id": st.integers(-(2**63), 2**63 - 1) | st.none(),
        "text": st.text(st.characters(exclude_categories=["Cs"])) | st.none(),
        "tags": st.lists(st.sampled_from(["", "a", "b"])),
    }
)


@settings(max_examples=50, deadline=None)
@given(st.lists(ROW, max_size=20))
def test_parquet_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("table") / "rows.parquet"
    with table_writer(path, SCHEMA) as writer:
        for row in rows:
            writer.append(row)
    assert list(read_rows(path)) == rows


class _Site(CivitaiClient):
    """Answers by-hash from a table, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get_by_hash(self, digest: str) -> dict[str, object]:
        self.asked.append(digest)
        if digest == "AA":
            return {"id": 5}
        raise NotFound("404")


def test_lookups_are_asked_once_within_the_limit_and_survive_a_kill(tmp_path: Path) -> None:
    path, site = tmp_path / "by-hash.jsonl", _Site()
    lookup = SiteLookup(path, site, 2)
    assert [lookup(digest) for digest in ("AA", "BB", "AA", "CC")] == [5, None, 5, None]
    assert site.asked == ["AA", "BB"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # killed while writing
    assert [SiteLookup(path, site, 2)(digest) for digest in ("AA", "BB")] == [5, None]
    assert site.asked == ["AA", "BB", "BB"]
    assert path.read_bytes() == whole
