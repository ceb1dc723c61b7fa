"""Options that several commands have, and what they do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffagent.schemas.printable import log_to_terminal

#: Loggers of answers to a request (--reconcile), which are shown without -v.
ANSWERS = ("diffagent.civitai.recall",)
#: Loggers whose news are shown without -v: which stage runs, and answers.
_TOLD = ("diffagent.pipeline", *ANSWERS)


def _set_up_logging(verbose: int) -> int:
    """Warnings, and which stage runs; -v: what stages say; -vv: everything of this library."""
    log_to_terminal()
    level = logging.DEBUG if verbose > 1 else logging.INFO
    for name in (*_TOLD, "diffagent") if verbose else _TOLD:
        logging.getLogger(name).setLevel(level)
    return verbose


def _set_up_quiet(quiet: bool) -> bool:
    logging.disable(logging.WARNING if quiet else logging.NOTSET)
    return quiet


Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, callback=_set_up_logging, help="Say more; -vv for all."
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_set_up_quiet, help="Errors only; what is printed stays."
    ),
]
ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the whole run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Change a setting (repeatable); VALUE is YAML."
    ),
]
Refresh = Annotated[
    bool, typer.Option("--refresh", help="Crawl again; nothing else runs if nothing is new.")
]
Reconcile = Annotated[
    bool,
    typer.Option(
        "--reconcile",
        help="Refresh by walking whole listings again, and say what was missed before (recall).",
    ),
]


def parse_overrides(settings: list[str] | None) -> dict[str, Any]:
    """``section.key=value`` texts as a mapping; values are read as YAML.

    Raises:
        ConfigError: a text has no '=' or no key, or its value is not YAML.
    """
    from diffagent.errors import ConfigError
    from diffagent.schemas.yaml_file import YamlError, parse_yaml

    overrides: dict[str, Any] = {}
    for text in settings or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set needs SECTION.KEY=VALUE, got {text!r:.100}")
        try:
            overrides[key.strip()] = parse_yaml(value)
        except YamlError as error:
            raise ConfigError(f"--set {key}: {value!r:.200} is not YAML: {error}") from None
    return overrides


_shared = typer.Typer(add_completion=False)


@_shared.command()
def _shared_options(verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Carry the options that every command gets (``CommandGroup``)."""


class CommandGroup(TyperGroup):
    """A group whose commands all take -v and -q, those of its groups too."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command ``cmd_name`` with the options that it lacks."""
        command = super().get_command(ctx, cmd_name)
        _add_shared_options(command)
        return command


def _add_shared_options(command: Any) -> None:
    for child in getattr(command, "commands", {}).values():
        _add_shared_options(child)
    if command is None or hasattr(command, "commands"):
        return
    taken = {name for parameter in command.params for name in parameter.opts}
    for option in typer.main.get_command(_shared).params:
        if option.name in ("verbose", "quiet") and not taken & set(option.opts):
            option.expose_value = False
            command.params.append(option)
