"""What changed between two datasets is counted exactly, and a test row in train is a leak."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.splits import SPLITS
from diffagent.dabench.dataset import open_dataset
from diffagent.dabench.tools import compare as compare_module
from diffagent.dabench.tools.compare import compare, comparison_text
from diffagent.errors import ArtifactError, SchemaError
from diffagent.store import MANIFEST, Artifact
from tests.dabench.dabench_records import hashes, model, version
from tests.dabench.dabench_sets import (
    CONFIG,
    copy_dabench,
    edit_json,
    edit_row,
    first_row,
    make_dabench,
    shards,
    sign,
)

Row = dict[str, Any]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dabench(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Other splits; records 1-3 gone, 49-52 new, steps and likes of some changed; a version gone,
    one new, one with another file, and one model fewer dropped."""

    def change(item: dict[str, Any]) -> None:
        if item["id"] <= 3:
            item["meta"] = None
        elif item["id"] % 4 == 0:
            item["meta"]["steps"] = 33
        elif item["id"] % 7 == 0:
            item["stats"]["likeCount"] = 90

    replaced = version(401)
    replaced["files"][0]["hashes"] = hashes(777)
    models = [
        model(1),
        model(3, type="LORA", name="Ink", modelVersions=[version(300)]),
        model(4, name="Sea", modelVersions=[version(400), replaced, version(402)]),
    ]
    config = DABenchConfig(**{**CONFIG.model_dump(), "seed": 1})
    directory = tmp_path_factory.mktemp("new")
    return make_dabench(directory, records=52, config=config, models=models, change=change)


def rows_of(made: Artifact) -> dict[int, tuple[str, Row]]:
    return {
        row["id"]: (split, row)
        for split in SPLITS
        for path in made.glob(f"data/{split}-*.parquet")
        for row in pq.read_table(path).to_pylist()
    }


@pytest.mark.parametrize("size", [3, 1000])
def test_rows_are_compared_as_a_plain_loop_does(
    old: Artifact, new: Artifact, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "_RANGE", size)
    found = compare(open_dataset(old.path), open_dataset(new.path), examples=3)
    a, b = rows_of(old), rows_of(new)
    both = sorted(a.keys() & b.keys())
    columns: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    changed = []
    for ident in both:
        differ = [name for name in a[ident][1] if a[ident][1][name] != b[ident][1][name]]
        columns.update(differ)
        changed += [ident] if differ else []
        if a[ident][0] != b[ident][0]:
            moved[f"{a[ident][0]} -> {b[ident][0]}"] += 1
    rows = found["rows"]
    assert rows["added"] == 4 and rows["examples"]["added"] == [49, 50, 51]
    assert rows["removed"] == 3 and rows["examples"]["removed"] == [1, 2, 3]
    assert rows["in_both"] == len(both) == 45
    assert rows["changed"] == len(changed) > 12
    assert [example["id"] for example in rows["examples"]["changed"]] == changed[:3]
    counted = {n: c for n, c in rows["changed_columns"].items() if not n.startswith("api.")}
    assert counted == dict(columns)
    assert rows["changed_columns"]["api.params.steps"] == 12
    assert found["splits"]["moved"] == dict(moved)
    assert found["leaks"] == moved["test -> train"] + moved["validation -> train"] > 0
    assert found["seen"] == moved["train -> test"] + moved["train -> validation"] > 0
    assert f"LEAK: {found['leaks']} rows" in comparison_text(found)


def test_catalogue_funnel_and_config(old: Artifact, new: Artifact) -> None:
    found = compare(open_dataset(old.path), open_dataset(new.path))
    catalogue = found["catalogue"]
    assert (catalogue["added"], catalogue["removed"], catalogue["hash_changed"]) == (1, 1, 1)
    assert catalogue["changed_columns"] == {"sha256": 1}
    assert catalogue["examples"]["removed"] == ["XL / v500 (version 500)"]
    assert catalogue["examples"]["hash changed"] == ["Sea / v401 (version 401)"]
    assert found["config"]["changed"] == {"seed": [20, 1]}
    assert found["funnels"]["models"]["nsfw: nsfw"] == [1, 0]
    assert found["funnels"]["records"] == {
        "(kept)": [48, 49],
        "(seen)": [48, 52],
        "checkpoint_resolved: no metadata": [0, 3],
    }
    text = comparison_text(found)
    for line in (
        "hash changed, for example",
        "changed: seed: 20 -> 1",
        "checkpoint_resolved: no metadata",
    ):
        assert line in text


