"""The stage ``evaluate`` over made-up artefacts: files, digest, pictures, hostile text."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffagent.errors import ArtifactError
from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.evaluation.evaluate_stage import TINY_AGENT_NOTE, evaluate
from diffagent.evaluation.report import picture_uri
from diffagent.evaluation.summary import read_metrics, summary_markdown
from diffagent.rewards.judge_config import JudgesConfig
from diffagent.schemas.tables import EVALUATION, JUDGEMENTS
from diffagent.store import Artifact
from diffagent.store.lineage import ancestors, lineage_lines
from tests.evaluation.evaluation_run import Run, write_rows

CONFIG = EvaluationConfig(num_prompts=30, report_prompts=30, bootstrap_samples=200)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("store"), CONFIG)


@pytest.fixture(scope="module")
def report(run: Run) -> Artifact:
    return evaluate.run(CONFIG, run.inputs, run.runtime)


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(report: Artifact) -> Page:
    return Page(report.file("report.html").read_text())


def test_the_table_follows_its_schema(report: Artifact) -> None:
    table = pq.read_table(report.file("table.parquet"))
    assert table.schema.equals(EVALUATION)
    assert table.num_rows == 6 * 30 == report.manifest.rows["table"]


def test_metrics_describe_the_run(run: Run, report: Artifact) -> None:
    found = read_metrics(report)
    described = found["run"]
    assert described["num_prompts"] == 30 and described["picture_seeds"] == [0, 1]
    assert described["dataset"]["content_digest"] == run.dabench.content_digest
    assert [s["name"] for s in described["scorers"]] == ["clip", "image_reward", "hps_v2"]
    table = pl.read_parquet(report.file("table.parquet"))
    for name, numbers in found["selectors"].items():
        rows = table.filter(pl.col("selector") == name)
        assert numbers["unified"]["mean"] == pytest.approx(rows["unified"].mean(), abs=1e-6)
        kinds = found["hallucinations"][name]
        assert sum(kind["count"] for kind in kinds.values()) == rows["hallucinated"].sum()
    assert "Infinity" not in (text := report.file("metrics.json").read_text())
    assert "NaN" not in text and str(report.path.parent.parent) not in text


def test_latency_changes_the_report_but_not_the_digest(run: Run, report: Artifact) -> None:
    """The same answers, given at another speed, are the same result."""
    latency = {"mean": 12.5, "p95": 99.0}
    folders = [artifact.path for artifact in run.inputs["candidates"]]
    manifests = {folder: (folder / "manifest.json").read_text() for folder in folders}
    try:
        for folder, text in manifests.items():
            changed = json.loads(text)
            changed["metrics"]["latency_seconds"] = latency
            (folder / "manifest.json").write_text(json.dumps(changed))
        again = evaluate.run(CONFIG, run.inputs, run.runtime, refresh=True)
        assert again.content_digest == report.content_digest
        assert again == report  # nothing new, so the first one stays
    finally:
        for folder, text in manifests.items():
            (folder / "manifest.json").write_text(text)
    assert report.manifest.metrics["latency"]["sft"]["p95"] > 0


def test_everything_is_in_the_one_file(page: Page) -> None:
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "base")]
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert addresses and all(a and a.startswith("data:image/") for a in addresses)
    assert not [n for _, attributes in page.tags for n in attributes if n.startswith("on")]


def test_hostile_text_stays_text(page: Page) -> None:
    assert '<script>alert("x")</script>' in page.text
    assert "<b>Dreamy</b>" in page.text  # an invalid answer, shown verbatim


def test_every_picture_has_a_description(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) > 100
    assert all((a["alt"] or "").startswith("Picture by Sandbox") for a in pictures)


def test_every_answer_is_shown_with_its_score(page: Page, report: Artifact) -> None:
    table = pl.read_parquet(report.file("table.parquet"))
    text = re.sub(r"\s+", " ", page.text)
    assert len([1 for tag, a in page.tags if tag == "li"]) == table.height
    for score in table["unified"].drop_nulls().head(20):
        assert f"{score:.3f}" in text
    invalid = table.filter(pl.col("reason").is_not_null())
    assert invalid.height > 0
    for reason, shown in invalid.group_by("reason").len().iter_rows():
        assert text.count(f"invalid: {reason}") == shown


@pytest.mark.parametrize("note", ["", "A toy: its numbers state nothing."])
def test_the_note_of_the_config_heads_the_report(tmp_path: Path, note: str) -> None:
    config = CONFIG.model_copy(update={"num_prompts": 3, "selectors": ("popular",), "note": note})
    run = Run(tmp_path, config)
    artifact = evaluate.run(config, run.inputs, run.runtime)
    assert read_metrics(artifact)["run"]["note"] == note
    page = Page(artifact.file("report.html").read_text())
    assert (note in page.text) and (("p", {"class": "note", "role": "note"}) in page.tags) == bool(
        note
    )
    if note:
        assert note in summary_markdown(read_metrics(artifact))


@pytest.mark.parametrize(("model", "note"), [("tiny-llama", TINY_AGENT_NOTE), ("gpt2", "")])
def test_an_agent_of_random_weights_is_called_one(tmp_path: Path, model: str, note: str) -> None:
    config = CONFIG.model_copy(update={"num_prompts": 3, "selectors": ("sft",)})
    run = Run(tmp_path, config, agent=model)
    assert read_metrics(evaluate.run(config, run.inputs, run.runtime))["run"]["note"] == note


def test_inputs_of_other_selectors_are_refused(run: Run) -> None:
    other = CONFIG.model_copy(update={"selectors": ("sft", "rrhf")})
    inputs = {name: artifacts[:2] for name, artifacts in run.inputs.items()}
    with pytest.raises(ArtifactError, match=r"candidates are of .*'popular'"):
        evaluate.run(other, inputs, run.runtime)


@pytest.mark.parametrize(("size", "kind", "shown"), [(64, "png", 64), (1024, "jpeg", 384)])
def test_large_pictures_are_made_small(tmp_path: Path, size: int, kind: str, shown: int) -> None:
    path = tmp_path / "x.png"
    Image.effect_noise((size, size // 2), 80).save(path)
    head, _, data = picture_uri(path).partition(";base64,")
    assert head == f"data:image/{kind}"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (shown, shown // 2)


def test_held_out_judges_stand_in_the_report(run: Run, report: Artifact) -> None:
    judges = JudgesConfig.model_validate({"judges": [{"name": "pick_score", "model": "somewhere"}]})
    told = {"pick_score": {"version": "PickScore_v1", "digest": "a" * 64}}

    def write(out: Path, renders: Artifact) -> None:
        rows = pq.read_table(renders.file("renders.parquet")).to_pylist()
        kept = [{n: row.get(n) for n in JUDGEMENTS.names} | {"pick_score": 21.5} for row in rows]
        write_rows(out / "judgements.parquet", kept, JUDGEMENTS)

    judged = [
        run._stage(
            "judge",
            judges,
            {"renders": [renders]},
            lambda out, renders=renders: write(out, renders),
            metrics={"scorers": told},
        )
        for renders in run.inputs["renders"]
    ]
    made = evaluate.run(CONFIG, {**run.inputs, "judgements": judged}, run.runtime)
    page = made.file("report.html").read_text()
    assert "PickScore_v1, digest aaaaaaaaaaaaaaaa" in page and "held-out judges" in page
    assert read_metrics(made)["selectors"]["sft"]["pick_score"]["mean"] == 21.5
    assert "aesthetic" not in read_metrics(made)["selectors"]["sft"]
    assert "held-out judges" not in report.file("report.html").read_text()


def test_lineage_is_readable_from_the_store(run: Run, report: Artifact) -> None:
    stages = [artifact.stage for artifact in ancestors(report)]
    assert stages.count("select") == 6 and stages.count("crawl") == 1
    lines = lineage_lines(report)
    assert lines[0].startswith(f"evaluate {report.identity[:16]}")
    assert any(line.strip().startswith("filtered: crawl") for line in lines)


def test_lineage_names_a_parent_that_is_gone(tmp_path: Path) -> None:
    config: Any = CONFIG.model_copy(update={"num_prompts": 2, "selectors": ("popular",)})
    run = Run(tmp_path, config)
    crawl = next(a for a in ancestors(run.dabench) if a.stage == "crawl")
    crawl.path.rename(crawl.path.with_name("elsewhere"))
    lines = lineage_lines(run.dabench)
    assert lines[1] == f"  filtered: crawl {crawl.identity[:16]} (not in this store)"
