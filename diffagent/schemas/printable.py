"""Escaping of untrusted text for terminals, logs and tables."""

from __future__ import annotations

import json
import logging
from typing import Any

#: Zero-width joiners: invisible, harmless, and part of words and emoji.
_JOINERS = frozenset("\u200c\u200d")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return a text with every control character as an escape sequence.

    Terminal sequences, bidirectional overrides, line separators and lone surrogates become visible:
    a carriage return becomes ``\r``. Letters of any script, spaces and emoji are unchanged.

    Args:
        text: any object; its ``str`` is used.
        lines: keep newlines and tabs, for text whose lines this program wrote.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    keep = _JOINERS | {"\n", "\t"} if lines else _JOINERS
    return "".join(
        char if char in keep or char.isprintable() else repr(char)[1:-1] for char in plain
    )


def printable_json(text: str) -> str:
    """Return JSON of the same value with the characters that ``printable`` escapes as \\uXXXX."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in _JOINERS else json.dumps(char)[1:-1] for char in text
    )


class PrintableFormatter(logging.Formatter):
    """Formatter of log records with ``printable`` messages; tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return printable(super().formatException(ei), lines=True)


def log_to_terminal() -> None:
    """Log to standard error with ``PrintableFormatter``, unless logging is set up already."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
