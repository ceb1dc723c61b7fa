"""One row a (selector, prompt): rewards, validity, and agreement with DABench.

Every metric is a column of numbers over prompts, so that all of them are averaged, resampled
and paired in the same way (``diffagent.evaluation.bootstrap``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from diffagent.errors import SchemaError
from diffagent.schemas.api import T2IAPI, parse_api
from diffagent.schemas.tables import EVALUATION, TRUNCATED


@dataclass(frozen=True)
class Metric:
    """A column of the evaluation table."""

    key: str
    label: str
    kind: Literal["score", "rate"]
    group: Literal["reward", "judge", "validity", "selection", "parameter"]
    meaning: str
    better: Literal["higher", "lower"] = "higher"


METRICS: tuple[Metric, ...] = (
    Metric(
        "unified",
        "unified score",
        "score",
        "reward",
        "the rewards as one number; a hallucination gets the floor",
    ),
    Metric("unified_valid", "unified score, valid answers", "score", "reward", "without the floor"),
    Metric("clip", "CLIP score", "score", "reward", "prompts with a picture only"),
    Metric("image_reward", "ImageReward", "score", "reward", "prompts with a picture only"),
    Metric("hps_v2", "HPS v2", "score", "reward", "prompts with a picture only"),
    Metric("pick_score", "PickScore", "score", "judge", "held out: no agent was trained on it"),
    Metric("aesthetic", "aesthetic", "score", "judge", "held out: no agent was trained on it"),
    Metric(
        "hallucinated",
        "hallucinated",
        "rate",
        "validity",
        "answers that are no call of the catalogue",
        better="lower",
    ),
    Metric(
        "truncated",
        "truncated",
        "rate",
        "validity",
        "answers that max_new_tokens cut; they have no picture and no score",
        better="lower",
    ),
    Metric(
        "render_failed",
        "render failed",
        "rate",
        "validity",
        "valid answers without a picture",
        better="lower",
    ),
    Metric("model", "model", "rate", "selection", "equal"),
    Metric("model_version", "model and version", "rate", "selection", "both equal"),
    Metric("sampler", "sampler", "rate", "parameter", "equal"),
    Metric("steps", "steps", "rate", "parameter", "within 20 %"),
    Metric("cfg_scale", "CFG scale", "rate", "parameter", "within 1"),
    Metric("size", "size", "rate", "parameter", "width and height equal"),
    Metric("clip_skip", "CLIP skip", "rate", "parameter", "equal"),
    Metric("loras", "LoRAs", "rate", "parameter", "same set of models and versions"),
    Metric("negative_prompt", "negative prompt", "rate", "parameter", "equal"),
    Metric(
        "negative_prompt_overlap",
        "negative prompt, overlap",
        "score",
        "parameter",
        "Jaccard index of the comma-separated parts",
    ),
)
BY_KEY = {metric.key: metric for metric in METRICS}
_REWARDS = ("unified", "clip", "image_reward", "hps_v2")
_JUDGES = tuple(m.key for m in METRICS if m.group == "judge")
_AGREEMENT = tuple(m.key for m in METRICS if m.group in ("selection", "parameter"))


def agreement(api: T2IAPI | None, truth: T2IAPI) -> dict[str, float]:
    """How far an answer agrees with DABench's API for the prompt.

    Args:
        api: the answer; None when it is invalid, which agrees in nothing.
        truth: what a person used, by DABench.

    Returns:
        Metric key -> 1.0 or 0.0 (a fraction for ``negative_prompt_overlap``).
    """
    if api is None:
        return dict.fromkeys(_AGREEMENT, 0.0)
    mine, theirs = api.params, truth.params
    same: dict[str, bool | float] = {
        "model": api.model == truth.model,
        "model_version": (api.model, api.version) == (truth.model, truth.version),
        "sampler": mine.sampler == theirs.sampler,
        "steps": 5 * abs(mine.steps - theirs.steps) <= theirs.steps,
        "cfg_scale": abs(mine.cfg_scale - theirs.cfg_scale) <= 1 + 1e-9,  # 7.3 and 8.3 differ by 1
        "size": (mine.width, mine.height) == (theirs.width, theirs.height),
        "clip_skip": mine.clip_skip == theirs.clip_skip,
        "loras": _lora_set(api) == _lora_set(truth),
        "negative_prompt": api.negative_prompt.strip() == truth.negative_prompt.strip(),
        "negative_prompt_overlap": jaccard(_parts(api), _parts(truth)),
    }
    return {key: float(value) for key, value in same.items()}


def jaccard(a: set[str], b: set[str]) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def _lora_set(api: T2IAPI) -> set[tuple[str, str]]:
    return {(lora.model, lora.version) for lora in api.loras}


def _parts(api: T2IAPI) -> set[str]:
    parts = (part.strip().lower() for part in api.negative_prompt.split(","))
    return {part for part in parts if part}


def evaluation_table(
    candidates: pl.DataFrame,
    renders: pl.DataFrame,
    scores: pl.DataFrame,
    dabench: pl.DataFrame,
    judgements: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Judge every answer.

    Args:
        candidates: `CandidateRow`, one a (selector, prompt); ``source`` is the selector.
        renders: `RenderRow` for them, one a seed.
        scores: `ScoreRow` for them, one a seed.
        dabench: `PairRow` that hold the prompts.
        judgements: `JudgementRow` for them, one a seed; None: no judge was asked.

    Returns:
        EVALUATION, sorted by selector and prompt.

    Raises:
        SchemaError: the selectors answered different prompts, a prompt is not in DABench, or an
            answer has no render or no score.
    """
    _check_paired(candidates)
    answers = candidates.join(
        dabench.select("id", truth="api"), left_on="prompt_id", right_on="id", how="left"
    )
    if answers["truth"].null_count():
        missing = answers.filter(pl.col("truth").is_null())["prompt_id"][0]
        raise SchemaError(f"prompt {missing} is not in the data set it is evaluated on", field="id")
    key = ["source", "prompt_id"]
    table = (
        pl.concat(
            [answers.select(*key, "reason", "status"), _agreements(answers)], how="horizontal"
        )
        .join(_means(scores, _REWARDS, "scored"), on=key, how="left", validate="1:1")
        .join(_judged(judgements, scores), on=key, how="left", validate="1:1")
        .join(_failures(renders), on=key, how="left", validate="1:1")
    )
    for column, done in (("scored", "scored"), ("judged", "judged"), ("failed", "rendered")):
        if table[column].null_count():
            row = table.filter(pl.col(column).is_null()).row(0, named=True)
            raise SchemaError(
                f"the answer of {row['source']!r} to prompt {row['prompt_id']} was never "
                f"{done}; the inputs belong to different runs",
                field="prompt_id",
            )
    invalid = pl.col("status") != "valid"
    truncated = invalid & (pl.col("reason") == TRUNCATED).fill_null(False)
    return (
        table.with_columns(
            selector="source",
            reason=pl.when(invalid).then(pl.col("reason").fill_null("unknown")),
            hallucinated=(invalid & ~truncated).cast(pl.Float64),
            truncated=truncated.cast(pl.Float64),
            unified_valid=pl.when(~invalid).then(pl.col("unified")),
            render_failed=pl.when(~invalid).then(pl.col("failed")),
        )
        .select(EVALUATION.names)
        .sort("selector", "prompt_id")
    )


