"""Options that several commands have, and what they do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from schemas.printable import log_to_terminal

#: Loggers whose news are told without -v: which stage runs, and what was asked for by name.
_TOLD = ("diffagent.pipeline", "diffagent.civitai.recall")


def _set_up_logging(verbose: int) -> int:
    """Warnings, and which stage runs; -v: what stages say; -vv: everything of this library."""
    log_to_terminal()
    level = logging.DEBUG if verbose > 1 else logging.INFO
    for name in (*_TOLD, "diffagent") if verbose else _TOLD:
        logging.getLogger(name).setLevel(level)
    return verbose


Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, callback=_set_up_logging, help="Say more; -vv for all."
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
    import yaml

    from diffagent.errors import ConfigError

    overrides: dict[str, Any] = {}
    for text in settings or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set needs SECTION.KEY=VALUE, got {text!r}")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: {value!r} is not YAML") from None
    return overrides
