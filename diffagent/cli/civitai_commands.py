"""``diffagent civitai``: a local server with the API of Civitai."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diffagent.errors import DiffAgentError
from diffagent.schemas.printable import log_to_terminal

app = typer.Typer(
    help="Serve the API of Civitai on this machine, for development and tests.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class FaultProfile(StrEnum):
    """Fault profiles: the names of ``diffagent.localcivitai.faults.PROFILES``."""

    none = "none"
    flaky = "flaky"
    hostile = "hostile"


@app.callback()
def _group() -> None:
    """Serve the API of Civitai on this machine, for development and tests."""


@app.command()
def serve(  # noqa: PLR0917  the command line calls it by name
    dump: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of records: models*.jsonl[.gz], images*.jsonl[.gz]."
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(metavar="KIND:DIR", help="Source as in crawl.site, e.g. 'local:DIR'."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8008,
    faults: Annotated[FaultProfile, typer.Option(help="Faults to simulate.")] = FaultProfile.none,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 0,
) -> None:
    """Serve Civitai's REST API from a source; prints its address when ready."""
    from diffagent.localcivitai.faults import Faults
    from diffagent.localcivitai.server import LocalCivitai, LocalServer
    from diffagent.localcivitai.site import read_source

    sites = [name for name in (f"dump:{dump}" if dump else None, site) if name]
    if len(sites) != 1:
        raise typer.BadParameter("give one of --dump DIR and --site KIND:DIR")
    log_to_terminal()
    try:
        replay = read_source(sites[0])
    except DiffAgentError as error:
        raise typer.BadParameter(str(error)) from None
    serving = LocalServer(LocalCivitai(replay, Faults(faults.value, seed)), host, port)
    typer.echo(f"serving on {serving.url}")
    sys.stdout.flush()
    serving.serve_forever()


if __name__ == "__main__":
    app()
