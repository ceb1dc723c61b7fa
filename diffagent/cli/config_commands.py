"""``diffagent config``: the settings of a run as a YAML file with comments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffagent.cli.options import Overrides, Verbose, parse_overrides
from diffagent.cli.render_commands import RELEASED_REWARDS

if TYPE_CHECKING:
    from collections.abc import Iterator

_WIDTH = 96
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minItems": "{} item or more",
    "multipleOf": "a multiple of {}",
}
_MISSING = object()
_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
    "object": "mapping",
}


def config(
    section: Annotated[
        str | None,
        typer.Argument(metavar="[SECTION]", help="Section to print, e.g. crawl or runtime.site."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Print the values of this YAML file instead of the defaults.",
        ),
    ] = None,
    settings: Overrides = None,
    verbose: Verbose = 0,
) -> None:
    """Print the settings of a run, with descriptions, units and limits, as a YAML file.

    diffagent config > run.yaml
    """
    from diffagent.run_config import configure, load_config

    overrides = parse_overrides(settings)
    if file:
        run = load_config(file, overrides)
    else:
        run = configure({"rewards": RELEASED_REWARDS}, overrides, "the command line")
    values, schema = run.model_dump(mode="json"), type(run).model_json_schema()
    typer.echo("\n".join(settings_lines(values, schema, section)))


def settings_lines(
    values: dict[str, Any], schema: dict[str, Any], section: str | None = None
) -> list[str]:
    """Return the lines of a commented YAML file.

    Args:
        values: the settings of a run, as JSON values.
        schema: JSON Schema of the run, with descriptions.
        section: dotted name of the only section to write.

    Raises:
        ConfigError: the run has no such section.
    """
    names = section.split(".") if section else []
    lines: list[str] = []
    node = schema
    for depth, name in enumerate(names):
        properties = _resolve(node, schema).get("properties", {})
        if name not in properties or not isinstance(values.get(name), dict):
            from diffagent.errors import ConfigError

            sections = ", ".join(key for key, value in values.items() if isinstance(value, dict))
            raise ConfigError(f"no section {section!r} in a run; choose one of: {sections}")
        lines += [*_comment(_about(properties[name], schema), 2 * depth)]
        lines.append(f"{'  ' * depth}{name}:")
        node, values = properties[name], values[name]
    return [*lines, *_mapping(values, _resolve(node, schema), schema, 2 * len(names))]


def _mapping(
    values: dict[str, Any], node: dict[str, Any], schema: dict[str, Any], indent: int
) -> Iterator[str]:
    """Yield the lines of a section: for each key its comment, its name and its value."""
    for name, value in values.items():
        field = node["properties"][name]
        if indent == 0:
            yield ""
        yield from _comment(_about(field, schema, value), indent)
        inner = _resolve(field, schema)
        if "properties" in inner:
            yield f"{' ' * indent}{name}:"
            yield from _mapping(value, inner, schema, indent + 2)
            continue
        item = _resolve(inner.get("items", {}), schema)
        for key, part in item.get("properties", {}).items():
            yield from _comment(f"- {key}: {_about(part, schema)}", indent + 2)
        if item.get("properties") and value:
            yield f"{' ' * indent}{name}:"
            yield from (f"{' ' * indent}  - {_flow(element)}" for element in value)
        else:
            yield f"{' ' * indent}{name}: {_flow(value)}"


def _about(field: dict[str, Any], schema: dict[str, Any], value: Any = _MISSING) -> str:
    """Return the comment of a setting: description, type, limits; default unlike ``value``."""
    inner = _resolve(field, schema)
    text = str(field.get("description") or inner.get("description", ""))
    text = " ".join(text.split("\n\n", maxsplit=1)[0].split())
    text = text if text.endswith("...") else text.rstrip(".")
    if "properties" in inner:
        return text
    facts = _type(inner, schema)
    if value is not _MISSING and "default" in field and field["default"] != value:
        facts += f"; default {_flow(field['default'])}"
    return f"{text} ({facts})".strip()


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return the type and the limits of a value in words."""
    field = _resolve(field, schema)
    if options := field.get("anyOf"):
        return " or ".join(dict.fromkeys(_type(option, schema) for option in options))
    if choices := field.get("enum"):
        return f"one of {', '.join(map(str, choices))}"
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        items = _resolve(field.get("items", {}), schema)
        kind = "list" if "properties" in items else f"list, each {_type(items, schema)}"
    else:
        kind = _TYPES.get(field.get("type", ""), "value")
    bounds = [words.format(f"{field[key]:g}") for key, words in _BOUNDS.items() if key in field]
    return ", ".join([kind, *bounds])


def _resolve(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return the definition that a field refers to, or the field."""
    name = field.get("$ref", "").rpartition("/")[2]
    return schema["$defs"][name] if name else field


def _comment(text: str, indent: int) -> Iterator[str]:
    import textwrap

    for line in textwrap.wrap(text, _WIDTH - indent, break_on_hyphens=False):
        yield f"{' ' * indent}# {line}"


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    import yaml

    text = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("...\n").strip()
