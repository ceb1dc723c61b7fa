"""Walk through a listing by cursors that cannot be trusted.

An empty page with a cursor is not the end; only a missing cursor is. A repeated cursor would lead
in a circle: the page is requested again, and when the circle stays, the walk ends incomplete. A
stale cursor starts the listing again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs

import orjson

from diffagent.errors import BadCursor, CivitaiError, ServerError
from diffagent.schemas.payloads import flaw, whole_number

log = logging.getLogger(__name__)

#: Cursor (None: the listing's start) -> page
FetchPage = Callable[[str | None], "Page"]
#: Key and reason of an entry that cannot be kept.
DroppedEntry = tuple[str, str]

_LOOP_ATTEMPTS = 5
_MAX_RESTARTS = 20
_MAX_PAGES = 1_000_000
_MAX_CURSOR = 2_000  # characters: no server accepts a longer address


@dataclass(frozen=True)
class Page:
    """Items of a page (records with an integer id) and the cursor of the next one.

    Attributes:
        dropped: a key and a reason for each entry that cannot be kept as a record
            (``diffagent.schemas.payloads.flaw``).
        text_ids: number of ids that were numbers in quotes.
        source_drops: of a folder, the number of records that it could not list: kind -> reason ->
            number.
    """

    items: tuple[dict[str, Any], ...]
    cursor: str | None
    dropped: tuple[DroppedEntry, ...] = ()
    text_ids: int = 0
    source_drops: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def malformed(self) -> int:
        """Number of entries that were left out."""
        return len(self.dropped)

    @classmethod
    def of(cls, items: list[Any], cursor: str | None, source_drops: Any = None) -> Page:
        """Separate records from other entries; the id of a record becomes an integer."""
        records, dropped, text_ids = [], [], 0
        for item in items:
            if reason := flaw(item):
                dropped.append((entry_key(item), reason))
                continue
            text_ids += isinstance(item["id"], str)
            item["id"] = whole_number(item["id"])
            records.append(item)
        return cls(tuple(records), cursor, tuple(dropped), text_ids, _counts(source_drops))


def entry_key(item: Any) -> str:
    """Return a key of an entry that may have no id, so that its repetitions count once."""
    ident = whole_number(item.get("id")) if isinstance(item, dict) else None
    if ident is not None:
        return str(ident)
    try:
        return hashlib.blake2b(orjson.dumps(item), digest_size=8).hexdigest()
    except TypeError:
        return "nested too deeply to tell it from others"


def _counts(drops: Any) -> dict[str, dict[str, int]]:
    """Read numbers by kind and reason from a server's metadata, as far as it states any."""
    return {
        str(kind): {
            str(reason): number
            for reason, number in reasons.items()
            if type(number) is int and 0 < number < 2**53
        }
        for kind, reasons in (drops.items() if isinstance(drops, dict) else ())
        if isinstance(reasons, dict)
    }


def next_cursor(metadata: Mapping[str, Any]) -> str | None:
    """Return the cursor of the next page; of ``nextPage`` only its cursor is used, not its host.

    Raises:
        ServerError: the cursor has a form that no site uses.
    """
    cursor, page = metadata.get("nextCursor"), metadata.get("nextPage")
    if cursor is None and isinstance(page, str):
        query = parse_qs(page.partition("?")[2].partition("#")[0])
        if page and not query.keys() & {"cursor", "page"}:
            raise ServerError("a nextPage that names no next page")
        cursor = query.get("cursor", [None])[0]
    if cursor in (None, ""):
        return None
    if type(cursor) not in (str, int, float) or len(str(cursor)) > _MAX_CURSOR:
        raise ServerError(f"a cursor that is none, or too long: {type(cursor).__name__}")
    return str(cursor)


class ListingWalk:
    """Iterator over the pages of a listing, starting at ``cursor``.

    Attributes:
        complete: False after a circle that stayed.
        loops, restarts: number of times that a cursor repeated, or became stale.
        requested: cursor of the last request; None: the listing's start.
    """

    def __init__(
        self, fetch: FetchPage, cursor: str | None = None, seen: Iterable[str] = ()
    ) -> None:
        self._fetch = fetch
        self._cursor = cursor
        self._seen = set(seen)
        self.complete = True
        self.requested = cursor
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
        """Fetch the page at the cursor; without a next cursor when it only leads back."""
        self.requested = self._cursor
        page = self._fetch(self._cursor)
        for _ in range(_LOOP_ATTEMPTS):
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
        log.info("cursor %r is stale; the listing starts again", self._cursor)
        self._cursor = None
        self._seen.clear()


def walk_items(fetch: FetchPage) -> Iterator[dict[str, Any]]:
    """Yield the items of a whole listing, each id once.

    Raises:
        CivitaiError: the listing leads in a circle.
    """
    pages, ids = ListingWalk(fetch), set[int]()
    for page in pages:
        for item in page.items:
            if item["id"] not in ids:
                ids.add(item["id"])
                yield item
    if not pages.complete:
        raise CivitaiError("the listing leads in a circle; list it in another order")
