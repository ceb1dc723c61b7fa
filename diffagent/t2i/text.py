"""Plain text from the HTML of descriptions."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from html.parser import HTMLParser

_SPACES = re.compile(r"\s+")
_BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "li", "br", "hr", "div", "pre", "blockquote"})
_HIDDEN = frozenset({"script", "style", "iframe"})


class _Enough(Exception):  # noqa: N818 - no error, but the way out of a parser
    """The rest of a text is not wanted."""


class _Text(HTMLParser):
    """Collects the text of HTML; blocks begin and end lines, some elements hold no text.

    Stops at a text of more than ``enough`` characters, with single spaces between words.
    """

    def __init__(self, enough: float) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._missing = enough
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n")
        self._hidden += tag in _HIDDEN

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n")
        if tag in _HIDDEN:
            self._hidden = max(self._hidden - 1, 0)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
            self._missing -= len(" ".join(data.split()))
            if self._missing < 0:
                raise _Enough


def plain_text(description: str | None, enough: float = math.inf) -> str:
    """The text of a description: one line a paragraph, without markup, scripts or pictures.

    Of a text of more than ``enough`` characters it is a beginning that has more than those.
    """
    if not description:
        return ""
    # Not BeautifulSoup: a build reads a description per model, and the tree is not wanted.
    parser = _Text(enough)
    with suppress(_Enough):
        parser.feed(description)
        parser.close()
    lines = (_SPACES.sub(" ", line).strip() for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)
