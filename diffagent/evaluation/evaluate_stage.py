"""The stage ``evaluate``: compares selectors and writes metrics, their table and a report."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow.parquet as pq

from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.evaluation.metrics import evaluation_table
from diffagent.evaluation.report import render_report, shown_prompts
from diffagent.evaluation.run_tables import RunTables, read_run_tables
from diffagent.evaluation.summary import summarise
from diffagent.schemas.manifest import Manifest
from diffagent.schemas.tables import EVALUATION
from diffagent.store import Artifact, StageContext, StageResult, canonical_json, sha256_file, stage
from diffagent.store.lineage import ancestors

#: Added to the note of an evaluation that includes an agent built from random weights.
TINY_AGENT_NOTE = (
    "An agent here is a tiny language model that was trained from random weights on this dataset "
    "only; its numbers state nothing about a pretrained one."
)


@stage("evaluate", version=3, config=EvaluationConfig)
def evaluate(config: EvaluationConfig, context: StageContext) -> StageResult:
    """Compare selectors on the same held-out prompts.

    Inputs: ``dabench``; ``candidates``, one artifact per selector in the order of
    ``config.selectors``; ``renders``, ``scores`` and, with held-out judges, ``judgements`` of their
    parts. Files: metrics.json (every number with its n and interval), table.parquet (EVALUATION)
    and report.html.

    Latencies are only in the manifest's metrics and in the report. The content digest covers the
    other two files, so the same answers give the same artifact however long they took.

    Raises:
        ArtifactError: the inputs are not those of the selectors.
        SchemaError: the inputs do not belong together.
        ScoreError: the selectors were scored by different scorers.
    """
    tables = read_run_tables(config, context)
    table = evaluation_table(
        tables.candidates, tables.renders, tables.scores, tables.dabench, tables.judgements
    )
    metrics = {"run": _describe_run(config, context, tables), **summarise(table, config)}
    latency: dict[str, dict[str, float]] = {
        name: _latency(artifact)
        for name, artifact in zip(config.selectors, context.many("candidates"), strict=True)
    }
    numbers, rows = context.out / "metrics.json", context.out / "table.parquet"
    numbers.write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    pq.write_table(table.to_arrow().cast(EVALUATION), rows, compression="zstd")
    shown = shown_prompts(config, context, tables, table)
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


def _describe_run(
    config: EvaluationConfig, context: StageContext, tables: RunTables
) -> dict[str, Any]:
    """Describe the compared selectors, the data and the scorers; no time, no machine."""
    dabench, judged = context.one("dabench"), context.many("scores")[0].manifest
    agents = {
        name: ref.content_digest
        for name, artifact in zip(config.selectors, context.many("candidates"), strict=True)
        for ref in artifact.manifest.inputs.get("agent", ())
    }
    return {
        "split": config.split,
        "num_prompts": tables.candidates["prompt_id"].n_unique(),
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
        "note": _note(config, context),
    }


def _versions(scored: Manifest) -> dict[str, str]:
    """Scorer -> version and digest, of an artefact of ``score`` or ``judge``."""
    return {
        name: f"{scorer['version']}, digest {scorer['digest'][:16]}"
        for name, scorer in scored.metrics.get("scorers", {}).items()
    }


def _note(config: EvaluationConfig, context: StageContext) -> str:
    """Returns the config's note, or a warning when an agent was built from random weights."""
    models = [
        ancestor.manifest.config.get("model")
        for artifact in context.many("candidates")
        for ancestor in ancestors(artifact)
        if ancestor.stage == "sft"
    ]
    return config.note or (TINY_AGENT_NOTE if "tiny-llama" in models else "")


def _latency(candidates: Artifact) -> dict[str, float]:
    """Returns seconds per prompt of a selector, as its stage ``select`` measured them."""
    latency = candidates.manifest.metrics.get("latency_seconds", {})
    return {key: float(value) for key, value in latency.items()}
