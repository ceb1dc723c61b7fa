"""The summary's numbers are those of a plain count over the rows."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffagent.dabench.build.shard_stage import read_split
from diffagent.dabench.build.splits import SPLITS
from diffagent.dabench.dataset import open_dataset
from diffagent.dabench.tools.compare import compare, comparison_text
from diffagent.dabench.tools.dataset_checks import verdict_text, verify_dabench
from diffagent.dabench.tools.dataset_summary import PERCENTILES, Lengths, summarise, summary_text
from diffagent.dabench.tools.layout import aligned, one_line
from diffagent.errors import ArtifactError, SchemaError
from diffagent.store import MANIFEST, Artifact
from diffagent.t2i.catalogue import renderable_samplers
from tests.dabench.dabench_sets import copy_dabench, edit_json, edit_row, make_dabench, shards


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dabench(tmp_path_factory.mktemp("dabench"))


@pytest.fixture(scope="module")
def summary(made: Artifact) -> dict[str, Any]:
    return summarise(open_dataset(made.path), rows=4, seed=1)


def test_counts_are_those_of_the_rows(made: Artifact, summary: dict[str, Any]) -> None:
    rows = {split: list(read_split(made, split)) for split in SPLITS}
    every = [row for found in rows.values() for row in found]
    apis = [orjson.loads(row["api"]) for row in every]
    assert summary["rows"] == {**{s: len(found) for s, found in rows.items()}, "all": 48}
    assert summary["used"] == {
        "models": 2,
        "model_versions": 2,
        "loras": 1,
        "embeddings": 0,
        "pairs_with_loras": 9,
        "pairs_with_embeddings": 0,
        "base_models": 1,
        "samplers": 2,
    }
    counts = summary["counts"]
    assert counts["models"] == dict(Counter(row["model"] for row in every).most_common())
    assert counts["loras"] == {"Ink / v300": 9}
    assert counts["samplers"] == dict(Counter(a["params"]["sampler"] for a in apis).most_common())
    assert summary["params"]["steps"] == {"20": 48}
    assert "seed" not in summary["params"]
    assert summary["columns"]["form"] == dict(Counter(row["form"] for row in every).most_common())
    assert not {"id", "prompt", "url", "group", "model_id"} & set(summary["columns"])
    kinds = {"checkpoints": 3, "loras": 2, "embeddings": 0}
    assert summary["catalogue"] == {**kinds, "samplers": len(renderable_samplers())}
    lengths = [len(row["prompt"]) for row in every]
    assert summary["prompt_characters"]["p0"] == min(lengths)
    assert summary["prompt_characters"]["p100"] == max(lengths)
    assert summary["prompt_words"]["p50"] == 9


def test_where_it_comes_from(made: Artifact, summary: dict[str, Any]) -> None:
    assert summary["identity"] == made.identity
    assert summary["content_digest"] == made.content_digest
    assert [line.split()[0] for line in summary["lineage"]] == ["shard", "filtered:", "snapshot:"]
    assert set(summary["dates"]) == {"shard built", "filter built"}
    units = [funnel["unit"] for funnel in summary["funnels"]]
    assert units == ["models", "versions", "records", "pairs"]
    assert summary["distributions"]["nsfw"]["counts"] == {"none of these": 4, "nsfw": 1}
    assert len(summary["distributions"]) == 4


def test_sample_rows_are_rows_and_depend_on_the_seed_alone(
    made: Artifact, summary: dict[str, Any]
) -> None:
    rows = {row["id"]: {"split": s, **row} for s in SPLITS for row in read_split(made, s)}
    sample = summary["sample"]
    assert len(sample) == len({row["id"] for row in sample}) == 4
    assert all(row == rows[row["id"]] for row in sample)
    dataset = open_dataset(made.path)
    assert summarise(dataset, rows=4, seed=1)["sample"] == sample
    assert summarise(dataset, rows=4, seed=2)["sample"] != sample
    every = summarise(dataset, rows=100)["sample"]
    assert {row["id"]: row for row in every} == rows


def test_the_text_says_it_all(summary: dict[str, Any]) -> None:
    text = summary_text(summary)
    for part in (
        summary["identity"],
        "  all         48  100.0 %",
        "funnel of models: 4 of 5 kept (80.0 %)",
        "        1  20.0 %   nsfw    nsfw",
        "source: file availability of versions",
        "  9  18.8 %  Ink / v300",
        "  steps      20 100.0 %",
        "  words        9",
        f"row {summary['sample'][0]['id']} (",
    ):
        assert part in text


def test_a_copy_shows_the_funnel_and_the_source_too(
    summary: dict[str, Any], made: Artifact, tmp_path: Path
) -> None:
    found = summarise(open_dataset(copy_dabench(made, tmp_path)))
    for name in ("funnels", "distributions", "random_split"):
        assert found[name] == summary[name] != {}


def test_both_kinds_of_splits_are_reported(made: Artifact, summary: dict[str, Any]) -> None:
    rows = [row for split in SPLITS for row in read_split(made, split)]
    chance = Counter(row["random_split"] for row in rows)
    assert summary["random_split"]["rows"] == {split: chance[split] for split in SPLITS}
    train = {row["post_id"] for row in rows if row["random_split"] == "train"}
    test = [row["post_id"] for row in rows if row["random_split"] == "test"]
    exposed = sum(post in train for post in test)
    assert summary["random_split"]["exposed"] == exposed > 0
    assert f"  {exposed} of its test (" in summary_text(summary)


def test_a_copy_without_manifest_has_no_funnel(made: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(made, tmp_path)
    (directory / MANIFEST).unlink()
    found = summarise(open_dataset(directory))
    assert found["rows"]["all"] == 48 and found["funnels"] == [] and "identity" not in found
    assert "funnel: not known here" in summary_text(found)


def test_columns_that_this_version_does_not_know_are_counted(
    made: Artifact, tmp_path: Path
) -> None:
    directory = copy_dabench(made, tmp_path)
    for path in [path for split in SPLITS for path in shards(directory, split)]:
        table = pq.read_table(path)
        times = pa.array(range(len(table)), pa.int64()).cast(pa.timestamp("s"))
        table = table.append_column("crawled_at", times)
        table = table.append_column("licence", pa.array(["RAIL"] * len(table)))
        table = table.append_column("uses", pa.array([["Image", "Rent"]] * len(table)))
        pq.write_table(table, path)
    found = summarise(open_dataset(directory), rows=1)
    assert found["columns"]["licence"] == {"RAIL": 48}
    assert found["columns"]["uses"] == {"['Image', 'Rent']": 48}
    assert found["dates"]["crawled_at"] == ["1970-01-01 00:00:00", "1970-01-01 00:00:08"]
    assert "1970-01-01 00:00:08" in summary_text(found)


def test_a_broken_api_is_an_error_that_names_its_place(made: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(made, tmp_path)
    edit_row(shards(directory, "test")[0], 3, lambda row: row.update(api="[]"))
    with pytest.raises(SchemaError, match=r"test-00000-of-\d+.parquet' row 3: 'api' is no API"):
        summarise(open_dataset(directory))


def test_a_catalogue_that_cannot_be_read_is_named(made: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(made, tmp_path)
    (directory / "catalogue.parquet").write_bytes(b"PAR1")
    found = summarise(open_dataset(directory), rows=0)
    assert "cannot read the catalogue" in found["catalogue"]["unreadable"]
    assert "unreadable in the catalogue  cannot read" in summary_text(found)


def test_a_directory_of_something_else_is_an_error(made: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no DABench"):
        open_dataset(tmp_path)
    shutil.copytree(made.path / "data", tmp_path / "data")
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match="not a manifest"):
        open_dataset(tmp_path)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(st.integers(0, 300), max_size=20), min_size=1, max_size=5))
def test_percentiles(batches: list[list[int]]) -> None:
    lengths = Lengths()
    for batch in batches:
        lengths.add(pa.array(batch, pa.int32()))
    values = [value for batch in batches for value in batch]
    expected = {}
    if values:
        found = np.percentile(values, PERCENTILES, method="inverted_cdf")
        expected = {f"p{p}": int(value) for p, value in zip(PERCENTILES, found, strict=True)}
    assert lengths.percentiles() == expected


def test_foreign_text_cannot_write_to_the_terminal() -> None:
    assert one_line("a\x1b[2Jb\n c") == "a\\x1b[2Jb c"
    assert one_line("abcdef", 4) == "abc…"


def test_no_line_of_a_report_can_write_to_the_terminal(made: Artifact, tmp_path: Path) -> None:
    """Names of columns, reasons and files of a dataset that somebody else made."""
    directory = copy_dabench(made, tmp_path)
    data = json.loads((directory / MANIFEST).read_text())
    data["funnels"][0]["unit"] = "models\x1b[2J"
    data["funnels"][0]["steps"][0]["reason"] = "gone\x1b]0;x\x07"
    (directory / MANIFEST).write_text(json.dumps(data))
    (directory / "x\x1b[2J.txt").write_text("")
    edit_json(directory / "mapping/samplers.json", lambda m: m.update({"e\x1b[31m": {}}))
    one, other = open_dataset(made.path), open_dataset(directory)
    texts = (
        summary_text(summarise(other)),
        comparison_text(compare(one, other)),
        verdict_text(verify_dabench(directory)),
    )
    for text in texts:
        assert "\\x1b" in text and "\x1b" not in text and "\x07" not in text


def test_tables_line_up() -> None:
    assert aligned([("森", 1200), ("tree", 7)], ("name", "n"), indent=0) == [
        "name      n",
        "森    1,200",
        "tree      7",
    ]
    assert aligned([]) == []
