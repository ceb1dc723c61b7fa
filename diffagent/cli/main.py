"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffagent.cli import render_commands as render_cli
from diffagent.cli.dabench_commands import app as dabench_app
from diffagent.cli.dabench_commands import artifact_path
from diffagent.cli.deployment_commands import app as deployments_app
from diffagent.cli.models_commands import app as models_app
from diffagent.cli.options import (
    CommandGroup,
    ConfigFile,
    Overrides,
    Reconcile,
    Refresh,
    Verbose,
    parse_overrides,
)
from diffagent.schemas.printable import printable, printable_json

if TYPE_CHECKING:
    from diffagent.agent.selector import Selector
    from diffagent.pipeline import Node
    from diffagent.store import Artifact

log = logging.getLogger(__name__)

#: Commands that run one stage and what it needs: keys of ``diffagent.pipeline.plan``, the
#: shards of a stage by its name.
STAGES = {
    "crawl": "Read the site's API into a raw snapshot.",
    "filter": "Keep the models and records that DABench admits.",
    "shard": "Write DABench: parquet shards, mappings, data card.",
    "sft": "Fine-tune the language model on (prompt, API) pairs.",
    "sample": "Sample candidates for RRHF from the fine-tuned agent.",
    "render": "Render the candidates.",
    "score": "Score the candidates' pictures.",
    "rrhf": "Align the agent with the ranked candidates.",
    "select-popular": "Answer held-out prompts: the most popular model.",
    "select-random": "Answer held-out prompts: random valid APIs.",
    "select-nearest": "Answer held-out prompts: nearest training prompt.",
    "select-combined": "Answer held-out prompts: votes, statistics and cards, weighed.",
    "select-sft": "Answer held-out prompts: the fine-tuned agent.",
    "select-rrhf": "Answer held-out prompts: the aligned agent.",
    "evaluate": "Compare the selectors and write the report.",
}


ArtifactDir = Annotated[
    str, typer.Argument(metavar="DIR", help="Directory of an artefact, or its URI in a store.")
]

