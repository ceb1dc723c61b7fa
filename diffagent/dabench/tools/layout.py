"""Plain text for a terminal: tables whose columns line up, and foreign text made harmless."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffagent.schemas.printable import printable


def one_line(value: object, limit: int = 0) -> str:
    """One line without control characters (a prompt may hold a terminal's escape codes).

    With ``limit`` a longer text is cut there and ends in an ellipsis.
    """
    text = " ".join(str(value).split())
    if limit and len(text) > limit:
        text = text[: limit - 1] + "…"
    return printable(text)


def paragraphs(parts: Iterable[Sequence[str]]) -> str:
    """Parts with an empty line between them; whatever a line holds, it is one, and harmless."""
    return "\n\n".join("\n".join(map(printable, part)) for part in parts if part)


def aligned(
    rows: Iterable[Sequence[object]], header: Sequence[str] = (), *, indent: int = 2
) -> list[str]:
    """Lines of a table; columns of numbers are set to the right, wide characters count double."""
    from rich.cells import cell_len

    body = [[_cell(value) for value in row] for row in rows]
    numeric = [
        all(isinstance(value, _Number) for value in column) for column in zip(*body, strict=True)
    ]
    lines = [*([list(header)] if header and body else []), *body]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    out = []
    for line in lines:
        cells = []
        for text, width, right in zip(line, widths, numeric, strict=True):
            space = " " * (width - cell_len(text))
            cells.append(space + text if right else text + space)
        out.append((" " * indent + "  ".join(cells)).rstrip())
    return out


class _Number(str):
    """The text of a number."""

    __slots__ = ()


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return one_line("-" if value is None else value)
    return _Number(f"{value:,}" if isinstance(value, int) else f"{value:,.1f}")


def share(count: int, total: int) -> str:
    """A part of a whole in percent."""
    return f"{100 * count / max(total, 1):.1f} %"
