"""Classes of commands: options that all commands share, groups in help, stages of old commands."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from diffagent.cli.options import Quiet, Verbose

#: Former commands: names of stages, which ``diffagent run`` builds.
_STAGE = re.compile(
    "crawl|filter|shard|sft|rrhf|evaluate|(sample|part|judge)(-.+)?|(select|render|score)-.+"
)

_shared = typer.Typer(add_completion=False)


@_shared.command()
def _shared_options(verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Carry the options that every command gets (``CommandGroup``)."""


class GroupedCommand(TyperCommand):
    """A command whose plain help lists its options by ``rich_help_panel``."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, each group of options, and the options without a group."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        general: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                sections["Arguments"].append(record)
            elif panel := getattr(parameter, "rich_help_panel", None):
                sections.setdefault(panel, []).append(record)
            else:
                general.append(record)
        for title, records in {**sections, "Options": general}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class CommandGroup(TyperGroup):
    """A group whose commands, and those of its groups, all accept -v and -q."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command ``cmd_name`` with the shared options that it lacks."""
        command = super().get_command(ctx, cmd_name)
        _add_shared_options(command)
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that ``args`` begin with.

        Raises:
            ConfigError: the name is that of a stage, which ``diffagent run`` builds.
        """
        if args and args[0] not in self.commands and _STAGE.fullmatch(args[0]):
            from diffagent.errors import ConfigError

            raise ConfigError(
                f"{args[0]!r} is a stage, not a command; "
                f"use: diffagent run -c FILE --until {args[0]}"
            )
        return super().resolve_command(ctx, args)


def _add_shared_options(command: Any) -> None:
    for child in getattr(command, "commands", {}).values():
        _add_shared_options(child)
    if command is None or hasattr(command, "commands"):
        return
    existing = {name for parameter in command.params for name in parameter.opts}
    for option in typer.main.get_command(_shared).params:
        if option.name in ("verbose", "quiet") and not existing & set(option.opts):
            option.expose_value = False
            command.params.append(option)
