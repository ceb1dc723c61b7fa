"""Reading of YAML files with limits, so that a hostile file cannot exhaust the machine.

PyYAML keeps the last of two equal keys and expands references without limit. Here a duplicate key
is an error with its line, and nesting, references and size are limited.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES = 2**20
_MAX_DEPTH = 32
#: Limit of the values of a document with each reference (``*name``) expanded.
_MAX_VALUES = 20_000


class YamlError(ValueError):
    """A text cannot be read as YAML; the message states the place."""


def read_yaml(path: Path) -> Any:
    """Read a YAML file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        OSError: the file cannot be read.
        YamlError: it is not YAML, has a key twice, nests too deeply, or is too large.
    """
    with path.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise YamlError(f"larger than {_MAX_BYTES // 2**20} MiB, the limit of a configuration")
    return parse_yaml(data)


def parse_yaml(text: str | bytes) -> Any:
    """Parse a YAML text.

    Raises:
        YamlError: it is not YAML, has a key twice, nests too deeply, or is too large.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, ())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except YamlError:
        raise
    except yaml.reader.ReaderError as error:
        raise YamlError(
            f"not UTF-8 at byte {error.position} ({error.reason}); save it as UTF-8"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{place}{error.problem or error.context}") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # PyYAML's constructors raise Python's own errors, e.g. for !!int "" and 2001-99-99.
        raise YamlError(f"a value cannot be read: {type(error).__name__}: {error}") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that limits the depth and refuses duplicate keys."""

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node; refuse one that nests too deeply."""
        if self._depth > _MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise YamlError(
                f"line {mark.line + 1}: nests deeper than {_MAX_DEPTH}; make it flatter"
            )
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping; refuse duplicate keys."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (name := (key.tag, key.value)) in seen:
                raise YamlError(
                    f"line {key.start_mark.line + 1}: {key.value!r:.80} is given twice; merge "
                    "the two entries"
                )
            elif isinstance(key, yaml.ScalarNode):
                seen.add(name)
        return node


def _count(node: yaml.Node, counts: dict[int, int], above: tuple[int, ...]) -> int:
    """Return the number of values of a node with its references expanded."""
    if id(node) in above or len(above) > _MAX_DEPTH:
        raise YamlError(
            f"line {node.start_mark.line + 1}: references nest without end, or deeper than "
            f"{_MAX_DEPTH}; write the values instead"
        )
    if id(node) not in counts:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        children = [n for part in parts for n in (part if isinstance(part, tuple) else (part,))]
        counts[id(node)] = 1 + sum(_count(n, counts, (*above, id(node))) for n in children)
    if counts[id(node)] > _MAX_VALUES:
        raise YamlError(
            f"line {node.start_mark.line + 1}: more than {_MAX_VALUES} values with its references "
            "written out"
        )
    return counts[id(node)]
