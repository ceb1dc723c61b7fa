"""The dashboard's view of a run: artifacts of tasks and flows, each with a description."""

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

#: Where a browser reaches the store (``make serve-dashboard`` serves it beside Prefect's UI).
STORE_URL = os.environ.get("DIFFAGENT_STORE_URL", "http://127.0.0.1:4201")
#: Descriptions of the evaluation's tables.
_EVALUATION = {
    "selectors": "Rewards, validity and selection accuracy of each selector",
    "comparisons": "Each selector against others on the same prompts",
    "hallucinations": "Answers that are no call of the catalogue, by kind",
    "agreement": "Parameters as a person chose them",
}
_MARKDOWN = re.compile(r"([\\`*_\[\]<>!#|])")


def report_artifact(key: str, artifact: Artifact) -> None:
    """Show what a task made: a summary, and a table for each drop funnel."""
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
    """Show what a refresh of the crawl did, and not what the crawl that made the artefact did.

    Args:
        key: of the task.
        artifact: the snapshot after the refresh.
        stays: the refresh found nothing new, so that the snapshot is the one of before.
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
    """Show a flow's stages in one table, and the funnels of those that came from the cache.

    Their tasks ran no code, so that without it the history of a funnel would have gaps.

    Args:
        group: the flow's name.
        stages: key -> name of the task's state, artefact.
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
                "artefact": artifact.location,
            }
        )
    cached = sum(state == "Cached" for state, _ in stages.values())
    _show_table(
        rows, key=f"{group}-stages", description=f"{cached} of {len(rows)} stages from the cache"
    )


def manifest_facts(location: str, manifest: Manifest) -> dict[str, str]:
    """One artefact on one screen: what it is, how big, how long it took."""
    size = sum(entry.size for entry in manifest.files)
    return {
        "artefact": location,
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
    """One line on an artefact."""
    size = sum(entry.size for entry in manifest.files)
    counts = "".join(f"{count:,} {name}, " for name, count in manifest.rows.items())
    return f"{counts}{size / 1e6:,.1f} MB, built in {manifest.wall_seconds:,.1f} s"


def facts_table(facts: Mapping[str, str]) -> str:
    """Names and values as a Markdown table, in which texts of strangers are text."""
    lines = [f"| {_plain(name)} | {_plain(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def funnel_rows(funnel: Funnel) -> list[dict[str, Any]]:
    """A funnel as a table: seen, what each reason dropped, kept."""
    table: list[dict[str, Any]] = [{"filter": "seen", "reason": "", funnel.unit: funnel.seen}]
    for step in funnel.steps:
        table.append({"filter": step.filter, "reason": step.reason, funnel.unit: -step.dropped})
    table.append({"filter": "kept", "reason": "", funnel.unit: funnel.kept})
    return table


def report_evaluation(
    artifact: Artifact, summary: str, tables: Mapping[str, list[dict[str, Any]]]
) -> None:
    """The evaluation's summary and tables, and a link to the report with the pictures."""
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
    """Link a file of an artefact, where the store's server hands it out: from this disk."""
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
    """Create an artifact of the current run, over the connection that the run has.

    Prefect's ``create_..._artifact`` open one each, which takes most of their time.
    """
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    if task:
        client, run = task.client, {"task_run_id": task.task_run.id}
        flow_run_id = task.task_run.flow_run_id
    elif flow and flow.flow_run:
        client, run, flow_run_id = flow.client, {}, flow.flow_run.id
    else:
        raise RuntimeError(f"the artifact {key!r} belongs to a run of a flow or a task")
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
    return ", ".join(parts) or "Changes: none counted"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested mappings, each whole, by the way to it: 'scorers clip version'."""
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
    """A text that Markdown shows as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))
