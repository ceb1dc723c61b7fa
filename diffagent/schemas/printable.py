"""Text of strangers, made safe to print, to log and to put into a table."""

from __future__ import annotations

import json
import logging
from typing import Any

#: Joiners: invisible, harmless, and part of words and emoji.
_JOINERS = frozenset("\u200c\u200d")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return a text with every control character as an escape sequence.

    Terminal sequences, bidirectional overrides, line separators and lone surrogates become visible:
    a carriage return becomes ``\r``. Letters of any script, spaces and emoji stay.

    Args:
        text: anything; its ``str`` is taken.
        lines: keep newlines and tabs, for text whose lines are the program's own.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    keep = _JOINERS | {"\n", "\t"} if lines else _JOINERS
    return "".join(
        char if char in keep or char.isprintable() else repr(char)[1:-1] for char in plain
    )


def printable_json(text: str) -> str:
    """Return JSON with what ``printable`` escapes as JSON's own escapes: the same value."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in _JOINERS else json.dumps(char)[1:-1] for char in text
    )


class PrintableFormatter(logging.Formatter):
    """Formats records with ``printable`` messages; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return printable(super().formatException(ei), lines=True)


def log_to_terminal() -> None:
    """Send log records to standard error, ``printable``, unless someone has set logging up."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
