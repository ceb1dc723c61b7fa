"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffagent.dabench.cli import app as dabench_app
from diffagent.dabench.cli import artifact_path
from diffagent.options import ConfigFile, Overrides, Reconcile, Refresh, Verbose, parse_overrides
from diffagent.render import cli as render_cli
from diffagent.render.models_cli import app as models_app
from schemas.printable import printable, printable_json

if TYPE_CHECKING:
    from diffagent.artifacts import Artifact
    from diffagent.pipeline import Node

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
    help="Train an LLM to answer a prompt with the right text-to-image model and parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
artifacts_app = typer.Typer(help="Look at artefacts.", no_args_is_help=True)
app.add_typer(artifacts_app, name="artifact")
app.add_typer(dabench_app, name="dabench")
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
    from schemas.config import load_config

    def show(node: Node, artifact: Artifact, unchanged: bool) -> None:
        state = "built"
        if unchanged:
            state = "nothing new" if refresh and node.key == "crawl" else "cached"
        typer.echo(f"{node.key:<16} {state:<12} {artifact.location}")

    overrides = parse_overrides(settings)
    if reconcile:
        refresh, overrides["runtime.reconcile"] = True, True
    settings_read = load_config(config, overrides)
    return pipeline.run(settings_read, upto, refresh=refresh, on_done=show)


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

    With '-' the selector is loaded once; each prompt is answered when its line has been read, and
    where an unconstrained agent has no valid API the line is {"error": ...}.
    """
    from diffagent.agent.opening import open_selector
    from diffagent.agent.selector import valid_apis
    from diffagent.errors import SchemaError

    found = open_selector(
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
        for api in valid_apis(found, prompt, n):
            typer.echo(printable_json(api.to_json()))
        return
    for line in typer.get_text_stream("stdin", "utf-8", "replace"):
        try:
            for api in valid_apis(found, line.rstrip("\r\n"), n):
                typer.echo(printable_json(api.to_json()))
        except SchemaError as error:
            typer.echo(json.dumps({"error": str(error)}, ensure_ascii=False))


@app.command(
    "civitai",
    help="A local Civitai: serve a dump or the sandbox.",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def civitai(context: typer.Context) -> None:
    """Hand the arguments to the commands of ``diffagent.civitai.cli``."""
    from diffagent.civitai.cli import app as civitai_app

    civitai_app(args=context.args, prog_name="diffagent civitai")


@artifacts_app.command("show")
def show_artifact(directory: ArtifactDir, verbose: Verbose = 0) -> None:
    """Print what an artefact is, what is in it, and what it was made from."""
    from diffagent.artifacts import open_artifact
    from diffagent.lineage import lineage_lines

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
    from diffagent import artifacts

    artifact = artifacts.open_artifact(directory)
    artifacts.verify_artifact(artifact, stored="://" in directory)
    typer.echo(
        f"{artifact.location}: all {len(artifact.manifest.files)} files are as they were made"
    )


def main() -> None:
    """The console command: errors made on purpose are one line and exit code 1."""
    try:
        app()
    except Exception as error:
        from diffagent.errors import DiffAgentError
        from schemas.config import ConfigFileError

        if not isinstance(error, DiffAgentError | ConfigFileError):
            raise
        log.debug("where it came from", exc_info=True)
        typer.echo(f"error: {printable(error, lines=True)}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
