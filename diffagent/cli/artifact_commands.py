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
    """Print what an artifact is, what is in it, and what it was made from."""
    from diffagent.store.artifacts import open_artifact
    from diffagent.store.lineage import lineage_lines

    artifact = open_artifact(directory)
    manifest = artifact.manifest
    facts = {
        "stage": f"{manifest.stage} (version {manifest.stage_version})",
        "identity": manifest.identity,
        "content": manifest.content_digest,
        "created": f"{manifest.created_at:%Y-%m-%d %H:%M:%S %Z}",
        "took": f"{manifest.wall_seconds:.1f} s, {manifest.peak_memory_bytes / 1e6:.0f} MB at most",
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
    """Read every file of an artifact and compare it with the manifest."""
    from diffagent.store import artifacts

    artifact = artifacts.open_artifact(directory)
    artifacts.verify_artifact(artifact, stored="://" in directory)
    files = [entry for entry in artifact.manifest.files if not entry.for_people]
    typer.echo(f"{artifact.location}: all {len(files)} files are as they were made")


Store = Annotated[str, typer.Argument(metavar="[STORE]", help="Directory or URI of a store.")]


@app.command("list")
def list_artifacts(
    store: Store = "store",
    stage: Annotated[str | None, typer.Option(help="Only this stage.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, an artifact a line.")
    ] = False,
) -> None:
    """List the artifacts of a store: which are the latest, and what the others are needed for.

    STORE/STAGE/latest leads to what the last run of a stage made or found, latest-SERIES to the
    same for one configuration; commands take both where they take a DIR.
    """
    from diffagent.store.inventory import read_inventory

    entries = [e for e in read_inventory(store) if stage in (None, e.stage)]
    if not as_json:
        typer.echo(
            f"{'stage':<10} {'made':<17} {'size':>10} {'rows':>12} {'series':<8} state, path"
        )
    for entry in entries:
        made = f"{entry.manifest.created_at:%Y-%m-%d %H:%M}" if entry.manifest else ""
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
            f"{entry.stage:<10} {made:<17} {entry.size / 1e6:>7,.1f} MB "
            f"{max(rows.values(), default=0):>12,} {entry.series:<8} {entry.state}\n"
            f"{'':<10} {entry.location}"
        )


@app.command("prune")
def prune_artifacts(
    store: Store = "store",
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it nothing is.")] = False,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Also what was set aside as damaged.")
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also interrupted work, which could be resumed.")
    ] = False,
    other_configs: Annotated[
        bool,
        typer.Option("--other-configs", help="Also what other configurations than the last made."),
    ] = False,
) -> None:
    """Remove what refreshes have superseded: no latest artifact was made from it.

    What is the latest of its configuration, and all that it was made from, stays. Prints what
    would go, and removes it with --yes.
    """
    from diffagent.errors import ConfigError
    from diffagent.store import inventory

    if "://" in store:
        raise ConfigError(
            "prune removes from a store on a disk; in an object store remove the directories that "
            "'diffagent artifact list' calls superseded with its own tools"
        )
    entries = inventory.read_inventory(store)
    kinds = {kind for kind, wanted in (("damaged", damaged), ("unfinished", unfinished)) if wanted}
    going = inventory.superseded(entries, other_configs=other_configs)
    going += [entry for entry in entries if entry.kind in kinds]
    freed = 0
    for entry in going:
        gone = inventory.remove(entry) if yes else True
        freed += entry.size if gone else 0
        verb = ("removed" if gone else "in use, stays:") if yes else "would remove"
        why = entry.kind if entry.kind != "whole" else "superseded"
        typer.echo(f"{verb} {entry.location} ({why}, {entry.size / 1e6:,.1f} MB)")
    typer.echo(
        f"{'freed' if yes else 'would free'} {freed / 1e6:,.1f} MB of "
        f"{sum(entry.size for entry in entries) / 1e6:,.1f} MB"
        + ("" if yes or not going else "; --yes removes it")
    )