def _check_paired(candidates: pl.DataFrame) -> None:
    """Differences are paired per prompt: every selector must answer each prompt once."""
    prompts: set[int] | None = None
    for (source,), rows in candidates.group_by(["source"], maintain_order=True):
        ids = set(rows["prompt_id"])
        if len(ids) != rows.height:
            raise SchemaError(f"{source!r} answers a prompt more than once", field="prompt_id")
        if prompts is not None and ids != prompts:
            raise SchemaError(
                f"{source!r} answers {len(ids)} prompts, {len(ids ^ prompts)} of them not those "
                "of the other selectors; select with the same split, num_prompts and seed",
                field="prompt_id",
            )
        prompts = ids


def _agreements(answers: pl.DataFrame) -> pl.DataFrame:
    def rows() -> Iterable[dict[str, float]]:
        for status, api, truth in answers.select("status", "api", "truth").iter_rows():
            valid = status == "valid"
            yield agreement(parse_api(api) if valid else None, parse_api(truth))

    return pl.DataFrame(list(rows()), schema=dict.fromkeys(_AGREEMENT, pl.Float64))


def _means(scores: pl.DataFrame, columns: Sequence[str], count: str) -> pl.DataFrame:
    """Means over the seeds of each answer, null where no seed gave a picture; and their number."""
    means = [pl.col(name).mean() for name in columns]
    return scores.group_by("source", "prompt_id").agg(*means, pl.len().alias(count))


def _judged(judgements: pl.DataFrame | None, scores: pl.DataFrame) -> pl.DataFrame:
    """What the judges say of each answer: nothing of any when none was asked."""
    if judgements is None:
        unasked = [pl.lit(None, pl.Float64).alias(name) for name in _JUDGES]
        judgements = scores.select("source", "prompt_id", *unasked)
    return _means(judgements, _JUDGES, "judged")


def _failures(renders: pl.DataFrame) -> pl.DataFrame:
    """Fraction of an answer's seeds that gave no picture."""
    failed = (pl.col("status") != "ok").mean()
    return renders.group_by("source", "prompt_id").agg(failed=failed)