app = typer.Typer(
    name="diffagent",
    cls=CommandGroup,
    help="Train an LLM to answer a prompt with the right text-to-image model and parameters.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
artifacts_app = typer.Typer(help="Look at artefacts.", no_args_is_help=True)
app.add_typer(artifacts_app, name="artifact")
app.add_typer(dabench_app, name="dabench")
app.add_typer(deployments_app, name="deployment")
app.add_typer(models_app, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        from diffagent import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def run_stage(
    config: Path,
    settings: list[str] | None,
    upto: str | None,
    refresh: bool = False,
    reconcile: bool = False,
) -> dict[str, Artifact]:
    from diffagent import pipeline
    from diffagent.cli import terminal
    from diffagent.schemas.config import load_config

    def show(node: Node, artifact: Artifact, unchanged: bool) -> None:
        status.stop()
        state = "built"
        if unchanged:
            state = "nothing new" if refresh and node.key == "crawl" else "cached"
        typer.echo(f"{node.key:<16} {state:<12} {artifact.location}")

    overrides = parse_overrides(settings)
    if reconcile:
        refresh, overrides["runtime.reconcile"] = True, True
    settings_read = load_config(config, overrides)
    with terminal.status_line() as status:
        return pipeline.run(
            settings_read,
            upto,
            refresh=refresh,
            on_start=lambda node: status.start(node.key),
            on_done=show,
            progress=status.progress,
        )


def _add_stage_command(stage: str, text: str) -> None:
    @app.command(stage, help=f"{text} What it needs comes from the store or is built first.")
    def command(
        config: ConfigFile,
        settings: Overrides = None,
        refresh: Refresh = False,
        reconcile: Reconcile = False,
        verbose: Verbose = 0,
    ) -> None:
        done = run_stage(config, settings, stage, refresh, reconcile)
        if stage == "evaluate":
            _show_report(done)


for _stage, _text in STAGES.items():
    if _stage not in ("render", "score"):  # these do more
        _add_stage_command(_stage, _text)
app.command("render")(render_cli.render)
app.command("score")(render_cli.score)


@app.command()
def run(
    config: ConfigFile,
    settings: Overrides = None,
    refresh: Refresh = False,
    reconcile: Reconcile = False,
    verbose: Verbose = 0,
) -> None:
    """Run everything from the crawl to the report."""
    done = run_stage(config, settings, None, refresh, reconcile)
    typer.echo(f"\ndata set: {done['shard'].location}\nagent:    {done['rrhf'].location}")
    _show_report(done)


def _show_report(done: dict[str, Artifact]) -> None:
    from diffagent.evaluation.summary import read_metrics, summary_markdown

    typer.echo(f"report:   {done['evaluate'].file('report.html')}\n")
    typer.echo(printable(summary_markdown(read_metrics(done["evaluate"])), lines=True))


@app.command()
def select(
    prompt: Annotated[
        str, typer.Argument(help="What the picture should show; '-': a prompt a line of stdin.")
    ],
    *,
    agent: Annotated[
        Path | None,
        typer.Option(
            parser=artifact_path,
            metavar="DIR",
            help="An agent, as sft or rrhf makes it, or its URI.",
        ),
    ] = None,
    dabench: Annotated[
        Path | None,
        typer.Option(
            parser=artifact_path,
            metavar="DIR",
            help="A DABench to learn from, or its URI; with --agent the agent chooses from it.",
        ),
    ] = None,
    selector: Annotated[
        str, typer.Option(help="With --dabench: what is fitted on it, once.")
    ] = "combined",
    encoder: Annotated[
        str, typer.Option(help="With --dabench: sentence encoder, e.g. 'minilm'; '' for none.")
    ] = "",
    store: Annotated[
        str, typer.Option(metavar="DIR", help="With --dabench: where what was fitted is kept.")
    ] = "store",
    n: Annotated[
        int, typer.Option("-n", "--n", min=1, max=32, help="Different APIs, likeliest first.")
    ] = 1,
    unconstrained: Annotated[
        bool, typer.Option("--unconstrained", help="Let the agent write what it likes.")
    ] = False,
    free_negative_prompt: Annotated[
        bool,
        typer.Option(
            "--free-negative-prompt",
            help="Let it write negative prompts that training has not seen; slower.",
        ),
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="The agent's weights in 8 bits: faster on a CPU.")
    ] = False,
    device: Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', 'mps'")] = "auto",
    verbose: Verbose = 0,
) -> None:
    """Print the APIs that an agent, or a selector fitted on a DABench, chooses, one a line.

    A line is JSON: the prompt, the API, and the SHA256 of its files, so that `diffagent render`
    draws it. With '-' the selector is loaded once and each prompt is answered when its line has
    been read; blank lines are skipped. Where an unconstrained agent has no valid API, the line is
    {"prompt": ..., "error": ...}.
    """
    from diffagent.agent.opening import open_selector
    from diffagent.errors import ConfigError, SchemaError

    if not prompt.strip():
        raise ConfigError("the prompt is empty; say what the picture should show, '-' reads stdin")

    chooser = open_selector(
        agent,
        dabench,
        selector,
        encoder=encoder,
        store=store,
        device=device,
        int8=int8,
        constrained=not unconstrained,
        negative_prompts="free" if free_negative_prompt else "known",
    )

    if prompt != "-":
        _print_calls(chooser, prompt, n)
        return
    for line in typer.get_text_stream("stdin", "utf-8", "replace"):
        if text := line.strip():
            try:
                _print_calls(chooser, text, n)
            except SchemaError as error:
                problem = {"prompt": text, "error": str(error)}
                typer.echo(printable_json(json.dumps(problem, ensure_ascii=False)))


def _print_calls(chooser: Selector, prompt: str, n: int) -> None:
    from diffagent.agent.selector import call_line, valid_apis

    for api in valid_apis(chooser, prompt, n):
        typer.echo(printable_json(call_line(prompt, api, chooser.catalogue)))


@app.command(
    "civitai",
    help="A local Civitai: serve a dump.",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def civitai(context: typer.Context) -> None:
    """Hand the arguments to the commands of ``diffagent.cli.civitai_commands``."""
    from diffagent.cli.civitai_commands import app as civitai_app

    names = app.info.context_settings
    civitai_app(args=context.args, prog_name="diffagent civitai", **(names or {}))


@artifacts_app.command("show")
def show_artifact(directory: ArtifactDir, verbose: Verbose = 0) -> None:
    """Print what an artefact is, what is in it, and what it was made from."""
    from diffagent.store import open_artifact
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


@artifacts_app.command("verify")
def verify_artifact(directory: ArtifactDir, verbose: Verbose = 0) -> None:
    """Read every file of an artefact and compare it with the manifest."""
    from diffagent import store

    artifact = store.open_artifact(directory)
    store.verify_artifact(artifact, stored="://" in directory)
    files = [entry for entry in artifact.manifest.files if not entry.for_people]
    typer.echo(f"{artifact.location}: all {len(files)} files are as they were made")


Store = Annotated[str, typer.Argument(metavar="[STORE]", help="Directory or URI of a store.")]


@artifacts_app.command("list")
def list_artifacts(
    store: Store = "store",
    stage: Annotated[str | None, typer.Option(help="Only this stage.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, an artefact a line.")
    ] = False,
) -> None:
    """List the artefacts of a store: which are the latest, and what the others are needed for.

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


@artifacts_app.command("prune")
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
    """Remove what refreshes have superseded: no latest artefact was made from it.

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


def main() -> None:
    """The console command: whatever is raised is one line with a remedy, and exit code 1.

    With -v the traceback is logged.
    """
    for stream in (sys.stdout, sys.stderr):  # text that the terminal's encoding lacks is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except BaseException as error:
        from diffagent.failures import as_error, is_failure, shown

        if not is_failure(error):
            raise
        log.info("the traceback of this error", exc_info=True)
        failure = as_error(error, f"diffagent {' '.join(sys.argv[1:2])}".strip())
        typer.echo(f"error: {shown(failure)}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
