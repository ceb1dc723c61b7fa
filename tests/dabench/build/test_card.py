"""The dataset card: true for its source, valid metadata, snippets that run, names shown as text."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from diffagent.dabench import columns
from diffagent.dabench.build.card import Source, literal, size_category, source_of
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.shard_stage import build_dabench
from diffagent.dabench.build.splits import SPLITS
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.dabench.tools.dataset_checks import verify_dabench
from diffagent.dabench.tools.layout import one_line
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import CATALOGUE, DABENCH
from diffagent.store import Artifact, open_artifact
from diffagent.t2i.base_models import base_model_of, families
from diffagent.t2i.catalogue import SYNTHETIC
from tests.dabench.build.test_history import edit_manifest
from tests.dabench.dabench_records import hashes, image, model, snapshot, version

#: Names that would be a formula, a heading, a picture, a link, HTML, a cell, a control sequence.
HOSTILE = (
    "a$x_$b",
    r"$\frac{",
    "new\n\n# Heading\n\n![p](https://evil.example/p.png)",
    "<img src=x onerror=alert(1)>",
    "<!-- open",
    "&lt;b&gt; & co",
    "[link](https://evil.example) https://evil.example www.evil.example a@evil.example",
    "`code` **bold** _it_ ~~gone~~ a|b a_b \\| \\",
    "\x1b[31mred\u202e\u2028# line",
    "| --- | ---: |",
    "",
)


def build(directory: Path, models: list[Any], images: list[Any], **filters: Any) -> Artifact:
    source = snapshot(directory / "snapshot", models, images)
    runtime = RuntimeConfig(store=str(directory / "store"))
    filtered = filter_records.run(FilterConfig(**filters), {"snapshot": [source]}, runtime)
    config = DABenchConfig(validation_fraction=0.3, test_fraction=0.3)
    return build_dabench.run(config, {"filtered": [filtered]}, runtime)


def pictures(count: int = 40, version_id: int = 100) -> list[Any]:
    return [image(n, version_id, prompt=f"w{n} x{n} y{n}") for n in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(tmp_path_factory.mktemp("card"), [model(1)], pictures())


def card_of(dabench: Artifact) -> str:
    return dabench.file("README.md").read_text()


def body_of(card: str) -> str:
    return card.split("---\n", 2)[2]


def tokens_of(card: str) -> list[Token]:
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = markdown.parse(body_of(card))
    return [t for token in tokens for t in (token, *(token.children or ()))]


def cells_of(card: str) -> set[str]:
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body_of(card))
    return {
        "".join(t.content for t in after.children or ())
        for token, after in pairwise(tokens)
        if token.type == "td_open"
    }


def test_names_of_strangers_are_shown_as_text(made: Artifact, tmp_path: Path) -> None:
    """Base models, types and uses with markup in them, through the stages and a real parser."""
    names = [name for name in HOSTILE if name]
    models = [model(1)]
    models += [
        model(n, modelVersions=[version(n * 100, baseModel=name)], allowCommercialUse=[name])
        for n, name in enumerate(names, 2)
    ]
    models += [model(50 + n, type=name) for n, name in enumerate(names)]
    models += [
        model(80 + n, modelVersions=[version(8000 + n, baseModel=f"other {name}")])
        for n, name in enumerate(names)
    ]
    images = [*pictures(), *(image(100 + n, n * 100) for n in range(2, 2 + len(names)))]
    hostile = build(tmp_path, models, images, base_models=("all",))
    card = card_of(hostile)
    plain = Counter((t.type, t.tag) for t in tokens_of(card_of(made)))
    found = Counter((t.type, t.tag) for t in tokens_of(card))
    for kind in ("html_block", "html_inline", "link_open", "image", "heading_open"):
        assert {k: n for k, n in found.items() if k[0] == kind} == {
            k: n for k, n in plain.items() if k[0] == kind
        }, kind
    for kind in ("strong_open", "em_open", "s_open"):
        assert not any(k[0] == kind for k in found)
    cells = cells_of(card)
    for name in names:
        assert one_line(name) in cells
    assert "\x1b" not in card and "\u202e" not in card and "\u2028" not in card
    assert not re.search(r"(?<!\\)https?://evil|www\.evil", card), "no address that links itself"
    for plot in hostile.glob("plots/*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")
    assert set(verify_dabench(hostile.path).totals) == {"catalogue value"}, "the uses"


@pytest.mark.parametrize("text", HOSTILE)
def test_literal_text_is_what_a_reader_sees(text: str) -> None:
    (inline,) = MarkdownIt("commonmark").parseInline(literal(text)) or [None]
    assert {t.type for t in inline.children or ()} <= {"text", "text_special"}
    assert "".join(t.content for t in inline.children or ()) == one_line(text)


def test_metadata_is_what_the_hub_reads(made: Artifact) -> None:
    from huggingface_hub import DatasetCard, DatasetCardData

    data = DatasetCard.load(made.path / "README.md").data
    fields = set(vars(DatasetCardData())) | {"license_name", "license_link", "tags"}
    assert set(data.to_dict()) <= fields | {"configs"}
    assert data.license == "other" and data.license_link == "LICENSE.md"
    assert made.file("LICENSE.md").read_text().startswith("# Terms")
    assert re.fullmatch(r"[a-z0-9.-]+", data.license_name)
    assert data.size_categories == ["n<1K"] and data.language == ["en"]
    assert {c["config_name"] for c in data.configs} == {"default", "catalogue"}
    for config in data.configs:
        files = config["data_files"]
        for pattern in [files] if isinstance(files, str) else [f["path"] for f in files]:
            assert made.glob(pattern)
    front = card_of(made).split("---\n")[1]
    assert yaml.safe_load(front)["task_categories"] == ["text-generation"]


@pytest.mark.parametrize(
    ("rows", "name"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**9, "n>100M")],
)
def test_size_categories(rows: int, name: str) -> None:
    assert size_category(rows) == name


def test_the_snippets_run(made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(made.path)
    snippets = re.findall(r"```python\n(.*?)```", card_of(made), re.DOTALL)
    assert len(snippets) == 2
    results: list[dict[str, Any]] = []
    for snippet in snippets:
        results.append({})
        exec(snippet, results[-1])
    by_datasets, by_polars = results
    rows = made.manifest.rows
    assert {k: len(v) for k, v in by_datasets["pairs"].items()} == {s: rows[s] for s in SPLITS}
    assert len(by_datasets["catalogue"]) == len(by_polars["catalogue"]) == rows["catalogue"]
    assert by_polars["train"].equals(pl.read_parquet(made.glob("data/train-*.parquet")))
    open_artifact(made.path)


def test_every_column_is_in_the_card(made: Artifact) -> None:
    assert list(columns.PAIRS) == DABENCH.names and list(columns.CATALOGUE) == CATALOGUE.names
    cells = cells_of(card_of(made))
    assert {*DABENCH.names, *CATALOGUE.names} <= cells
    assert {*columns.PAIRS.values(), *columns.CATALOGUE.values()} <= cells
    for path, schema in (
        (made.glob("data/*.parquet")[0], DABENCH),
        ("catalogue.parquet", CATALOGUE),
    ):
        assert pq.read_schema(made.path / path).names == schema.names


def test_licences_are_those_of_the_one_table(tmp_path: Path) -> None:
    names = [name for _, media, all_names in families() if media == "image" for name in all_names]
    models = [
        model(n, modelVersions=[version(n * 100, baseModel=name)])
        for n, name in enumerate([*names, "Never Heard Of"], 1)
    ]
    dabench = build(tmp_path, models, pictures(), base_models=(*names, "Never Heard Of"))
    card = card_of(dabench)
    for name in names:
        licence = base_model_of(name).licence or "not known: see its publisher"
        assert f"| {literal(name)} | {literal(licence)} | 1 |" in card
    assert "| Never Heard Of | not known: see its publisher | 1 |" in card
    assert card.count("not known: see its publisher") == 1 + sum(
        base_model_of(name).licence is None for name in names
    )


@pytest.mark.parametrize(
    ("site", "source", "text"),
    [
        ("https://civitai.com", "civitai", "answers of Civitai's public API"),
        ("https://www.civitai.red/", "civitai", "answers of Civitai's public API"),
        ("http://127.0.0.1:8123", "api", "answers of a site whose API has the shape"),
        ("https://civitai.com.evil.example", "api", "answers of a site whose API has the shape"),
        ("dump:/data/x", "dump", "a dump of records"),
        ("local:/srv/models", "local", "a folder of model files"),
        ("release:/r", "release", "the layout of the authors' release"),
        (None, "unknown", "records in the shape of Civitai's public API"),
    ],
)
def test_the_text_is_that_of_the_source(
    tmp_path: Path, site: str | None, source: Source, text: str
) -> None:
    assert source_of(site) == source
    crawl = snapshot(tmp_path / "snapshot", [model(1)], pictures(10))
    if site:
        folder = tmp_path / "store" / "crawl" / ("0" * 16)
        folder.parent.mkdir(parents=True)
        edit_manifest(crawl.path, lambda manifest: manifest.update(config={"site": site}))
        crawl = open_artifact(crawl.path.rename(folder))
    runtime = RuntimeConfig(store=str(tmp_path / "store"))
    filtered = filter_records.run(FilterConfig(), {"snapshot": [crawl]}, runtime)
    card = card_of(build_dabench.run(DABenchConfig(), {"filtered": [filtered]}, runtime))
    assert text in " ".join(card.split())
    assert ("portraits of women" in card) == (source in ("civitai", "dump"))
    for private in ("/srv", "/data", "127.0.0.1", "evil"):
        assert private not in card


def test_the_card_quotes_what_a_dump_states_of_itself(tmp_path: Path) -> None:
    note = {"source": "built from drawings", "limits": ["Means *nothing*."]}
    crawl = snapshot(tmp_path / "snapshot", [model(1)], pictures(10))
    folder = tmp_path / "store" / "crawl" / ("0" * 16)
    folder.parent.mkdir(parents=True)
    edit_manifest(crawl.path, lambda manifest: manifest["metrics"].update(about=note))
    crawl = open_artifact(crawl.path.rename(folder))
    runtime = RuntimeConfig(store=str(tmp_path / "store"))
    filtered = filter_records.run(FilterConfig(), {"snapshot": [crawl]}, runtime)
    card = card_of(build_dabench.run(DABenchConfig(), {"filtered": [filtered]}, runtime))
    assert "2404.01342), built from drawings. The" in " ".join(card.split())
    assert "- Means \\*nothing\\*." in card and "portraits of women" not in card


def test_a_model_of_ones_own_claims_no_civitai_air(tmp_path: Path) -> None:
    own = SYNTHETIC + 7
    models = [model(1), model(own, modelVersions=[version(own, files=[_file(own)])])]
    dabench = build(tmp_path, models, pictures())
    airs = pq.read_table(dabench.file("catalogue.parquet"))["air"].to_pylist()
    assert airs == [
        "urn:air:sd1:checkpoint:civitai:1@100",
        f"urn:air:sd1:checkpoint:local:{own}@{own}",
    ]
    assert "1 of the versions are files that no site knows" in " ".join(card_of(dabench).split())
    assert verify_dabench(dabench.path).problems == []


def _file(ident: int) -> dict[str, Any]:
    return {**version(5)["files"][0], "hashes": hashes(ident), "id": ident}
