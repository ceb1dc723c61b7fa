"""Walking a listing by cursors that cannot be trusted.

An empty page with a cursor is not the end; only a missing cursor is. A cursor that was seen
before would walk in circles: the page is asked for again, and when the circle stays the walk
ends incomplete. A stale cursor starts the listing anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from diffagent.errors import BadCursor, CivitaiError
from schemas.civitai import whole_number

log = logging.getLogger(__name__)

Fetch = Callable[[str | None], "Page"]

_LOOP_TRIES = 5
_MAX_RESTARTS = 20
_MAX_PAGES = 1_000_000


@dataclass(frozen=True)
class Page:
    """Items of a page (objects with an integer id) and the cursor of the next one.

    ``malformed`` counts entries that were left out because they are no such objects, and
    ``text_ids`` those whose id was a number in quotes.
    """

    items: tuple[dict[str, Any], ...]
    cursor: str | None
    malformed: int = 0
    text_ids: int = 0

    @classmethod
    def of(cls, items: list[Any], cursor: str | None) -> Page:
        """Sort out what is no item; the id of an item becomes an integer."""
        good = [i for i in items if isinstance(i, dict) and whole_number(i.get("id")) is not None]
        text_ids = 0
        for item in good:
            text_ids += isinstance(item["id"], str)
            item["id"] = whole_number(item["id"])
        return cls(tuple(good), cursor, len(items) - len(good), text_ids)


class Walk:
    """Iterates over the pages of a listing, from ``cursor`` on.

    Attributes:
        complete: False once a circle was met that would not open.
        loops, restarts: how often the site led back, or made the cursors stale.
        asked: the cursor with which the last page was asked for; None: the listing's start.
    """

    def __init__(self, fetch: Fetch, cursor: str | None = None, seen: Iterable[str] = ()) -> None:
        self._fetch = fetch
        self._cursor = cursor
        self._seen = set(seen)
        self.complete = True
        self.asked = cursor
        self.loops = 0
        self.restarts = 0

    def __iter__(self) -> Iterator[Page]:
        for _ in range(_MAX_PAGES):
            try:
                page = self._fetch_forward()
            except BadCursor as error:
                self._restart(error)
                continue
            yield page
            if page.cursor is None:
                return
            self._seen.add(page.cursor)
            self._cursor = page.cursor
        self.complete = False

    def _fetch_forward(self) -> Page:
        """The page at the cursor; without a next cursor when all it gives are circles."""
        self.asked = self._cursor
        page = self._fetch(self._cursor)
        for _ in range(_LOOP_TRIES):
            if page.cursor is None or page.cursor not in self._seen:
                return page
            self.loops += 1
            page = self._fetch(self._cursor)
        if page.cursor is None or page.cursor not in self._seen:
            return page
        log.warning("the listing leads in a circle at cursor %r; this walk ends here", page.cursor)
        self.complete = False
        return replace(page, cursor=None)

    def _restart(self, error: BadCursor) -> None:
        self.restarts += 1
        if self._cursor is None or self.restarts > _MAX_RESTARTS:
            raise CivitaiError(
                f"cursors became stale {self.restarts} times in one listing ({error}); "
                "try again later"
            ) from None
        log.info("cursor %r is stale; the listing starts anew", self._cursor)
        self._cursor = None
        self._seen.clear()


def walk(fetch: Fetch) -> Iterator[dict[str, Any]]:
    """Items of a whole listing, each id once.

    Raises:
        CivitaiError: the listing leads in a circle.
    """
    pages, known = Walk(fetch), set[int]()
    for page in pages:
        for item in page.items:
            if item["id"] not in known:
                known.add(item["id"])
                yield item
    if not pages.complete:
        raise CivitaiError("the listing leads in a circle; list it in another order")
