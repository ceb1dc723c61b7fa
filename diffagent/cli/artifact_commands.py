"""``diffagent artifact``: show, verify, list and prune the artifacts of a store."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffagent.cli.options import Verbose
from diffagent.schemas.printable import printable

app = typer.Typer(help="Show, check, list and remove artifacts of a store.", no_args_is_help=True)

ArtifactDir = Annotated[
    str, typer.Argument(metavar="DIR", help="Directory of an artifact, or its URI in a store.")
]


@app.command("show")
def show_artifact(directory: ArtifactDir, verbose: Verbose = 0) -> None:
    """Print the stage, content, measurements and lineage of an artifact."""
    from diffagent.store import open_artifact
    from diffagent.store.lineage import lineage_lines

    artifact = open_artifact(directory)
    manifest = artifact.manifest
    facts = {
        "stage": f"{manifest.stage} (version {manifest.stage_version})",
        "identity": manifest.identity,
        "content": manifest.content_digest,
        "created": f"{manifest.created_at:%Y-%m-%d %H:%M:%S %Z}",
        "time": f"{manifest.wall_seconds:.1f} s",
        "peak memory": f"{manifest.peak_memory_bytes / 1e6:.0f} MB",
        "files": f"{len(manifest.files)}, {sum(f.size for f in manifest.files) / 1e6:.1f} MB",
        **{f"rows {name}": f"{count:,}" for name, count in manifest.rows.items()},
        **{f"config {name}": value for name, value in manifest.config.items()},
        **{f"metric {name}": value for name, value in manifest.metrics.items()},
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {value}")
    for funnel in manifest.funnels:
        typer.echo(f"\n{funnel.unit}: {funnel.kept:,} of {funnel.seen:,} kept")
        for step in funnel.steps:
            typer.echo(f"  {step.dropped:>10,}  {step.filter}: {printable(step.reason)}")
    typer.echo("\n" + "\n".join(lineage_lines(artifact)))


@app.command("verify")
def verify_artifact(directory: ArtifactDir, verbose: Verbose = 0) -> None:
    """Compare every file of an artifact with its manifest."""
    from diffagent.store import open_artifact, verify_artifact

    artifact = open_artifact(directory)
    verify_artifact(artifact, stored="://" in directory)
    files = [entry for entry in artifact.manifest.files if not entry.for_people]
    typer.echo(f"{artifact.location}: all {len(files)} files match the manifest")


Store = Annotated[str, typer.Argument(metavar="[STORE]", help="Directory or URI of a store.")]


@app.command("list")
def list_artifacts(
    store: Store = "store",
    stage: Annotated[str | None, typer.Option(help="Only this stage.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, an artifact a line.")
    ] = False,
) -> None:
    """List the artifacts of a store with their state: latest, needed by others, superseded.

    STORE/STAGE/latest links to the artifact of the last run of a stage, latest-SERIES to that of
    one configuration; every command accepts both as DIR.
    """
    from diffagent.store.inventory import read_inventory

    entries = [e for e in read_inventory(store) if stage in (None, e.stage)]
    if not as_json:
        typer.echo(
            f"{'stage':<10} {'built':<17} {'size':>10} {'rows':>12} {'series':<8} state, path"
        )
    for entry in entries:
        built = f"{entry.manifest.created_at:%Y-%m-%d %H:%M}" if entry.manifest else ""
        rows = entry.manifest.rows if entry.manifest else {}
        if as_json:
            facts = {
                "stage": entry.stage,
                "path": entry.location,
                "created_at": entry.manifest and entry.manifest.created_at.isoformat(),
                "size": entry.size,
                "rows": rows,
                "series": entry.series,
                "state": "superseded" if entry.state == "superseded" else entry.kind,
                "latest": entry.is_latest,
                "pointers": entry.pointers,
                "needed_by": sorted(entry.needed_by),
            }
            typer.echo(json.dumps(facts))
            continue
        typer.echo(
            f"{entry.stage:<10} {built:<17} {entry.size / 1e6:>7,.1f} MB "
            f"{max(rows.values(), default=0):>12,} {entry.series:<8} {entry.state}\n"
            f"{'':<10} {entry.location}"
        )


@app.command("prune")
def prune_artifacts(
    store: Store = "store",
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them instead of listing them.")
    ] = False,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Also damaged artifacts that were set aside.")
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also interrupted work that could be resumed.")
    ] = False,
    other_configs: Annotated[
        bool,
        typer.Option("--other-configs", help="Also artifacts of earlier configurations."),
    ] = False,
) -> None:
    """Remove artifacts that a refresh has superseded.

    The latest artifact of each configuration and its ancestors stay. Without --yes the command
    only lists the artifacts that it would remove.
    """
    from diffagent.errors import ConfigError
    from diffagent.store import inventory

    if "://" in store:
        raise ConfigError(
            "prune works on a store on a disk; in an object store, remove the directories that "
            "'diffagent artifact list' marks superseded with the tools of that store"
        )
    entries = inventory.read_inventory(store)
    options = (("damaged", damaged), ("unfinished", unfinished))
    kinds = {kind for kind, requested in options if requested}
    removable = inventory.superseded(entries, other_configs=other_configs)
    removable += [entry for entry in entries if entry.kind in kinds]
    freed = 0
    for entry in removable:
        removed = inventory.remove(entry) if yes else True
        freed += entry.size if removed else 0
        verb = ("removed" if removed else "in use, stays:") if yes else "would remove"
        why = entry.kind if entry.kind != "whole" else "superseded"
        typer.echo(f"{verb} {entry.location} ({why}, {entry.size / 1e6:,.1f} MB)")
    typer.echo(
        f"{'freed' if yes else 'would free'} {freed / 1e6:,.1f} MB of "
        f"{sum(entry.size for entry in entries) / 1e6:,.1f} MB"
        + ("" if yes or not removable else "; --yes removes them")
    )
