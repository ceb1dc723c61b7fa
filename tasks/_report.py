"""What the dashboard shows of a run: artifacts of tasks and flows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from diffagent.artifacts import Artifact
from schemas.manifest import Funnel, Manifest

#: Where a browser reaches the store (``make serve-dashboard`` serves it beside Prefect's UI).
STORE_URL = os.environ.get("DIFFAGENT_STORE_URL", "http://127.0.0.1:4201")


def report_artifact(key: str, artifact: Artifact) -> None:
    """Show what a task made: a summary, and a table for each drop funnel."""
    manifest = artifact.manifest
    create_markdown_artifact(
        summary_markdown(key, artifact.location, manifest), key=f"{key}-summary"
    )
    for funnel in manifest.funnels:
        create_table_artifact(
            funnel_rows(funnel),
            key=f"{key}-funnel-{funnel.unit}".replace("_", "-"),
            description=f"{funnel.kept:,} of {funnel.seen:,} {funnel.unit} kept",
        )


def summary_markdown(key: str, location: str, manifest: Manifest) -> str:
    """One artefact on one screen: what it is, how big, how long it took."""
    size = sum(entry.size for entry in manifest.files)
    rows = [
        ("artefact", f"`{location}`"),
        ("identity", f"`{manifest.identity[:16]}`"),
        ("content", f"`{manifest.content_digest[:16]}`"),
        ("files", f"{len(manifest.files)} ({size / 1e6:,.1f} MB)"),
        *((name, f"{count:,}") for name, count in manifest.rows.items()),
        *((name, _short(value)) for name, value in manifest.metrics.items()),
        ("time", f"{manifest.wall_seconds:,.1f} s"),
        ("peak memory", f"{manifest.peak_memory_bytes / 1e6:,.0f} MB"),
    ]
    lines = [f"# {key}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows)]
    return "\n".join(lines)


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
    create_markdown_artifact(summary, key="evaluation-overview")
    for name, rows in tables.items():
        create_table_artifact(rows, key=f"evaluation-{name}".replace("_", "-"), description=name)
    address = f"{STORE_URL}/{artifact.stage}/{artifact.path.name}/report.html"
    create_link_artifact(address, link_text="Report with pictures", key="evaluation-report")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value).replace("|", "\\|")
    return text if len(text) <= 120 else f"{text[:117]}..."
