"""Generate the reference pages from the code: settings and command line."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from diffagent.cli.main import app
from diffagent.run_config import RunConfig

GENERATED = "<!-- Generated from the code by tools/docs/reference.py. -->\n\n"


def settings_page() -> str:
    """Returns Markdown with every setting of a run: default, bounds and description."""
    parts = [
        "# Settings",
        "A run is configured by one YAML file of sections; `--set section.key=value` changes a "
        "setting on the command line. Every section except `runtime` enters the identity of the "
        "stages that it configures: with another value a stage is built again.",
    ]
    for name, field in RunConfig.model_fields.items():
        parts += _section(name, typing.cast(type[BaseModel], field.annotation))
    return GENERATED + "\n\n".join(parts) + "\n"


def _section(name: str, model: type[BaseModel]) -> Iterator[str]:
    depth = 2 + name.count(".")
    yield f"{'#' * depth} `{name}`"
    if model.__doc__:
        yield model.__doc__.partition("\n\n")[0].replace("\n", " ")
    nested: list[tuple[str, type[BaseModel]]] = []
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            nested.append((f"{name}.{key}", field.annotation))
            continue
        cells = (f"`{key}`", _type(field.annotation), _default(field), _meaning(field))
        rows.append("| " + " | ".join(cells) + " |")
    if len(rows) > 2:
        yield "\n".join(rows)
    for inner_name, inner in nested:
        yield from _section(inner_name, inner)


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type(a) for a in arguments)
    if origin in (tuple, list):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default}`" if default != "" else "`''`"


def _meaning(field: FieldInfo) -> str:
    bounds = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
    limits = [
        f"{bounds[type(m).__name__]} {getattr(m, type(m).__name__.lower())}"
        for m in field.metadata
        if type(m).__name__ in bounds
    ]
    text = (field.description or "").replace("|", "\\|").replace("\n", " ")
    return " ".join(filter(None, (text, f"({', '.join(limits)})" if limits else "")))


def command_line_page() -> str:
    """Returns Markdown with every command, its arguments and options."""
    parts = [
        "# Command line",
        "`diffagent --install-completion` sets up completion in your shell. A failure is one line "
        "on standard error and exit code 1; a wrong command line exits with 2.",
    ]
    parts += _command("diffagent", typer.main.get_command(app))
    return GENERATED + "\n\n".join(parts) + "\n"


def _command(path: str, command: Any) -> Iterator[str]:
    children = getattr(command, "commands", {})
    if path != "diffagent":
        yield f"{'#' * (1 + path.count(' '))} `{path}`"
        yield _plain(command.help or "")
    rows = [row for parameter in command.params for row in _parameter(parameter)]
    if rows and not children:
        yield "\n".join(["| option | meaning | default |", "|---|---|---|", *rows])
    for name, child in children.items():
        if not child.hidden:
            yield from _command(f"{path} {name}", child)


def _plain(text: str) -> str:
    """Remove the mark of paragraphs that are not to be wrapped."""
    return text.replace("\b", "").strip()


def _parameter(parameter: Any) -> Iterator[str]:
    if getattr(parameter, "hidden", False):
        return
    is_argument = parameter.param_type_name == "argument"
    name = (
        (parameter.metavar or parameter.name.upper()) if is_argument else ", ".join(parameter.opts)
    )
    default = parameter.default
    shown = "required" if parameter.required else ""
    if not parameter.required and default not in (None, False, (), []) and not callable(default):
        shown = f"`{default}`" if default != "" else "`''`"
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
    yield f"| `{name.replace('|', '/')}` | {text} | {shown} |"