def test_a_dataset_is_the_same_as_itself(old: Artifact) -> None:
    dataset = open_dataset(old.path)
    found = compare(dataset, dataset)
    assert found["same"] and found["rows"]["in_both"] == 48
    assert "nothing differs" in comparison_text(found)


def move(directory: Path, source: str, target: str) -> int:
    """Move the first row of a split to the beginning of another."""
    row = first_row(directory, source)
    path = shards(directory, source)[0]
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    path = shards(directory, target)[0]
    table = pq.read_table(path)
    pq.write_table(type(table).from_pylist([row, *table.to_pylist()], schema=table.schema), path)
    sign(directory)
    return int(row["id"])


@pytest.mark.parametrize(
    ("way", "leaks", "seen"),
    [
        (("test", "train"), 1, 0),
        (("validation", "train"), 1, 0),
        (("train", "test"), 0, 1),
        (("test", "validation"), 0, 0),
    ],
)
def test_which_moves_leak(
    old: Artifact, tmp_path: Path, way: tuple[str, str], leaks: int, seen: int
) -> None:
    source, target = way
    directory = copy_dabench(old, tmp_path)
    ident = move(directory, source, target)
    found = compare(open_dataset(old.path), open_dataset(directory))
    assert found["splits"]["moved"] == {f"{source} -> {target}": 1}
    assert found["rows"]["examples"] == {f"{source} -> {target}": [ident]}
    assert (found["leaks"], found["seen"]) == (leaks, seen)
    text = comparison_text(found)
    assert ("LEAK" in text, "note: 1 rows of the train split" in text) == (bool(leaks), bool(seen))


def test_lists_nulls_and_samplers_are_compared(old: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(old, tmp_path)
    edit_row(directory / "catalogue.parquet", 0, lambda r: r.update(tags=["a"], creator=None))
    edit_json(directory / "mapping/samplers.json", lambda m: m.pop("DDIM"))
    found = compare(open_dataset(old.path), open_dataset(directory))
    assert found["catalogue"]["changed_columns"] == {"tags": 1, "creator": 1}
    assert found["samplers"] == {"added": [], "removed": ["DDIM"], "changed": {}}
    assert "['synthetic'] -> ['a']" in comparison_text(found)


def test_schemas_are_compared(old: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(old, tmp_path)
    for split in SPLITS:
        for path in shards(directory, split):
            table = pq.read_table(path)
            pq.write_table(table.append_column("licence", table["url"]).drop_columns("form"), path)
    found = compare(open_dataset(old.path), open_dataset(directory))
    assert found["schema"]["rows"] == {"added": ["licence"], "removed": ["form"], "changed": {}}
    assert found["rows"]["changed"] == 0
    assert "schema of rows\n  added: licence\n  removed: form" in comparison_text(found)


def test_ids_that_are_not_unique_are_an_error(old: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(old, tmp_path)
    ident = first_row(directory, "train")["id"]
    edit_row(shards(directory, "test")[0], 0, lambda row: row.update(id=ident))
    with pytest.raises(SchemaError, match="ids more than once"):
        compare(open_dataset(old.path), open_dataset(directory))


def test_a_dataset_without_manifest_can_be_compared(old: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(old, tmp_path)
    (directory / MANIFEST).unlink()
    found = compare(open_dataset(old.path), open_dataset(directory))
    assert found["rows"]["changed"] == 0 and found["leaks"] == 0


def test_a_torn_file_is_an_error(old: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(old, tmp_path)
    shards(directory, "test")[0].write_bytes(b"PAR1 half a file")
    with pytest.raises(ArtifactError, match="cannot read"):
        compare(open_dataset(old.path), open_dataset(directory))
