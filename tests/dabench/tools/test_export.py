"""Exports: what ``datasets`` loads, what the pairs hold, and that OUT is whole or untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.shard_stage import read_split
from diffagent.dabench.build.splits import SPLITS
from diffagent.dabench.dataset import open_dataset
from diffagent.dabench.pairs import API_KEYS, PAIR_KEYS, from_pair, read_pairs, to_pair
from diffagent.dabench.tools import export as export_module
from diffagent.dabench.tools.dataset_checks import verdict_text, verify_dabench
from diffagent.dabench.tools.dataset_summary import summarise
from diffagent.dabench.tools.export import Layout, _features, export_dabench
from diffagent.errors import ArtifactError, ConfigError, SchemaError
from diffagent.schemas.api import T2IAPI
from diffagent.schemas.manifest import Manifest
from diffagent.schemas.tables import CATALOGUE, DABENCH
from diffagent.store import Artifact, open_artifact
from diffagent.t2i.catalogue import Catalogue
from tests.dabench.dabench_sets import copy_dabench, edit_row, make_dabench, shards

LAYOUTS: tuple[Layout, ...] = ("hf", "instruction-api")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dabench(tmp_path_factory.mktemp("dabench"))


@pytest.fixture(scope="module")
def exports(made: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("exports")
    for layout in LAYOUTS:
        export_dabench(open_dataset(made.path), directory / layout, layout)
    return {layout: directory / layout for layout in LAYOUTS}


def test_datasets_loads_it_offline(
    made: Artifact, exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    loaded = datasets.load_dataset(str(exports["hf"]), cache_dir=str(tmp_path))
    assert set(loaded) == set(SPLITS)
    for split in SPLITS:
        assert loaded[split].to_list() == list(read_split(made, split))
        assert loaded[split].features == datasets.Features.from_arrow_schema(DABENCH)
    entries = datasets.load_dataset(
        str(exports["hf"]), "catalogue", split="train", cache_dir=str(tmp_path)
    )
    assert entries.to_list() == pq.read_table(made.file("catalogue.parquet")).to_pylist()
    assert entries.features == datasets.Features.from_arrow_schema(CATALOGUE)


def test_an_empty_split_does_not_hinder_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    few = DABenchConfig(validation_fraction=0.01, test_fraction=0.01)
    made = make_dabench(tmp_path / "made", records=3, config=few)
    assert made.manifest.rows["test"] == made.manifest.rows["validation"] == 0
    export_dabench(open_dataset(made.path), tmp_path / "hf", "hf")
    assert "leaves out ['test', 'validation']" in caplog.text
    assert verify_dabench(tmp_path / "hf").sound
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    loaded = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3}
    export_dabench(open_dataset(made.path), tmp_path / "pairs", "instruction-api")
    assert json.loads((tmp_path / "pairs" / "test.json").read_text()) == []
    assert verify_dabench(tmp_path / "pairs").sound


def test_columns_of_any_type_are_named_as_datasets_does() -> None:
    import datasets

    schema = pa.schema(
        [
            *CATALOGUE,
            ("crawled_at", pa.timestamp("us", tz="UTC")),
            ("day", pa.date32()),
            ("score", pa.float32()),
            ("evidence", pa.struct([("source", pa.string()), ("uses", pa.list_(pa.string()))])),
            ("candidates", pa.list_(pa.struct([("id", pa.int64()), ("likely", pa.float64())]))),
        ]
    )
    expected = datasets.Features.from_arrow_schema(schema)
    assert datasets.Features._from_yaml_list(_features(schema)) == expected


def test_the_card_keeps_its_text_and_says_what_is_there(
    made: Artifact, exports: dict[str, Path]
) -> None:
    text = (exports["hf"] / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "other" and front["size_categories"] == ["n<1K"]
    info = front["dataset_info"][0]
    assert [f["name"] for f in info["features"]] == DABENCH.names
    assert {s["name"]: s["num_examples"] for s in info["splits"]} == {
        split: made.manifest.rows[split] for split in SPLITS
    }
    assert all(split["num_bytes"] > 0 for split in info["splits"])
    body = made.file("README.md").read_text().split("\n---\n", 1)[1].strip()
    assert body in text and "## Licences" in body
    for plot in made.glob("plots/*.png"):
        assert (exports["hf"] / "plots" / plot.name).read_bytes() == plot.read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_is_a_sound_dataset_that_knows_its_origin(
    made: Artifact, exports: dict[str, Path], layout: str
) -> None:
    assert verify_dabench(exports[layout]).sound, verdict_text(verify_dabench(exports[layout]))
    manifest = open_artifact(exports[layout]).manifest
    assert manifest.inputs["dabench"][0].content_digest == made.content_digest
    source, found = (summarise(open_dataset(path)) for path in (made.path, exports[layout]))
    kept = ("rows", "used", "catalogue", "funnels", "distributions", "counts", "params", "config")
    for name in (*kept, "prompt_characters", "prompt_words"):
        assert found[name] == source[name]
    assert found["dates"].items() >= source["dates"].items()
    assert [line.split()[0] for line in found["lineage"]] == [
        *("export", "dabench:", "filtered:", "snapshot:")
    ]
    shown = ("id", "split", "prompt", "api", "model", "version")
    for ours, theirs in zip(source["sample"], found["sample"], strict=True):
        assert [ours[name] for name in shown] == [theirs[name] for name in shown]


def test_an_export_can_be_exported_and_is_the_same(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    again = export_dabench(open_dataset(exports["hf"]), tmp_path / "again", "instruction-api")
    first = open_artifact(exports["instruction-api"]).manifest
    assert again.files == first.files
    again = export_dabench(open_dataset(exports["hf"]), tmp_path / "hf", "hf")
    assert again.files == open_artifact(exports["hf"]).manifest.files
    with pytest.raises(ArtifactError, match="pairs in JSON"):
        export_dabench(open_dataset(exports["instruction-api"]), tmp_path / "x", "hf")


def test_pairs_are_json_and_lead_back_to_the_rows(made: Artifact, exports: dict[str, Path]) -> None:
    names = set(from_pair(next(read_pairs(exports["instruction-api"] / "train.json"))))
    for split in SPLITS:
        path = exports["instruction-api"] / f"{split}.json"
        pairs = json.loads(path.read_text())
        assert pairs == list(read_pairs(path))
        rows = list(read_split(made, split))
        assert [from_pair(pair) for pair in pairs] == [{n: row[n] for n in names} for row in rows]
        assert [pair["instruction"] for pair in pairs] == [row["prompt"] for row in rows]
    api = pairs[0]["API"]
    assert list(api)[:5] == ["Model", "Type", "Base Model", "Params", "Description"]
    assert api["Params"]["sampler"] in {"Euler a", "DPM++ 2M Karras"}


def test_dictionaries_rebuild_what_the_names_mean(made: Artifact, exports: dict[str, Path]) -> None:
    directory = exports["instruction-api"] / "mapping"
    models, apis, samplers = (
        orjson.loads((directory / f"{name}.json").read_bytes())
        for name in ("models", "apis", "samplers")
    )
    catalogue = Catalogue.load(made.path)
    for split in SPLITS:
        for pair in read_pairs(exports["instruction-api"] / f"{split}.json"):
            api = pair["API"]
            known = apis[api["Model"]][api["Version"]]
            assert known.items() <= api.items()
            entry = catalogue.checkpoint(api["Model"], api["Version"])
            assert entry is not None
            found = models[api["Model"]]["versions"][api["Version"]]
            assert found["download_path"] == entry.download_path
            assert api["Params"]["sampler"] in samplers


def test_every_field_of_an_api_has_a_key() -> None:
    assert set(API_KEYS) == set(T2IAPI.model_fields)
    assert len(set(API_KEYS.values())) == len(API_KEYS)


def test_what_is_no_pair_is_an_error(made: Artifact, tmp_path: Path) -> None:
    pair = to_pair(next(read_split(made, "train")))
    assert from_pair(pair)["id"] == pair["id"]
    for key in PAIR_KEYS.values():
        with pytest.raises(SchemaError, match=f"a pair has no '{key}'"):
            from_pair({name: value for name, value in pair.items() if name != key})
    broken: list[dict[str, Any]] = [
        {**pair, "API": {**pair["API"], "Params": {}}},
        {**pair, "API": {**pair["API"], "More": 1}},
        {**pair, "API": []},
        {**pair, "id": "1"},
        {**pair, "instruction": None},
    ]
    for one in broken:
        with pytest.raises(SchemaError):
            from_pair(one)
    for number, text in enumerate(('[\n{"id": 1,\n"API": 2}]', "[1\n]")):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(SchemaError, match="is not a pair"):
            list(read_pairs(path))


def test_out_must_be_empty_unless_forced(made: Artifact, tmp_path: Path) -> None:
    dataset, out = open_dataset(made.path), tmp_path / "out"
    out.mkdir()
    export_dabench(dataset, out, "hf")  # empty
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty.*--force"):  # noqa: RUF043
        export_dabench(dataset, out, "hf")
    assert (out / "mine.txt").exists()
    export_dabench(dataset, out, "instruction-api", force=True)
    assert not (out / "mine.txt").exists() and not (out / "data").exists()
    assert verify_dabench(out).sound
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_out_must_not_overlap_the_dataset(made: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(made, tmp_path)
    dataset = open_dataset(directory)
    for out in (directory, directory / "inside", tmp_path):
        with pytest.raises(ConfigError, match="one holds the other"):
            export_dabench(dataset, out, "hf", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        export_dabench(dataset, tmp_path / "file", "hf", force=True)
    assert open_artifact(directory)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(
    made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")

    def fail(*_: Any) -> Manifest:
        raise error

    monkeypatch.setattr(export_module, "_manifest", fail)
    expected = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export_dabench(open_dataset(made.path), out, "hf", force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_dataset_is_not_exported(made: Artifact, tmp_path: Path, layout: Layout) -> None:
    directory = copy_dabench(made, tmp_path)
    whole = shards(directory, "train")[0].read_bytes()
    edit_row(shards(directory, "train")[0], 0, lambda row: row.update(reactions=9), signed=False)
    with pytest.raises(ArtifactError, match=r"train-00000-of-00002.parquet' is damaged"):
        export_dabench(open_dataset(directory), tmp_path / "out", layout)
    shards(directory, "train")[0].write_bytes(whole)
    (directory / "catalogue.parquet").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        export_dabench(open_dataset(directory), tmp_path / "out", layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
