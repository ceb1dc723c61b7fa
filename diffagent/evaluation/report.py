"""The stage ``evaluate``: the numbers, the table behind them, and a report to look at."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
import pyarrow.parquet as pq

from diffagent.agent.verify import KINDS
from diffagent.errors import ArtifactError
from diffagent.evaluation.metrics import evaluation_table
from diffagent.evaluation.summary import (
    SELECTORS,
    Metrics,
    format_limits,
    format_number,
    read_metrics,
    reported,
    summarise,
    summary_markdown,
    tables,
)
from diffagent.rewards.scores import read_scores
from diffagent.schemas.api import T2IAPI, parse_api
from diffagent.schemas.config import EvaluationConfig
from diffagent.schemas.manifest import Manifest
from diffagent.schemas.tables import (
    CANDIDATE_TABLE,
    EVALUATION,
    JUDGEMENT_TABLE,
    RENDER_TABLE,
    TRUNCATED,
)
from diffagent.store.artifacts import (
    Artifact,
    StageContext,
    StageResult,
    canonical_json,
    sha256_file,
    stage,
)
from diffagent.store.lineage import ancestors

__all__ = ["evaluate", "read_metrics", "render_report", "summary_markdown", "tables"]

SANDBOX_NOTE = (
    "sandbox: tiny models trained on drawn shapes; the numbers say nothing about natural pictures"
)
SANDBOX_AGENT_NOTE = (
    "sandbox agent: a tiny language model that has read nothing but this data set; the numbers "
    "say nothing about a real one"
)
#: Pictures are shown at most this wide; larger ones are embedded as JPEG of this size.
_SHOWN_PIXELS = 384


@stage("evaluate", version=3, config=EvaluationConfig)
def evaluate(config: EvaluationConfig, context: StageContext) -> StageResult:
    """Compare selectors on the same held-out prompts.

    Inputs are ``dabench``, ``candidates``, one a selector in the order of ``config.selectors``,
    and of their parts the ``renders``, ``scores`` and, where held-out judges were asked,
    ``judgements``. Writes metrics.json (every number with its n and interval), table.parquet
    (EVALUATION) and report.html. Latencies are in the manifest's
    metrics and in the report only: the content digest is that of the other two files, so the
    same answers give the same artefact however long they took.

    Raises:
        ArtifactError: the inputs are not those of the selectors.
        SchemaError: the inputs do not belong together.
        ScoreError: the selectors were scored by different scorers.
    """
    read = _Tables(
        candidates=CANDIDATE_TABLE.read_frame(
            [artifact.file("candidates.parquet") for artifact in context.many("candidates")]
        ),
        renders=RENDER_TABLE.read_frame(
            [artifact.file("renders.parquet") for artifact in context.many("renders")]
        ),
        scores=read_scores(context.many("scores")),
        dabench=_read_split(context.one("dabench"), config.split),
        judgements=read_scores(context.many("judgements"), "judgements.parquet", JUDGEMENT_TABLE)
        if context.inputs.get("judgements")
        else None,
    )
    _check_selectors(config, read.candidates)
    table = evaluation_table(
        read.candidates, read.renders, read.scores, read.dabench, read.judgements
    )
    metrics = {"run": _describe_run(config, context, read), **summarise(table, config)}
    latency: dict[str, dict[str, float]] = {
        name: _latency(artifact)
        for name, artifact in zip(config.selectors, context.many("candidates"), strict=True)
    }
    numbers, rows = context.out / "metrics.json", context.out / "table.parquet"
    numbers.write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    pq.write_table(table.to_arrow().cast(EVALUATION), rows, compression="zstd")
    shown = _shown_prompts(config, context, read, table)
    (context.out / "report.html").write_text(
        render_report(metrics, latency, shown), encoding="utf-8"
    )
    return StageResult(
        rows={"table": table.height, "prompts": metrics["run"]["num_prompts"]},
        metrics={
            "latency": latency,
            "unified": {n: m["unified"]["mean"] for n, m in metrics["selectors"].items()},
            "hallucinated": {n: m["hallucinated"]["mean"] for n, m in metrics["selectors"].items()},
            "truncated": {n: m["truncated"]["mean"] for n, m in metrics["selectors"].items()},
        },
        content_digest=hashlib.sha256(
            canonical_json([sha256_file(numbers), sha256_file(rows)])
        ).hexdigest(),
    )


@dataclass(frozen=True)
class _Tables:
    """The tables of all selectors together, and DABench's rows of the split."""

    candidates: pl.DataFrame
    renders: pl.DataFrame
    scores: pl.DataFrame
    dabench: pl.DataFrame
    judgements: pl.DataFrame | None


