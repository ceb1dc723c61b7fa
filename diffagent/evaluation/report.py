"""The report of an evaluation: one HTML file with numbers and pictures."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from diffagent.agent.verify import KINDS
from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.evaluation.run_tables import RunTables
from diffagent.evaluation.summary import (
    SELECTORS,
    Metrics,
    format_limits,
    format_number,
    reported,
)
from diffagent.schemas.api import T2IAPI, parse_api
from diffagent.schemas.tables import TRUNCATED
from diffagent.store import (
    Artifact,
    StageContext,
)

#: Pictures are shown at most this wide; larger ones are embedded as JPEG of this size.
_SHOWN_PIXELS = 384


@dataclass(frozen=True)
class Answer:
    """One selector's cell in the row of a prompt."""

    selector: str
    label: str
    model: str = ""
    version: str = ""
    settings: str = ""
    negative_prompt: str = ""
    picture: str = ""  # a data: URI; empty where there is none
    problem: str = ""  # why there is no picture
    text: str = ""  # an invalid answer, verbatim
    unified: float | None = None


@dataclass(frozen=True)
class Shown:
    """One prompt of the report, with what DABench says a person used."""

    prompt_id: int
    prompt: str
    truth: Answer
    answers: tuple[Answer, ...]


def shown_prompts(
    config: EvaluationConfig, context: StageContext, tables: RunTables, table: pl.DataFrame
) -> list[Shown]:
    """Prompts drawn at random (so not chosen for their looks), each with every answer."""
    ids = sorted(set(tables.candidates["prompt_id"]))
    chosen = sorted(random.Random(config.seed).sample(ids, min(config.report_prompts, len(ids))))
    renders, each = context.many("renders"), config.num_shards
    folders = {n: renders[i * each : (i + 1) * each] for i, n in enumerate(config.selectors)}
    answers = _by_key(tables.candidates, chosen)
    first = tables.renders.sort("seed").unique(["source", "prompt_id"], keep="first")
    pictures = _by_key(first, chosen)
    unified = _by_key(table.rename({"selector": "source"}), chosen)
    truths = {r["id"]: r for r in tables.dabench.filter(pl.col("id").is_in(chosen)).to_dicts()}
    return [
        Shown(
            prompt_id=prompt,
            prompt=truths[prompt]["prompt"],
            truth=_describe_api("dabench", parse_api(truths[prompt]["api"])),
            answers=tuple(
                _answer(
                    name,
                    answers[name, prompt],
                    pictures[name, prompt],
                    unified[name, prompt]["unified"],
                    folders[name],
                )
                for name in config.selectors
            ),
        )
        for prompt in chosen
    ]


def _by_key(table: pl.DataFrame, prompts: list[int]) -> dict[tuple[str, int], dict[str, Any]]:
    rows = table.filter(pl.col("prompt_id").is_in(prompts)).to_dicts()
    return {(row["source"], row["prompt_id"]): row for row in rows}


def _answer(
    selector: str,
    candidate: Mapping[str, Any],
    render: Mapping[str, Any],
    unified: float | None,
    folders: Sequence[Artifact],
) -> Answer:
    if candidate["status"] != "valid":
        return Answer(
            selector,
            SELECTORS[selector],
            problem=_invalid(candidate["reason"]),
            text=_shorten(candidate["text"], 300),
            unified=unified,
        )
    picture = problem = ""
    if render["status"] == "ok":
        name = f"images/{render['recipe']}.png"
        folder = next((a for a in folders if (a.path / name).exists()), folders[0])
        picture = picture_uri(folder.file(name))
    else:
        problem = f"render {render['status']}: {render['reason'] or 'unknown'}"
    return _describe_api(
        selector, parse_api(candidate["api"]), picture=picture, problem=problem, unified=unified
    )


def _invalid(reason: str | None) -> str:
    return "truncated" if reason == TRUNCATED else f"invalid: {reason or 'unknown'}"


def _describe_api(selector: str, api: T2IAPI, **shown: Any) -> Answer:
    params = api.params
    parts = [
        params.sampler,
        f"{params.steps}\N{NO-BREAK SPACE}steps",
        f"CFG\N{NO-BREAK SPACE}{params.cfg_scale:g}",
        f"{params.width}×{params.height}",
        *([f"CLIP skip {params.clip_skip}"] if params.clip_skip > 1 else []),
        *(f"LoRA {lora.model} ({lora.weight:g})" for lora in api.loras),
    ]
    return Answer(
        selector,
        SELECTORS.get(selector, "DABench"),
        model=api.model,
        version=api.version,
        settings=" · ".join(parts),
        negative_prompt=_shorten(api.negative_prompt, 120),
        **shown,
    )


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def picture_uri(path: Path) -> str:
    """A picture as a data: URI; one wider or higher than is shown becomes a smaller JPEG."""
    from PIL import Image

    with Image.open(path) as image:
        if max(image.size) <= _SHOWN_PIXELS:
            kind, data = "png", path.read_bytes()
        else:
            image.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=88)
            kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def render_report(
    metrics: Metrics, latency: Mapping[str, Mapping[str, float]], shown: Sequence[Shown]
) -> str:
    """The report as one HTML file that needs nothing else: no script, no network.

    Args:
        metrics: what ``metrics.json`` holds.
        latency: selector -> statistic -> seconds per prompt.
        shown: prompts with their pictures.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # prompts and model names are what strangers wrote
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        run=metrics["run"],
        metrics=metrics,
        latency=latency,
        shown=shown,
        columns=reported(metrics),
        selectors=SELECTORS,
        kinds=KINDS,
        best=_best(metrics),
        forest=_forest(metrics),
        number=format_number,
        limits=format_limits,
    )


def _best(metrics: Metrics) -> dict[str, float | None]:
    """Best mean of each metric over the selectors."""
    result: dict[str, float | None] = {}
    for metric in reported(metrics):
        means = [numbers[metric.key]["mean"] for numbers in metrics["selectors"].values()]
        found = [mean for mean in means if mean is not None]
        pick = max if metric.better == "higher" else min
        result[metric.key] = pick(found) if len(set(found)) > 1 else None
    return result


def _forest(metrics: Metrics) -> list[dict[str, Any]]:
    """Differences against the best baseline placed on a common scale of 0 to 100."""
    pairs = [p for p in metrics["comparisons"] if p["difference"]["low"] is not None]
    ends = [0.0, *(p["difference"][end] for p in pairs for end in ("low", "high"))]
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> str:
        return f"{4 + 92 * (value - low) / span:.2f}"

    return [
        {
            **pair,
            "zero": place(0.0),
            "at": place(pair["difference"]["mean"]),
            "from": place(pair["difference"]["low"]),
            "to": place(pair["difference"]["high"]),
        }
        for pair in pairs
    ]
