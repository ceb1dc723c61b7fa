"""Prefect artifacts that show tasks and flows on the dashboard, each with a description."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.context import FlowRunContext, TaskRunContext

from diffagent.crawl.memory import CrawlMemory
from diffagent.schemas.manifest import Funnel, Manifest
from diffagent.store import Artifact

#: Address of the store for browsers (``make serve-dashboard`` serves it next to Prefect's UI).
STORE_URL = os.environ.get("DIFFAGENT_STORE_URL", "http://127.0.0.1:4201")
#: Descriptions of the evaluation's tables.
_EVALUATION = {
    "selectors": "Rewards, validity and selection accuracy of each selector",
    "comparisons": "Each selector against others on the same prompts",
    "hallucinations": "Answers that are not calls of the catalogue, by kind",
    "agreement": "Agreement with the parameters that people chose",
}
_MARKDOWN = re.compile(r"([\\`*_\[\]<>!#|])")


def report_artifact(key: str, artifact: Artifact) -> None:
    """Show the artifact of a task: a summary, and a table for each drop funnel."""
    manifest = artifact.manifest
    _show(
        "markdown",
        f"# {key}\n\n{facts_table(manifest_facts(artifact.location, manifest))}",
        key=f"{key}-summary",
        description=describe(manifest),
    )
    report_funnels(key, manifest.funnels)


def report_funnels(key: str, funnels: Iterable[Funnel]) -> None:
    """Show a table for each drop funnel."""
    for funnel in funnels:
        _show_table(
            funnel_rows(funnel),
            key=f"{key}-funnel-{funnel.unit}".replace("_", "-"),
            description=f"{funnel.kept:,} of {funnel.seen:,} {funnel.unit} kept",
        )


def report_refresh(key: str, artifact: Artifact, *, stays: bool) -> None:
    """Show the changes of a refresh, instead of the metrics of the crawl that built the snapshot.

    Args:
        key: key of the task.
        artifact: snapshot after the refresh.
        stays: the site has not changed, so that the snapshot is that of an earlier crawl.
    """
    manifest = artifact.manifest
    memory = CrawlMemory.load(artifact.path.with_name(f"{artifact.path.name}.memory.json"))
    metrics = dict(memory.metrics if stays else manifest.metrics)
    changes: Mapping[str, Mapping[str, int]] = metrics.pop("changes", {})
    _show_table(
        [{"items": kind, **counts} for kind, counts in changes.items()],
        key=f"{key}-changes",
        description="Nothing new on the site" if stays else _changed(changes),
    )
    built = f"{manifest.created_at:%Y-%m-%d %H:%M} UTC"
    news = f"Nothing new: the snapshot of {built} stays." if stays else "There is news."
    sections = {
        "This refresh": facts_table(dict(_leaves(metrics))),
        f"The snapshot of {built}": facts_table(
            manifest_facts(artifact.location, manifest.model_copy(update={"metrics": {}}))
        ),
    }
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in sections.items())
    _show("markdown", f"# {key}\n\n**{news}**\n\n{text}", key=f"{key}-summary", description=news)


def report_stages(group: str, stages: Mapping[str, tuple[str, Artifact]]) -> None:
    """Show the stages of a flow in one table, and the funnels of cached stages.

    The task of a cached stage runs no code; without this the history of its funnel would have gaps.

    Args:
        group: name of the flow.
        stages: key -> name of the task's state, artifact.
    """
    rows = []
    for key, (state, artifact) in stages.items():
        manifest = artifact.manifest
        if state == "Cached":
            report_funnels(key, (funnel for funnel in manifest.funnels if funnel.steps))
        counts = ", ".join(f"{count:,} {name}" for name, count in manifest.rows.items())
        rows.append(
            {
                "stage": key,
                "state": state,
                "rows": counts,
                "built": f"{manifest.created_at:%Y-%m-%d %H:%M} UTC",
                "seconds": round(manifest.wall_seconds, 1),
                "artifact": artifact.location,
            }
        )
    cached = sum(state == "Cached" for state, _ in stages.values())
    _show_table(
        rows, key=f"{group}-stages", description=f"{cached} of {len(rows)} stages from the cache"
    )


def manifest_facts(location: str, manifest: Manifest) -> dict[str, str]:
    """Return the facts of an artifact that fit on a screen, by name."""
    size = sum(entry.size for entry in manifest.files)
    return {
        "artifact": location,
        "identity": manifest.identity[:16],
        "content": manifest.content_digest[:16],
        "built": f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "files": f"{len(manifest.files):,} ({size / 1e6:,.1f} MB)",
        **{name: f"{count:,}" for name, count in manifest.rows.items()},
        **dict(_leaves(manifest.metrics)),
        "time": f"{manifest.wall_seconds:,.1f} s",
        "peak memory": f"{manifest.peak_memory_bytes / 1e6:,.0f} MB",
    }


def describe(manifest: Manifest) -> str:
    """Return a description of an artifact, one line."""
    size = sum(entry.size for entry in manifest.files)
    counts = "".join(f"{count:,} {name}, " for name, count in manifest.rows.items())
    return f"{counts}{size / 1e6:,.1f} MB, built in {manifest.wall_seconds:,.1f} s"


def facts_table(facts: Mapping[str, str]) -> str:
    """Return names and values as a Markdown table; markup in untrusted text is escaped."""
    lines = [f"| {_plain(name)} | {_plain(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def funnel_rows(funnel: Funnel) -> list[dict[str, Any]]:
    """Return the rows of a funnel: items seen, dropped by each reason, kept."""
    table: list[dict[str, Any]] = [{"filter": "seen", "reason": "", funnel.unit: funnel.seen}]
    for step in funnel.steps:
        table.append({"filter": step.filter, "reason": step.reason, funnel.unit: -step.dropped})
    table.append({"filter": "kept", "reason": "", funnel.unit: funnel.kept})
    return table


def report_evaluation(
    artifact: Artifact, summary: str, tables: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Show the summary and tables of an evaluation, and a link to its report."""
    _show(
        "markdown",
        summary,
        key="evaluation-overview",
        description="All selectors, held-out prompts",
    )
    for name, rows in tables.items():
        key = f"evaluation-{name}".replace("_", "-")
        _show_table(rows, key=key, description=_EVALUATION.get(name, name))
    link_result(artifact, "report.html", "Report with pictures", key="evaluation-report")