def _read_split(dabench: Artifact, split: str) -> pl.DataFrame:
    files = dabench.glob(f"data/{split}-*.parquet")
    if not files:
        raise ArtifactError(f"{str(dabench.path)!r} has no split {split!r}")
    return pl.concat([pl.read_parquet(file) for file in files])


def _check_selectors(config: EvaluationConfig, candidates: pl.DataFrame) -> None:
    found = set(candidates["source"])
    if found != set(config.selectors):
        raise ArtifactError(
            f"the candidates are of {sorted(found)}, the evaluation is of "
            f"{sorted(config.selectors)}; run the stage 'select' for each of them"
        )


def _describe_run(config: EvaluationConfig, context: StageContext, read: _Tables) -> dict[str, Any]:
    """What was compared, on what, judged by what: nothing here depends on time or machine."""
    dabench, judged = context.one("dabench"), context.many("scores")[0].manifest
    agents = {
        name: ref.content_digest
        for name, artifact in zip(config.selectors, context.many("candidates"), strict=True)
        for ref in artifact.manifest.inputs.get("agent", ())
    }
    return {
        "split": config.split,
        "num_prompts": read.candidates["prompt_id"].n_unique(),
        "prompt_seed": config.seed,
        "dataset": {"identity": dabench.identity, "content_digest": dabench.content_digest},
        "agents": agents,
        "picture_seeds": context.many("renders")[0].manifest.config.get("seeds", []),
        "scorers": judged.config.get("scorers", []),
        "scorer_versions": _versions(judged),
        "judges": {
            name: version
            for artifact in context.inputs.get("judgements", ())[:1]
            for name, version in _versions(artifact.manifest).items()
        },
        "unify": judged.config.get("unify"),
        "invalid_floor": judged.config.get("invalid_floor"),
        "inputs": {
            name: [artifact.content_digest for artifact in context.many(name)]
            for name in ("candidates", "renders", "scores", "judgements")
            if context.inputs.get(name)
        },
        "bootstrap": {
            "samples": config.bootstrap_samples,
            "confidence": config.confidence,
            "seed": config.seed,
        },
        "sandbox_note": _sandbox_note(context),
    }


def _versions(scored: Manifest) -> dict[str, str]:
    """Scorer -> version and digest, of an artefact of ``score`` or ``judge``."""
    return {
        name: f"{scorer['version']}, digest {scorer['digest'][:16]}"
        for name, scorer in scored.metrics.get("scorers", {}).items()
    }


def _sandbox_note(context: StageContext) -> str:
    """A plain warning when what was compared or what judged it is of the embedded world."""
    configs = [
        ancestor.manifest.config
        for artifact in (*context.many("scores"), *context.many("candidates"))
        for ancestor in ancestors(artifact)
    ]
    scorers = [scorer for config in configs for scorer in config.get("scorers", ())]
    named = [config.get("site") for config in configs]
    named += [scorer.get(key) for scorer in scorers for key in ("model", "weights")]
    if any(str(name).startswith("sandbox") for name in named):
        return SANDBOX_NOTE
    # Only the stage 'sft' has a model of its own in its config.
    if any(str(config.get("model")).startswith("sandbox") for config in configs):
        return SANDBOX_AGENT_NOTE
    return ""


def _latency(candidates: Artifact) -> dict[str, float]:
    """Seconds per prompt of a selector, as its ``select`` stage measured them."""
    found = candidates.manifest.metrics.get("latency_seconds", {})
    return {key: float(value) for key, value in found.items()}


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


def _shown_prompts(
    config: EvaluationConfig, context: StageContext, read: _Tables, table: pl.DataFrame
) -> list[Shown]:
    """Prompts drawn at random (so not chosen for their looks), each with every answer."""
    ids = sorted(set(read.candidates["prompt_id"]))
    chosen = sorted(random.Random(config.seed).sample(ids, min(config.report_prompts, len(ids))))
    renders, each = context.many("renders"), config.num_shards
    folders = {n: renders[i * each : (i + 1) * each] for i, n in enumerate(config.selectors)}
    answers = _by_key(read.candidates, chosen)
    first = read.renders.sort("seed").unique(["source", "prompt_id"], keep="first")
    pictures = _by_key(first, chosen)
    unified = _by_key(table.rename({"selector": "source"}), chosen)
    truths = {r["id"]: r for r in read.dabench.filter(pl.col("id").is_in(chosen)).to_dicts()}
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
