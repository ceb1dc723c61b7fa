"""Walking a listing by cursors that cannot be trusted.

An empty page with a cursor is not the end; only a missing cursor is. A cursor that was seen
before would walk in circles: the page is asked for again, and when the circle stays the walk
ends incomplete. A stale cursor starts the listing anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from diffagent.errors import BadCursor, CivitaiError
from diffagent.schemas.payloads import flaw, whole_number

log = logging.getLogger(__name__)

Fetch = Callable[[str | None], "Page"]
#: Mark and reason of an entry that cannot be kept.
Drop = tuple[str, str]

_LOOP_TRIES = 5
_MAX_RESTARTS = 20
_MAX_PAGES = 1_000_000


@dataclass(frozen=True)
class Page:
    """Items of a page (records with an integer id) and the cursor of the next one.

    Attributes:
        dropped: a mark and a reason for each entry that is no record which can be kept
            (``diffagent.schemas.payloads.flaw``).
        text_ids: how many ids were numbers in quotes.
        source_drops: of a local server, how many records of its source it could not list: kind ->
            reason -> number.
    """

    items: tuple[dict[str, Any], ...]
    cursor: str | None
    dropped: tuple[Drop, ...] = ()
    text_ids: int = 0
    source_drops: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def malformed(self) -> int:
        """How many entries were left out."""
        return len(self.dropped)

    @classmethod
    def of(cls, items: list[Any], cursor: str | None, source_drops: Any = None) -> Page:
        """Sort out what is no item; the id of an item becomes an integer."""
        good, dropped, text_ids = [], [], 0
        for item in items:
            if reason := flaw(item):
                dropped.append((mark_of(item), reason))
                continue
            text_ids += isinstance(item["id"], str)
            item["id"] = whole_number(item["id"])
            good.append(item)
        return cls(tuple(good), cursor, tuple(dropped), text_ids, _counts(source_drops))


def mark_of(item: Any) -> str:
    """A name for an entry that may have no id: it is counted once however often it comes."""
    ident = whole_number(item.get("id")) if isinstance(item, dict) else None
    if ident is not None:
        return str(ident)
    try:
        return hashlib.blake2b(orjson.dumps(item), digest_size=8).hexdigest()
    except TypeError:
        return "nested too deeply to tell it from others"


def _counts(drops: Any) -> dict[str, dict[str, int]]:
    """Numbers by kind and reason, as far as a server's metadata states any."""
    return {
        str(kind): {
            str(reason): number
            for reason, number in reasons.items()
            if type(number) is int and 0 < number < 2**53
        }
        for kind, reasons in (drops.items() if isinstance(drops, dict) else ())
        if isinstance(reasons, dict)
    }


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
