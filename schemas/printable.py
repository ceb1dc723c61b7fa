"""Text of strangers, made safe to print, to log and to put into a table."""

from __future__ import annotations

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
