"""Walks through the site's listings that miss nothing, each page in the journal."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from diffagent.civitai.pagination import FetchPage, ListingWalk, Page
from diffagent.crawl.call_pool import Steps
from diffagent.crawl.crawl_state import CrawlState, WalkState
from diffagent.errors import CivitaiError

log = logging.getLogger(__name__)

#: (sort, fewer) -> how to fetch a page of a listing in that order and with a limit lower by fewer
Pages = Callable[[str, int], FetchPage]


class ListingWalks:
    """Walks through listings, continued where the journal ends."""

    def __init__(self, state: CrawlState) -> None:
        self._state = state

    def walk(
        self,
        name: str,
        kind: str,
        pages: Pages,
        *,
        maximum: int | None = None,
        overlap: int | None = None,
        more: Callable[[int], None] = lambda number: None,
    ) -> Steps[None]:
        """Walk a listing until nothing can be missing.

        The first walk is newest first. A listing of more than one page is walked a second time with
        pages of another length: the site is known to leave out items where a page begins, and
        other pages begin elsewhere. When a walk ends in a circle, the same two start at the oldest
        end.

        Args:
            name: of the listing, for the journal.
            kind: of its items.
            pages: how to fetch a page.
            maximum: number of the newest items that are kept.
            overlap: end a walk after more than this number of pages without news in a row; None
                walks to the end.
            more: called with the number of new items of a page.
        """
        walk = partial(self._walk, kind=kind, more=more)
        first = yield from walk(f"{name}#0", pages("Newest", 0), maximum, overlap)
        if first.pages <= 1 or (overlap is not None and first.quiet == first.pages):
            return
        second = yield from walk(f"{name}#1", pages("Newest", 1), maximum, overlap)
        if first.complete and second.complete:
            return
        log.warning("listing %r leads in a circle; it is walked from the other end", name)
        third = yield from walk(f"{name}#2", pages("Oldest", 0))
        fourth = yield from walk(f"{name}#3", pages("Oldest", 1))
        if not (third.complete or fourth.complete):
            raise CivitaiError(
                f"listing {name!r} leads in a circle from either end; the site is broken for it "
                "now: run the crawl again later, it continues from here"
            )

    def has_reached_end(self, name: str) -> bool:
        """Whether the first walk of listing ``name`` reached the listing's end."""
        return self._state.walks.get(f"{name}#0", WalkState()).has_reached_end

    def _walk(
        self,
        key: str,
        fetch: FetchPage,
        maximum: int | None = None,
        overlap: int | None = None,
        *,
        kind: str,
        more: Callable[[int], None],
    ) -> Steps[WalkState]:
        state = self._state
        reached = state.walks.setdefault(key, WalkState())
        if reached.done:
            return reached
        walk = ListingWalk(fetch, reached.cursor, reached.seen)
        pages = iter(walk)
        while not reached.done:
            page: Page | None = yield partial(next, pages, None)
            if page is None:
                break
            new = state.unseen(kind, page.items)
            has_news = any(state.is_news(kind, item) for item in page.items)
            # An empty page is no sign of the end of the news.
            quiet = 0 if has_news else reached.quiet + bool(page.items)
            last = page.cursor is None or self._reaches_limit(kind, page, new, maximum)
            entry: dict[str, Any] = {
                "listing": key,
                "asked": walk.requested,
                "cursor": page.cursor,
                "done": last or (overlap is not None and quiet > overlap),
                "complete": walk.complete,
                "quiet": quiet,
            }
            state.drop(kind, page.dropped, entry)
            if page.source_drops:
                entry["source_drops"] = page.source_drops
            state.save(entry, kind, new)
            state.count(text_ids=page.text_ids)
            more(len(new))
        state.count(loops=walk.loops, restarts=walk.restarts)
        return reached

    def _reaches_limit(
        self, kind: str, page: Page, new: Iterable[dict[str, Any]], maximum: int | None
    ) -> bool:
        """Whether a walk from the newest on is behind the last item that will be kept."""
        if maximum is None or not page.items:
            return False
        ids = self._state.seen[kind] | {item["id"] for item in new}
        if len(ids) < maximum:
            return False
        return bool(min(item["id"] for item in page.items) <= heapq.nlargest(maximum, ids)[-1])