def link_result(artifact: Artifact, file: str, text: str, *, key: str) -> None:
    """Show a link to a file of a local artifact, which the store's server serves."""
    if artifact.remote:
        return
    address = f"{STORE_URL}/{artifact.stage}/{artifact.path.name}/{file}"
    _show(
        "markdown",
        f"[{text}]({address})",
        key=key,
        description=f"{text}, by the store's server (make serve-dashboard)",
    )


def _show(kind: str, data: str, *, key: str, description: str) -> None:
    """Create an artifact of the current run over the connection of the run.

    Prefect's ``create_..._artifact`` open a connection each, which takes most of their time.
    """
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    if task:
        client, run = task.client, {"task_run_id": task.task_run.id}
        flow_run_id = task.task_run.flow_run_id
    elif flow and flow.flow_run:
        client, run, flow_run_id = flow.client, {}, flow.flow_run.id
    else:
        raise RuntimeError(f"the artifact {key!r} needs a run of a flow or a task")
    cast(SyncPrefectClient, client).create_artifact(
        ArtifactCreate(
            type=kind, key=key, description=description, data=data, flow_run_id=flow_run_id, **run
        )
    )


def _show_table(rows: list[dict[str, Any]], *, key: str, description: str) -> None:
    _show("table", json.dumps(rows), key=key, description=description)


def _changed(changes: Mapping[str, Mapping[str, int]]) -> str:
    parts = [
        f"{count:,} {kind} {change}"
        for kind, counts in changes.items()
        for change, count in counts.items()
        if count
    ]
    return ", ".join(parts) or "No changes counted"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested mappings by their path, e.g. 'scorers clip version'."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}".replace("_", " "), _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        shown = ", ".join(map(_text, value[:20]))
        return f"{shown}, and {len(value) - 20:,} more" if len(value) > 20 else shown or "none"
    return str(value) if value != {} else "none"


def _plain(text: str) -> str:
    """Escape a text for Markdown, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))
