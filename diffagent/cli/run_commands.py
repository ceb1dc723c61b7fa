"""``diffagent run``: build a run, or the part of it that one stage needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffagent.cli.options import ConfigFile, Overrides, Verbose, parse_overrides
from diffagent.schemas.printable import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffagent.pipeline import Node
    from diffagent.store import Artifact

_PART = "Part of the run"
_CRAWL = "Crawl"


def run(
    config: ConfigFile,
    settings: Overrides = None,
    *,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="Build this stage and everything it needs, e.g. 'shard' (the dataset), 'sft', "
            "'render' (all shards), 'render-3' or 'select-rrhf'.",
            rich_help_panel=_PART,
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="Build this stage only; fail when the store lacks one of its inputs.",
            rich_help_panel=_PART,
        ),
    ] = None,
    refresh: Annotated[
        bool,
        typer.Option(
            "--refresh",
            help="Crawl again; later stages are rebuilt only when the site has changed.",
            rich_help_panel=_CRAWL,
        ),
    ] = False,
    reconcile: Annotated[
        bool,
        typer.Option(
            "--reconcile",
            help="Refresh by walking whole listings again, and report what earlier crawls missed.",
            rich_help_panel=_CRAWL,
        ),
    ] = False,
    verbose: Verbose = 0,
) -> None:
    """Build a run from the crawl to the report; stages in the store are not built again.

    diffagent run -c configs/sandbox.yaml --until shard
    """
    from diffagent.errors import ConfigError
    from diffagent.run_config import load_config

    if until is not None and only is not None:
        raise ConfigError("--until and --only exclude each other; give one of them")
    overrides = parse_overrides(settings)
    if reconcile:
        refresh, overrides["runtime.site.reconcile"] = True, True
    if refresh and only not in {None, "crawl"}:
        raise ConfigError("--refresh crawls the site, and --only leaves the crawl out; use --until")
    artifacts = _build(load_config(config, overrides), until, only, refresh)
    if until is None and only is None:
        typer.echo(f"\ndataset: {artifacts['shard'].location}")
        typer.echo(f"agent:   {artifacts['rrhf'].location}")
    if (until or only or "evaluate") == "evaluate":
        _show_report(artifacts["evaluate"])


def _build(
    config: Any, until: str | None, only: str | None, refresh: bool
) -> Mapping[str, Artifact]:
    """Run the plan with a status line; print a line for each node."""
    from diffagent import pipeline
    from diffagent.cli import terminal

    def show(node: Node, artifact: Artifact, unchanged: bool) -> None:
        status.stop()
        state = "built"
        if unchanged:
            state = "nothing new" if refresh and node.key == "crawl" else "cached"
        typer.echo(f"{node.key:<16} {state:<12} {artifact.location}")

    with terminal.status_line() as status:
        return pipeline.run(
            config,
            until,
            only=only,
            refresh=refresh,
            on_start=lambda node: status.start(node.key),
            on_done=show,
            progress=status.progress,
        )


def _show_report(evaluation: Artifact) -> None:
    from diffagent.evaluation.summary import read_metrics, summary_markdown

    typer.echo(f"report:  {evaluation.file('report.html')}\n")
    typer.echo(printable(summary_markdown(read_metrics(evaluation)), lines=True))
