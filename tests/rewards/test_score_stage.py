"""The stages ``score`` and ``judge`` over drawn pictures: tables, failures, versions, reference."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from diffagent.errors import ArtifactError, ScoreError
from diffagent.render.render_config import RenderConfig
from diffagent.rewards.judge_config import JudgesConfig
from diffagent.rewards.load import load_scorers
from diffagent.rewards.reference import main as measure
from diffagent.rewards.score_config import RewardsConfig
from diffagent.rewards.score_stage import PictureScores, judge, score, score_pictures, score_rows
from diffagent.rewards.scores import read_definition, read_scores
from diffagent.rewards.unified import MetricReference, Unifier
from diffagent.sandbox import world
from diffagent.sandbox.files import SCORERS
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import JUDGEMENTS, RENDERS, SCORES, RenderRow, ScoreRow
from diffagent.store import StageContext, StageResult, stage
from tests.evaluation.evaluation_run import write_rows
from tools.sandbox import drawings

NAMES = ("clip", "image_reward", "hps_v2")
LONG = "a red circle on a plain background " * 9


def config(root: Path = SCORERS, **changes) -> RewardsConfig:
    scorers = [{"name": name, "model": str(root / name)} for name in NAMES]
    reference = str(SCORERS / "reference.json")
    fields = {"scorers": scorers, "reference": reference, "batch_size": 2, **changes}
    return RewardsConfig.model_validate(fields)


def make_renders(store: Path, seed: int = 0):
    """Four pictures (one damaged, one under two prompts), an invalid answer, a failed render."""

    def write(context: StageContext) -> None:
        rows = []
        kinds = ["ok"] * 5 + ["invalid", "failed"]
        for number, status in enumerate(kinds):
            recipe = f"{seed}{min(number, 3):02d}" if status == "ok" else None
            prompt = {4: LONG}.get(number, f"drawing {number}")
            key = {"prompt_id": number, "source": "dabench", "candidate": 0, "seed": 0}
            rows.append({**key, "prompt": prompt, "recipe": recipe, "status": status})
            rows[-1]["reason"] = None if status == "ok" else f"why-{status}"
            if recipe and number < 4:
                file = context.out / "images" / f"{recipe}.png"
                file.parent.mkdir(exist_ok=True)
                image, _, _ = drawings.drawing(world.EVALUATION_SEEDS[10 * seed + number])
                image.save(file)
                if number == 2:
                    file.write_bytes(b"no picture")
        write_rows(context.out / "renders.parquet", rows, RENDERS)

    def body(config: RenderConfig, context: StageContext) -> StageResult:
        write(context)
        return StageResult()

    render = stage("render", version=1, config=RenderConfig)(body)
    return render.run(RenderConfig(seeds=(seed,)), {}, RuntimeConfig(store=str(store)))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> RuntimeConfig:
    store = tmp_path_factory.mktemp("store")
    return RuntimeConfig(store=str(store), device="cpu", scoring={"decode_threads": 2})


@pytest.fixture(scope="module")
def renders(runtime):
    return make_renders(Path(runtime.store))


@pytest.fixture(scope="module")
def scored(renders, runtime):
    return score.run(config(), {"renders": [renders]}, runtime)


def test_every_row_has_scores_a_floor_or_a_reason(scored, renders):
    table = pq.read_table(scored.file("scores.parquet"))
    assert table.schema.equals(SCORES)
    rows = table.to_pylist()
    status = [row["status"] for row in rows]
    assert status == ["ok", "ok", "failed", "ok", "ok", "invalid", "failed"]
    assert [row["reason"] for row in rows[2::3]] == ["unreadable-picture", "why-invalid"]
    assert [row["unified"] for row in rows[5:]] == [-10.0, None]
    for row in rows:
        values = [row[name] for name in NAMES]
        assert all(v is not None and np.isfinite(v) for v in values) == (row["status"] == "ok")
    assert rows[3]["recipe"] == rows[4]["recipe"] and rows[3]["clip"] != rows[4]["clip"]
    scorer = load_scorers(config())[0]
    picture = [renders.file("images/000.png")]
    expected = score_pictures([scorer], ["drawing 0"], picture).metrics["clip"][0]
    assert rows[0]["clip"] == pytest.approx(expected, abs=1e-5)


def test_definition_reference_and_digests_stand_beside_the_scores(scored):
    definition = read_definition(scored.file("scores.parquet"))
    reference = json.loads((SCORERS / "reference.json").read_text())
    for name in NAMES:
        digest = reference["metrics"][name]["digest"]
        assert definition["scorers"][name]["digest"] == digest
        assert definition["unified"]["reference"][name]["digest"] == digest
    assert definition["unified"]["method"] == "zscore"
    assert definition["unified"]["weights"] == dict.fromkeys(NAMES, 1.0)
    assert definition["unified"]["invalid_floor"] == -10.0
    assert definition["unified"]["reference_set"]["note"] == reference["note"]
    assert definition["dtype"] == "float32" and len(definition["unified_digest"]) == 64
    assert scored.manifest.metrics["unified"] == definition["unified"]


def test_truncated_prompts_are_counted_once_each(scored):
    counts = scored.manifest.metrics["scorers"]
    assert [counts[name]["truncated_prompts"] for name in NAMES] == [1, 1, 1]


def test_scores_of_different_versions_never_mix(scored, runtime, tmp_path):
    copied = tmp_path / "scorers"
    shutil.copytree(SCORERS, copied)
    weights = copied / "clip" / "open_clip_model.safetensors"
    state = load_file(weights)
    state["logit_scale"] += 1
    save_file(state, weights)
    other = make_renders(Path(runtime.store), seed=1)
    with pytest.raises(ScoreError, match="measured with clip"):
        score.run(config(copied), {"renders": [other]}, runtime)
    changed = score.run(config(copied, unify="chatgen"), {"renders": [other]}, runtime)
    with pytest.raises(ScoreError, match=r"clip is sandbox-clip-1 .* in one and"):
        read_scores([scored, changed])
    weighted = score.run(config(unify="chatgen"), {"renders": [other]}, runtime)
    with pytest.raises(ScoreError, match="unified"):
        read_scores([scored, weighted])
    same = score.run(config(), {"renders": [other]}, runtime)
    assert read_scores([scored, same]).height == 14


def test_a_reference_is_measured_from_scores_and_used(scored, renders, runtime, tmp_path):
    raw = score.run(config(unify="chatgen"), {"renders": [renders]}, runtime)
    file = tmp_path / "reference.json"
    measure([str(file), str(raw.path), "--note", "four drawings"])
    rescored = score.run(config(reference=str(file)), {"renders": [renders]}, runtime)
    rows = pl.read_parquet(rescored.file("scores.parquet")).filter(status="ok")
    assert rows["unified"].mean() == pytest.approx(0, abs=1e-9)
    about = read_definition(rescored.file("scores.parquet"))["unified"]["reference_set"]
    assert about["note"] == "four drawings" and about["pictures"] == rows.height
    with pytest.raises(ScoreError, match="must not be mixed: unified"):
        read_scores([scored, rescored])


def test_judgements_are_a_table_of_their_own_that_no_training_reads(renders, runtime, tmp_path):
    import torch

    head = tmp_path / "head.pth"
    torch.save({"layers.0.weight": torch.randn(1, 64), "layers.0.bias": torch.zeros(1)}, head)
    clip = str(SCORERS / "clip")
    judges = [{"name": "aesthetic", "model": clip, "head": str(head)}]
    judged = judge.run(
        JudgesConfig.model_validate({"judges": judges}), {"renders": [renders]}, runtime
    )
    table = pq.read_table(judged.file("judgements.parquet"))
    assert table.schema.equals(JUDGEMENTS)
    rows = table.to_pylist()
    assert [row["aesthetic"] is not None for row in rows] == [True] * 2 + [False] + [True] * 2 + [
        False
    ] * 2
    assert all(row["pick_score"] is None for row in rows)
    assert rows[5]["status"] == "invalid"
    definition = read_definition(judged.file("judgements.parquet"))
    assert definition["scorers"]["aesthetic"]["version"] == "head on sandbox-clip-1"
    with pytest.raises(ArtifactError, match=r"scores\.parquet"):
        read_scores([judged])


def test_a_truncated_answer_has_no_score_and_an_invalid_one_the_floor():
    rows = [
        RenderRow(
            prompt_id=number,
            source="sft",
            candidate=0,
            seed=0,
            prompt="a",
            status="invalid",
            reason=reason,
        )
        for number, reason in enumerate(("truncated", "unparsable"))
    ]
    reference = {"clip": MetricReference(0.0, 1.0, "digest")}
    unifier = Unifier("zscore", {"clip": 1.0}, -10.0, reference)
    scored = score_rows(rows, [], PictureScores({"clip": np.zeros(0)}), ScoreRow, unifier)
    assert [row.unified for row in scored] == [None, -10.0]
    assert [row.reason for row in scored] == ["truncated", "unparsable"]
