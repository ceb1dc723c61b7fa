"""The command line: all groups of commands, and the form of errors."""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer

from diffagent.cli.artifact_commands import app as artifact_app
from diffagent.cli.civitai_commands import app as civitai_app
from diffagent.cli.command_group import CommandGroup, GroupedCommand
from diffagent.cli.config_commands import config
from diffagent.cli.dabench_commands import app as dabench_app
from diffagent.cli.deployment_commands import app as deployment_app
from diffagent.cli.models_commands import app as models_app
from diffagent.cli.render_commands import render, score
from diffagent.cli.run_commands import run
from diffagent.cli.select_commands import select

log = logging.getLogger(__name__)

app = typer.Typer(
    name="diffagent",
    cls=CommandGroup,
    help="Train an LLM to answer a prompt with the right text-to-image model and parameters.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (run, select, render, score, config):
    app.command(cls=GroupedCommand)(command)
app.add_typer(artifact_app, name="artifact")
app.add_typer(civitai_app, name="civitai")
app.add_typer(dabench_app, name="dabench")
app.add_typer(deployment_app, name="deployment")
app.add_typer(models_app, name="models")


def _print_version(requested: bool) -> None:
    if requested:
        from diffagent import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


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
