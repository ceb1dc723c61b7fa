"""From the evaluation table to the numbers that are reported, and to tables of text."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import polars as pl

from diffagent.evaluation.bootstrap import Array, Interval, bootstrap_intervals, wins
from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.evaluation.metrics import METRICS, Metric
from diffagent.schemas.tables import TRUNCATED
from diffagent.store import Artifact

#: What each selector does, for people.
SELECTORS = {
    "popular": "most popular model",
    "random": "random valid API",
    "nearest": "nearest neighbour",
    "neighbours": "votes of neighbours",
    "bm25": "votes by BM25",
    "embeddings": "votes by sentence embeddings",
    "cards": "model cards",
    "card-embeddings": "model cards, embedded",
    "model-token": "a token a model",
    "combined": "votes, statistics and cards",
    "sft": "DiffAgent, SFT",
    "rrhf": "DiffAgent, SFT + RRHF",
    "reranked": "retrieved, chosen by RRHF",
}

#: Selectors without a language model. The best of them is what an agent has to beat.
BASELINES = tuple(name for name in SELECTORS if name not in ("sft", "rrhf", "reranked"))

#: Name of a column -> its values by prompt, and whether it is a rate.
_Columns = dict[tuple[str, ...], tuple[Array, bool]]
Metrics = dict[str, Any]


def summarise(table: pl.DataFrame, config: EvaluationConfig) -> Metrics:
    """Means, intervals and paired comparisons of an evaluation table.

    Args:
        table: rows of EVALUATION, every selector over the same prompts.
        config: selectors in the order to report them, and the bootstrap.

    Returns:
        ``selectors``: selector -> metric -> {mean, low, high, n}; ``hallucinations``: selector
        -> kind -> {count, mean, low, high, n}; ``reference``: the baseline with the highest
        mean unified score; ``comparisons``: unified score of a selector minus that of another
        on the same prompts, and its win rate with ties counted half. Numbers are rounded to six
        decimals, None where there is nothing to average.
    """
    rows: dict[str, pl.DataFrame] = {
        name: table.filter(pl.col("selector") == name).sort("prompt_id")
        for name in config.selectors
    }
    kinds = sorted(set(table["reason"].drop_nulls()) - {TRUNCATED})
    asked = [m for m in METRICS if m.group != "judge" or table[m.key].drop_nulls().len()]
    reference = best_baseline(rows)
    columns: _Columns = {}
    for name, frame in rows.items():
        for metric in asked:
            columns["metric", name, metric.key] = _floats(frame[metric.key]), metric.kind == "rate"
        for kind in kinds:
            hits = frame.select((pl.col("reason") == kind).fill_null(False)).to_series()
            columns["kind", name, kind] = _floats(hits), True
    pairs = _pairs(tuple(rows), reference)
    for a, b in pairs:
        mine, theirs = _floats(rows[a]["unified"]), _floats(rows[b]["unified"])
        columns["difference", a, b] = mine - theirs, False
        columns["wins", a, b] = wins(mine, theirs), True
    intervals = _intervals(columns, config)
    return {
        "selectors": {
            name: {m.key: _numbers(intervals["metric", name, m.key]) for m in asked}
            for name in rows
        },
        "hallucinations": {
            name: {
                kind: {"count": round(i.mean * i.n), **_numbers(i)}
                for kind in kinds
                if (i := intervals["kind", name, kind])
            }
            for name in rows
        },
        "reference": reference,
        "comparisons": [
            {
                "selector": a,
                "reference": b,
                "difference": _numbers(intervals["difference", a, b]),
                "win_rate": _numbers(intervals["wins", a, b]),
            }
            for a, b in pairs
        ],
    }


def best_baseline(rows: dict[str, pl.DataFrame]) -> str:
    """The baseline with the highest mean unified score; the first one of all if none."""
    names = [name for name in rows if name in BASELINES] or list(rows)[:1]
    means = {name: rows[name]["unified"].mean() for name in names}
    scored = {name: mean for name, mean in means.items() if isinstance(mean, float)}
    return max(scored, key=lambda name: scored[name]) if scored else names[0]


def _pairs(names: tuple[str, ...], reference: str) -> list[tuple[str, str]]:
    """Everything against the best baseline, and what alignment added to fine-tuning."""
    pairs = [(name, reference) for name in names if name != reference]
    if {"sft", "rrhf"} <= set(names) and ("rrhf", "sft") not in pairs:
        pairs.append(("rrhf", "sft"))
    return pairs


def _intervals(columns: _Columns, config: EvaluationConfig) -> dict[tuple[str, ...], Interval]:
    values = np.stack([column for column, _ in columns.values()], axis=1)
    found = bootstrap_intervals(
        values,
        rates=[rate for _, rate in columns.values()],
        samples=config.bootstrap_samples,
        confidence=config.confidence,
        seed=config.seed,
    )
    return dict(zip(columns, found, strict=True))


def _floats(series: pl.Series) -> Array:
    """(n,) float64 with NaN for null."""
    values: Array = series.cast(pl.Float64).fill_null(math.nan).to_numpy()
    return values


def _numbers(interval: Interval) -> dict[str, float | int | None]:
    def tidy(value: float) -> float | None:
        return round(value, 6) + 0.0 if math.isfinite(value) else None  # no -0.0

    return {
        "mean": tidy(interval.mean),
        "low": tidy(interval.low),
        "high": tidy(interval.high),
        "n": interval.n,
    }


def reported(metrics: Metrics) -> list[Metric]:
    """The metrics of an evaluation: those of held-out judges only where they were asked."""
    numbers = next(iter(metrics["selectors"].values()))
    return [metric for metric in METRICS if metric.key in numbers]


def read_metrics(evaluation: Artifact) -> Metrics:
    """The numbers of an ``evaluate`` artefact."""
    metrics: Metrics = json.loads(evaluation.file("metrics.json").read_text(encoding="utf-8"))
    return metrics


def format_number(numbers: dict[str, Any], kind: str = "score") -> str:
    """'0.412 [0.36, 0.46]', rates in percent; a dash where there is nothing."""
    if numbers["mean"] is None:
        return "–"
    scale, digits, unit = (100, 1, " %") if kind == "rate" else (1, 3, "")
    text = f"{scale * numbers['mean']:.{digits}f}{unit}"
    return f"{text} {limits}" if (limits := format_limits(numbers, kind)) else text


def format_limits(numbers: dict[str, Any], kind: str = "score") -> str:
    """'[0.361, 0.463]', rates in percent; nothing where there are no limits."""
    if numbers["low"] is None:
        return ""
    scale, digits = (100, 1) if kind == "rate" else (1, 3)
    return f"[{scale * numbers['low']:.{digits}f}, {scale * numbers['high']:.{digits}f}]"


def tables(metrics: Metrics) -> dict[str, list[dict[str, Any]]]:
    """The report's tables as rows of text: ``selectors``, ``comparisons``, ``agreement``,
    ``hallucinations``.
    """
    found = reported(metrics)
    groups = {
        "selectors": ("reward", "judge", "validity", "selection"),
        "agreement": ("parameter",),
    }
    result: dict[str, list[dict[str, Any]]] = {
        title: [
            {"selector": name}
            | {m.label: format_number(numbers[m.key], m.kind) for m in found if m.group in wanted}
            for name, numbers in metrics["selectors"].items()
        ]
        for title, wanted in groups.items()
    }
    result["comparisons"] = [
        {
            "selector": pair["selector"],
            "against": pair["reference"],
            "difference of unified": format_number(pair["difference"]),
            "win rate": format_number(pair["win_rate"], "rate"),
            "prompts": pair["difference"]["n"],
        }
        for pair in metrics["comparisons"]
    ]
    result["hallucinations"] = [
        {"selector": name, "kind": kind, "answers": numbers["count"]}
        | {"rate": format_number(numbers, "rate")}
        for name, kinds in metrics["hallucinations"].items()
        for kind, numbers in kinds.items()
        if numbers["count"]
    ] or [{"selector": "all", "kind": "none", "answers": 0, "rate": "–"}]
    return result


def summary_markdown(metrics: Metrics) -> str:
    """The evaluation on one screen, for a dashboard or a terminal."""
    run = metrics["run"]
    parts = [
        f"# Evaluation on {run['num_prompts']} held-out prompts ({run['split']})",
        *([f"**{run['note']}**"] if run["note"] else []),
        f"Mean and {run['bootstrap']['confidence']:.0%} bootstrap interval over prompts.",
    ]
    found = tables(metrics)
    for title in ("selectors", "comparisons", "hallucinations", "agreement"):
        parts += [f"## {title.capitalize()}", markdown_table(found[title])]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows with equal keys as a Markdown table."""
    if not rows:
        return ""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([str(v) for v in row.values()] for row in rows),
    ]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
