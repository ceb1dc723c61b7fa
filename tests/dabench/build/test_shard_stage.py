"""The dataset: schema, splits without leaks, mappings, card, and the same bytes every time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.civitai.client import CivitaiClient
from diffagent.dabench.build.card import table
from diffagent.dabench.build.leaks import chunk, find_leaks
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.shard_stage import KNOWN_APART, build_dabench, read_split
from diffagent.dabench.build.splits import SPLITS
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.dabench.filter.lookup import SiteLookup
from diffagent.dabench.parquet_tables import read_rows, table_writer, write_table
from diffagent.errors import ArtifactError, NotFound
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import DABENCH, PRINTS
from diffagent.store import Artifact
from diffagent.t2i.catalogue import Catalogue
from tests.conftest import reseal
from tests.dabench.dabench_records import image, model, snapshot, version

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
    codes = np.array([SPLITS.index(split) for split, _ in rows], np.int8)
    every = chunk(codes, [row["prompt"] for _, row in rows])
    assert find_leaks(lambda wanted: [every], CONFIG.near_duplicate_jaccard) == []
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
    partial = target.with_name(f".{target.name}.partial")
    (partial / ".scratch").mkdir(parents=True)
    (partial / ".scratch" / "sets.bin").write_bytes(b"half")
    torn = partial / "data" / made.glob("data/*")[0].name
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"PAR1 half a file")
    resumed = build_dabench.run(CONFIG, {"filtered": [source]}, runtime)
    assert resumed.content_digest == made.content_digest


def test_a_damaged_shard_is_named_with_what_to_do(made: Artifact, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.path, tmp_path / "copy"))
    broken = made.model_copy(update={"path": copy})
    path = broken.glob("data/train-*.parquet")[0]
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], whole[:200] + bytes(200) + whole[400:]):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=rf"{path.name}'.*dabench verify.*stage 'shard'"):
            list(read_split(broken, "train"))


def test_what_would_straddle_is_left_out_and_counted(tmp_path: Path) -> None:
    """Two old pictures of different splits, and a new one that is of the post of both."""
    source = filtered(tmp_path)
    prints = pq.read_table(source.file("prints.parquet")).to_pylist()
    runtime = RuntimeConfig(store=str(tmp_path / "other"))
    made = build_dabench.run(CONFIG, {"filtered": [source]}, runtime)
    of = {row["id"]: split for split in SPLITS for row in read_split(made, split)}
    prints[-1]["generation"] = 1
    prints[-2]["post_id"] = 1_000
    split = of[prints[-2]["id"]]
    other = next(row for row in prints[:-2] if of[row["id"]] != split)
    prints[-1]["post_id"], prints[-1]["shingles"] = 1_000, other["shingles"]
    path = source.file("prints.parquet")
    write_table(path, pa.Table.from_pylist(prints, schema=PRINTS))
    reseal(source)
    again = build_dabench.run(CONFIG, {"filtered": [source]}, runtime, refresh=True)
    funnel = again.manifest.funnels[-1]
    assert (funnel.unit, funnel.seen, funnel.kept) == ("pairs", 60, 59)
    assert [(s.reason, s.dropped) for s in funnel.steps] == [(KNOWN_APART, 1)]
    left = {row["id"] for split in SPLITS for row in read_split(again, split)}
    assert left == set(of) - {prints[-1]["id"]}
    assert f"{KNOWN_APART} | 1 |" in again.file("README.md").read_text()


def test_records_that_are_not_those_of_the_prints_are_an_error(tmp_path: Path) -> None:
    source = filtered(tmp_path)
    table_of = pq.read_table(source.file("prints.parquet"))
    kept = pa.array([number != 3 for number in range(len(table_of))])
    write_table(source.file("prints.parquet"), table_of.set_column(5, PRINTS.field("kept"), kept))
    reseal(source)
    with pytest.raises(ArtifactError, match="not those that its prints"):
        build_dabench.run(
            CONFIG, {"filtered": [source]}, RuntimeConfig(store=str(tmp_path / "other"))
        )


def test_batches_and_rows_make_the_same_file(tmp_path: Path) -> None:
    rows = [{"id": n, "text": str(n), "tags": []} for n in range(10_000)]
    with table_writer(tmp_path / "rows.parquet", SCHEMA) as writer:
        for row in rows:
            writer.append(row)
    with table_writer(tmp_path / "batches.parquet", SCHEMA) as writer:
        for begin in range(0, len(rows), 777):
            writer.extend(pa.RecordBatch.from_pylist(rows[begin : begin + 777], schema=SCHEMA))
        assert writer.rows == len(rows)
    assert list(read_rows(tmp_path / "batches.parquet")) == rows
    assert (tmp_path / "rows.parquet").read_bytes() == (tmp_path / "batches.parquet").read_bytes()


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
