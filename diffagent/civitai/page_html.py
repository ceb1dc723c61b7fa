"""What is read from HTML: descriptions, and the state inside a model's page."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from html.parser import HTMLParser
from typing import Any

import orjson

from diffagent.errors import SchemaError

_SPACES = re.compile(r"\s+")
_BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "li", "br", "hr", "div", "pre", "blockquote"})
_HIDDEN = frozenset({"script", "style", "iframe"})
_MODEL_KEYS = ("checkpointType", "uploadType", "publishedAt", "updatedAt", "status")
_VERSION_KEYS = (
    "name",
    "clipSkip",
    "steps",
    "epochs",
    "settings",
    "recommendedResources",
    "canGenerate",
    "canDownload",
)


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


def page_settings(page: str) -> dict[str, Any]:
    """What only a model's page tells: checkpoint type and recommended settings per version.

    Returns:
        {'id', 'checkpointType', ..., 'versions': [{'id', 'settings', 'clipSkip', ...}]}, each key
        only where the page has it.

    Raises:
        SchemaError: the page has no ``__NEXT_DATA__`` with a model in a form known here.
    """
    from bs4 import BeautifulSoup  # slow to import, and a build reads no pages

    script = BeautifulSoup(page, "html.parser").find("script", id="__NEXT_DATA__")
    try:
        state = orjson.loads(script.get_text() if script else "")
    except orjson.JSONDecodeError as error:
        raise SchemaError(f"the page has no readable __NEXT_DATA__ ({error})") from None
    model = _find_model(state)
    if model is None:
        raise SchemaError("__NEXT_DATA__ holds no query model.getById", field="trpcState")
    versions = model.get("modelVersions")
    return {
        "id": model["id"],
        **{key: model[key] for key in _MODEL_KEYS if model.get(key) is not None},
        "versions": [
            {"id": v["id"], **{key: v[key] for key in _VERSION_KEYS if v.get(key) is not None}}
            for v in (versions if isinstance(versions, list) else [])
            if isinstance(v, dict) and isinstance(v.get("id"), int)
        ],
    }


def _find_model(state: Any) -> dict[str, Any] | None:
    """The data of the query ["model", "getById"], wherever the state keeps its queries."""
    waiting = [state]  # no recursion: pages are nested as deeply as they like
    while waiting:
        match waiting.pop():
            case {"queryKey": [["model", "getById"], *_], "state": {"data": dict(data)}}:
                if isinstance(data.get("id"), int):
                    return data
            case dict(part):
                waiting += reversed(part.values())
            case list(parts):
                waiting += reversed(parts)
    return None
