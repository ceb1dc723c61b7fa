"""Options that several commands share, and the checks of options."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from diffagent.schemas.printable import log_to_terminal

#: Loggers of answers to a request (--reconcile), shown without -v.
ANSWERS = ("diffagent.civitai.recall",)
#: Loggers whose records from INFO up are shown without -v.
_SHOWN = ("diffagent.pipeline", *ANSWERS)


def _set_up_logging(verbose: int) -> int:
    """Log warnings and the current stage; -v: from INFO up; -vv: everything."""
    log_to_terminal()
    level = logging.DEBUG if verbose > 1 else logging.INFO
    for name in (*_SHOWN, "diffagent") if verbose else _SHOWN:
        logging.getLogger(name).setLevel(level)
    return verbose


def _set_up_quiet(quiet: bool) -> bool:
    logging.disable(logging.WARNING if quiet else logging.NOTSET)
    return quiet


Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        callback=_set_up_logging,
        help="Log more; -vv logs everything.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_set_up_quiet, help="Log nothing; results and errors are printed."
    ),
]
ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a setting of the run (repeatable); VALUE is YAML.",
    ),
]


def parse_overrides(settings: list[str] | None) -> dict[str, Any]:
    """Parse ``section.key=value`` texts into a mapping; values are read as YAML.

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


def given_options(context: typer.Context) -> frozenset[str]:
    """Return the names of the parameters that the command line sets."""
    return frozenset(
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    )


def refuse_options(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Refuse options that a command would not use.

    Raises:
        ConfigError: the command line sets one of ``names``; the message names all with ``reason``.
    """
    from diffagent.errors import ConfigError

    if unused := sorted(given_options(context) & {*names}):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ConfigError(f"{options}: {reason}")
