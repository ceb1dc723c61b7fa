"""Agreement with DABench, the evaluation table, and the summary of it."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from diffagent.errors import SchemaError
from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.evaluation.metrics import METRICS, agreement, evaluation_table, jaccard
from diffagent.evaluation.summary import (
    format_number,
    markdown_table,
    summarise,
    tables,
)
from diffagent.schemas.api import T2IAPI, LoRA, Params
from diffagent.schemas.tables import EVALUATION


def api(**changes: Any) -> T2IAPI:
    params = {"sampler": "Euler a", "steps": 20, "cfg_scale": 7, "width": 512, "height": 768}
    params |= {key: changes.pop(key) for key in list(changes) if key in Params.model_fields}
    fields = {"model": "A", "version": "v1", "base_model": "SD 1.5", "params": params}
    return T2IAPI.model_validate({**fields, **changes})


TRUTH = api(negative_prompt="lowres, bad anatomy", loras=(LoRA(model="L", version="1", weight=1),))


def test_an_equal_answer_agrees_in_everything_and_an_invalid_one_in_nothing() -> None:
    assert set(agreement(TRUTH, TRUTH).values()) == {1.0}
    assert set(agreement(None, TRUTH).values()) == {0.0}
    assert agreement(None, TRUTH).keys() == agreement(TRUTH, TRUTH).keys()


@pytest.mark.parametrize(
    ("key", "changes", "expected"),
    [
        ("steps", {"steps": 24}, 1.0),
        ("steps", {"steps": 16}, 1.0),
        ("steps", {"steps": 25}, 0.0),
        ("cfg_scale", {"cfg_scale": 8}, 1.0),
        ("cfg_scale", {"cfg_scale": 5.9}, 0.0),
        ("size", {"width": 768, "height": 512}, 0.0),
        ("clip_skip", {"clip_skip": 2}, 0.0),
        ("sampler", {"sampler": "Euler"}, 0.0),
        ("model", {"version": "v2"}, 1.0),
        ("model_version", {"version": "v2"}, 0.0),
        ("loras", {"loras": ({"model": "L", "version": "1", "weight": 0.5},)}, 1.0),
        ("loras", {"loras": ()}, 0.0),
        ("negative_prompt", {"negative_prompt": " lowres, bad anatomy "}, 1.0),
        ("negative_prompt", {"negative_prompt": "bad anatomy, lowres"}, 0.0),
        ("negative_prompt_overlap", {"negative_prompt": "Bad Anatomy,lowres,"}, 1.0),
        ("negative_prompt_overlap", {"negative_prompt": "lowres, blurry"}, 1 / 3),
        ("negative_prompt_overlap", {"negative_prompt": ""}, 0.0),
    ],
)
def test_each_parameter(key: str, changes: dict[str, Any], expected: float) -> None:
    assert agreement(api(**changes), TRUTH)[key] == pytest.approx(expected)


def test_cfg_within_one_in_decimal() -> None:
    assert agreement(api(cfg_scale=8.3), api(cfg_scale=7.3))["cfg_scale"] == 1.0


def test_jaccard_of_nothing_is_agreement() -> None:
    assert jaccard(set(), set()) == 1.0
    assert jaccard({"a"}, set()) == 0.0


def rows(**overrides: Any) -> dict[str, pl.DataFrame]:
    """Two prompts, two selectors; 'sft' is wrong in the first and invalid in the second."""
    good, other = TRUTH.to_json(), api(model="B").to_json()
    answers = [
        ("popular", 1, good, "valid", None, (1.0, 3.0)),
        ("popular", 2, good, "valid", None, (None, None)),  # both renders failed
        ("sft", 1, other, "valid", None, (0.5, None)),  # one of two seeds failed
        ("sft", 2, None, "invalid", "not-json", (-10.0, -10.0)),
    ]
    candidates, renders, scores = [], [], []
    for source, prompt, text, status, reason, rewards in answers:
        key = {"source": source, "prompt_id": prompt}
        candidates.append(key | {"api": text, "status": status, "reason": reason})
        for seed, unified in enumerate(rewards):
            ok = status == "valid" and unified is not None
            state = "ok" if ok else "failed" if status == "valid" else "invalid"
            renders.append(key | {"seed": seed, "status": state})
            clip = unified if ok else None
            scores.append(
                key | {"clip": clip, "image_reward": clip, "hps_v2": clip, "unified": unified}
            )
    frames = {
        "candidates": pl.DataFrame(candidates),
        "renders": pl.DataFrame(renders),
        "scores": pl.DataFrame(scores),
        "dabench": pl.DataFrame({"id": [1, 2, 3], "api": [good] * 3}),
    }
    return frames | overrides


def test_the_table_has_one_row_an_answer_with_means_over_seeds() -> None:
    table = evaluation_table(**rows())
    assert table.columns == EVALUATION.names
    found = {(r["selector"], r["prompt_id"]): r for r in table.to_dicts()}
    assert len(found) == 4
    first = found["popular", 1]
    assert (first["unified"], first["clip"], first["render_failed"]) == (2.0, 2.0, 0.0)
    assert (first["model"], first["hallucinated"], first["reason"]) == (1.0, 0.0, None)
    failed = found["popular", 2]
    assert (failed["unified"], failed["clip"], failed["render_failed"]) == (None, None, 1.0)
    half = found["sft", 1]
    assert (half["unified"], half["render_failed"], half["model"]) == (0.5, 0.5, 0.0)
    invalid = found["sft", 2]
    assert (invalid["unified"], invalid["unified_valid"], invalid["clip"]) == (-10.0, None, None)
    assert (invalid["hallucinated"], invalid["render_failed"]) == (1.0, None)
    assert (invalid["reason"], invalid["steps"]) == ("not-json", 0.0)


def test_a_truncated_answer_is_no_hallucination_and_has_no_score() -> None:
    frames = rows()
    cut = pl.when(pl.col("status") == "invalid")
    frames["candidates"] = frames["candidates"].with_columns(
        reason=cut.then(pl.lit("truncated")).otherwise(pl.col("reason"))
    )
    last = (pl.col("source") == "sft") & (pl.col("prompt_id") == 2)
    frames["scores"] = frames["scores"].with_columns(
        unified=pl.when(last).then(None).otherwise(pl.col("unified"))
    )
    table = evaluation_table(**frames)
    (row,) = table.filter(selector="sft", prompt_id=2).to_dicts()
    assert (row["truncated"], row["hallucinated"], row["unified"]) == (1.0, 0.0, None)
    found = summarise(table, EvaluationConfig(selectors=("popular", "sft"), num_prompts=2))
    assert found["selectors"]["sft"]["truncated"]["mean"] == 0.5
    assert found["selectors"]["sft"]["hallucinated"]["mean"] == 0.0
    assert "truncated" not in found["hallucinations"]["sft"]
    assert tables(found)["selectors"][1]["truncated"].startswith("50.0 %")


def test_selectors_must_answer_the_same_prompts() -> None:
    frames = rows()
    with pytest.raises(SchemaError, match="same split"):
        evaluation_table(**frames | {"candidates": frames["candidates"].head(3)})
    twice = pl.concat([frames["candidates"], frames["candidates"].head(1)])
    with pytest.raises(SchemaError, match="more than once"):
        evaluation_table(**frames | {"candidates": twice})


@pytest.mark.parametrize(("name", "verb"), [("renders", "rendered"), ("scores", "scored")])
def test_every_answer_must_be_judged(name: str, verb: str) -> None:
    frames = rows()
    short = frames[name].filter(pl.col("source") == "popular")
    with pytest.raises(SchemaError, match=f"'sft' to prompt 1 was never {verb}"):
        evaluation_table(**frames | {name: short})


def test_a_prompt_of_another_data_set() -> None:
    other = pl.DataFrame({"id": [1], "api": [TRUTH.to_json()]})
    with pytest.raises(SchemaError, match="prompt 2 is not in the data set"):
        evaluation_table(**rows(dabench=other))


def summary(**changes: Any) -> dict[str, Any]:
    config = EvaluationConfig(selectors=("popular", "sft"), num_prompts=2, **changes)
    return summarise(evaluation_table(**rows()), config)


def test_held_out_judges_are_reported_where_they_were_asked() -> None:
    scores = rows()["scores"]
    picks = scores.select("source", "prompt_id", pick_score="clip", aesthetic=pl.lit(None))
    table = evaluation_table(**rows(), judgements=picks.cast({"aesthetic": pl.Float64}))
    values = {(r["selector"], r["prompt_id"]): r["pick_score"] for r in table.to_dicts()}
    assert values["popular", 1] == 2.0 and values["sft", 2] is None
    assert table["aesthetic"].null_count() == 4
    config = EvaluationConfig(selectors=("popular", "sft"), num_prompts=2)
    numbers = summarise(table, config)["selectors"]["popular"]
    assert numbers["pick_score"] == {"mean": 2.0, "low": None, "high": None, "n": 1}
    assert "aesthetic" not in numbers
    with pytest.raises(SchemaError, match="'sft' to prompt 1 was never judged"):
        evaluation_table(**rows(), judgements=picks.filter(source="popular"))


def test_the_summary_counts_what_it_averages() -> None:
    found = summary()
    popular, sft = found["selectors"]["popular"], found["selectors"]["sft"]
    assert list(popular) == [metric.key for metric in METRICS if metric.group != "judge"]
    assert popular["unified"] == {"mean": 2.0, "low": None, "high": None, "n": 1}
    assert (sft["unified"]["mean"], sft["unified"]["n"]) == (-4.75, 2)
    assert (sft["clip"]["mean"], sft["clip"]["n"]) == (0.5, 1)
    assert (sft["hallucinated"]["mean"], sft["model"]["mean"]) == (0.5, 0.0)
    assert found["hallucinations"]["sft"]["not-json"]["count"] == 1
    assert found["hallucinations"]["popular"]["not-json"]["count"] == 0
    (pair,) = found["comparisons"]
    assert (pair["selector"], pair["reference"]) == ("sft", "popular")
    # Prompt 2 has no picture of the reference, so one pair is left: 0.5 against 2.
    assert (pair["difference"]["mean"], pair["difference"]["n"]) == (-1.5, 1)
    assert (pair["win_rate"]["mean"], pair["win_rate"]["n"]) == (0.0, 1)


def test_the_reference_is_the_best_untrained_selector() -> None:
    config = EvaluationConfig(selectors=("random", "popular", "sft", "rrhf"), num_prompts=3)
    means = {"random": 0.1, "popular": 0.4, "sft": 2.0, "rrhf": 2.5}
    columns = dict.fromkeys(EVALUATION.names, 0.0)
    made = [
        columns | {"selector": name, "prompt_id": i, "reason": None, "unified": mean + i}
        for name, mean in means.items()
        for i in range(3)
    ]
    table = pl.DataFrame(made, schema_overrides={"reason": pl.String})
    found = summarise(table, config)
    assert found["reference"] == "popular"
    pairs = [(p["selector"], p["reference"]) for p in found["comparisons"]]
    assert pairs == [
        ("random", "popular"),
        ("sft", "popular"),
        ("rrhf", "popular"),
        ("rrhf", "sft"),
    ]
    assert found["comparisons"][-1]["difference"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 3}
    assert found["comparisons"][-1]["win_rate"]["mean"] == 1.0


def test_tables_for_people() -> None:
    found = tables(summary())
    assert set(found) == {"selectors", "comparisons", "agreement", "hallucinations"}
    assert [row["selector"] for row in found["selectors"]] == ["popular", "sft"]
    assert found["selectors"][1]["hallucinated"].startswith("50.0 % [0.0, 100.0]")
    (kind,) = found["hallucinations"]
    assert (kind["selector"], kind["kind"], kind["answers"]) == ("sft", "not-json", 1)
    lines = markdown_table([{"a": "x|y", "b": 1}]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| x\\|y | 1 |"]


@pytest.mark.parametrize(
    ("numbers", "kind", "text"),
    [
        ((0.5, 0.25, 0.75), "rate", "50.0 % [25.0, 75.0]"),
        ((-1.25, -2.0, 0.0), "score", "-1.250 [-2.000, 0.000]"),
        ((1.0, None, None), "score", "1.000"),
        ((None, None, None), "rate", "–"),
    ],
)
def test_numbers_for_people(numbers: tuple[Any, ...], kind: str, text: str) -> None:
    assert format_number(dict(zip(("mean", "low", "high"), numbers, strict=True)), kind) == text
