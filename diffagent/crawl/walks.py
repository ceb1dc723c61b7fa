"""How a crawl fetches: walks through listings, several at once, every page in the journal.

What is to be fetched is written as generators that yield a call to the site and are sent its
answer (``Steps``). ``Walks.run`` carries them on: threads make the calls, and everything else
happens in the one thread that writes the journal. So the rate limit, not the latency of the site,
decides how fast a crawl is, and neither order nor number of threads shows in its result.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import orjson

from diffagent.civitai.address import Address
from diffagent.civitai.pagination import DroppedEntry, FetchPage, ListingWalk, Page
from diffagent.civitai.site import Site
from diffagent.crawl.journal import Item, Journal
from diffagent.crawl.known import Known, annotate, creator_of, downloads_of, has_meta
from diffagent.errors import ArtifactError, CivitaiError, ServerError
from diffagent.schemas.payloads import canonical, unwrap_meta, versions_of, whole_number
from diffagent.schemas.printable import printable
from diffagent.threads import ContextThreadPool

log = logging.getLogger(__name__)

T = TypeVar("T")
#: Yields calls to the site, is sent their answers, and returns a T.
Steps = Generator[Callable[[], Any], Any, T]
#: (sort, fewer) -> how to fetch a page of a listing in that order and with a shorter limit
Pages = Callable[[str, int], FetchPage]

_MAX_FAILED = 0.01


@dataclass(slots=True)
class WalkState:
    """How far one walk has come. ``quiet``: pages with nothing new in a row, so far."""

    cursor: str | None = None
    seen: list[str] = field(default_factory=list)
    done: bool = False
    complete: bool = True
    pages: int = 0
    quiet: int = 0

    @property
    def whole(self) -> bool:
        """Whether the walk reached the listing's end without meeting a circle."""
        return self.done and self.complete and self.cursor is None


class Walks:
    """What was fetched so far: rebuilt from the journal, then carried on.

    Attributes:
        seen: ids of each kind that this crawl has fetched.
        versions, downloads: of each model that it has fetched.
        creators: of each version of these.
        showcases: versions whose showcase it has fetched.
        hollow: images that have lost their metadata, so that the known record stays.
        judged: (kind, id) -> whether it is gone, where the site was asked for it singly.
    """

    def __init__(
        self,
        site: Site,
        journal: Journal,
        *,
        threads: int = 1,
        budget_seconds: float | None = None,
        known: Known | None = None,
    ) -> None:
        self._site, self._journal, self._threads = site, journal, threads
        self._budget, self._known = budget_seconds, known
        self._started = time.monotonic()
        self.seen: dict[str, set[int]] = {"models": set(), "images": set(), "pages": set()}
        self.versions: dict[int, list[int]] = {}
        self.downloads: dict[int, int] = {}
        self.creators: dict[int, str | None] = {}
        self.showcases: set[int] = set()
        self.hollow: set[int] = set()
        self.judged: dict[tuple[str, int], bool] = {}
        self.failed: dict[str, list[int]] = {}
        self.on_item: Callable[[str, dict[str, Any]], None] = lambda kind, item: None
        self._walks: dict[str, WalkState] = {}
        #: Kind -> mark of what cannot be kept -> reason; what a local server could not list.
        self._dropped: dict[str, dict[str, str]] = {}
        self._source_drops: Mapping[str, Mapping[str, int]] = {}
        names = ("loops", "restarts", "repeated", "malformed", "text_ids", "hollow")
        self._counts = dict.fromkeys(names, 0)
        self._fetched = 0

    def resume(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take up the journal if it is of this request, else clear it.

        Args:
            request: what is crawled; ``date`` in it may differ.

        Returns:
            The request as it was when the crawl began.
        """
        entries = self._journal.read()
        first = next(entries, None)
        begun: dict[str, Any] = first.state.get("request", {}) if first else {}
        if begun and {**begun, "date": None} == {**request, "date": None}:
            for entry in entries:
                try:
                    self._take(entry.state, entry.items)
                except (ValueError, KeyError, TypeError) as error:
                    raise ArtifactError(
                        f"{str(self._journal.path)!r} holds a page of another version of this "
                        f"program ({type(error).__name__}: {error}); move it away: the crawl then "
                        "begins again, from the last snapshot when there is one"
                    ) from None
            fetched = {kind: len(ids) for kind, ids in self.seen.items() if ids}
            log.info("going on after %s", fetched)
            return begun
        entries.close()
        self._journal.clear()
        self._journal.append({"request": request})
        return request

    def metrics(self) -> dict[str, Any]:
        """What this process did; a resumed crawl does not count what was done before."""
        return {
            "requests": self._site.requests,
            "retries": self._site.retries,
            "items_fetched": self._fetched,
            "failed_galleries": self.failed.get("gallery", []),
            "unanswered": sum(len(ids) for ids in self.failed.values()),
            **self._counts,
        }

    # Carrying on

    def run(self, jobs: Iterable[Steps[None]], *, threads: int | None = None) -> None:
        """Carry jobs on to their ends, several at a time, in the order given."""
        waiting, number = iter(jobs), threads or self._threads
        running: dict[Future[Any], Steps[None]] = {}

        def carry_on(job: Steps[None], step: Callable[[], Callable[[], Any]]) -> None:
            try:
                call = step()
            except StopIteration:
                return
            running[pool.submit(call)] = job

        with ContextThreadPool(number, thread_name_prefix="crawl") as pool:
            try:
                while True:
                    while len(running) < number and (job := next(waiting, None)) is not None:
                        carry_on(job, partial(next, job))
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job, error = running.pop(future), future.exception()
                        if error:
                            carry_on(job, partial(job.throw, error))
                        else:
                            carry_on(job, partial(job.send, future.result()))
            except BaseException:
                self._site.stop()
                raise

    def answers(
        self, calls: Iterable[tuple[int, Callable[[], T]]], threads: int | None = None
    ) -> Iterator[tuple[int, Callable[[], T]]]:
        """Make calls, several at a time; yields each call's id and a function that gives its
        answer (or raises its error), in the order of the calls.
        """
        number = threads or self._threads
        asked: deque[tuple[int, Future[T]]] = deque()
        with ContextThreadPool(number, thread_name_prefix="crawl") as pool:
            try:
                for ident, call in calls:
                    asked.append((ident, pool.submit(call)))
                    if len(asked) == number:
                        first, future = asked.popleft()
                        yield first, future.result
                for last, future in asked:
                    yield last, future.result
            except BaseException:
                self._site.stop()
                pool.shutdown(cancel_futures=True)
                raise

    def listing(
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

        It is walked newest first. One of more than one page is walked a second time with pages of
        another length: the site is known to leave out items where a page begins, and other pages
        begin elsewhere. When a walk ends in a circle, the same two are made from the oldest end.

        Args:
            name: of the listing, for the journal.
            kind: of its items.
            pages: how to fetch a page.
            maximum: how many of the newest items are wanted.
            overlap: end a walk when so many pages and one had nothing new; None walks to the end.
            more: called with the number of items that a page brought.
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
                "now: run the crawl again later, it goes on from here"
            )

    def walked_whole(self, name: str) -> bool:
        """Whether listing ``name`` was walked to its end."""
        return self._walks.get(f"{name}#0", WalkState()).whole

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
        reached = self._walks.setdefault(key, WalkState())
        if reached.done:
            return reached
        walk = ListingWalk(fetch, reached.cursor, reached.seen)
        pages = iter(walk)
        while not reached.done:
            page: Page | None = yield partial(next, pages, None)
            if page is None:
                break
            new = self.unseen(kind, page.items)
            news = any(self._is_news(kind, item) for item in page.items)
            # An empty page in the middle says nothing.
            quiet = 0 if news else reached.quiet + bool(page.items)
            last = page.cursor is None or self._reaches_limit(kind, page, new, maximum)
            state: dict[str, Any] = {
                "listing": key,
                "asked": walk.requested,
                "cursor": page.cursor,
                "done": last or (overlap is not None and quiet > overlap),
                "complete": walk.complete,
                "quiet": quiet,
            }
            self.drop(kind, page.dropped, state)
            if page.source_drops:
                state["source_drops"] = page.source_drops
            self.save(state, kind, new)
            self._counts["text_ids"] += page.text_ids
            more(len(new))
        self._counts["loops"] += walk.loops
        self._counts["restarts"] += walk.restarts
        return reached

    def drop(self, kind: str, dropped: Iterable[DroppedEntry], state: dict[str, Any]) -> None:
        """Count what cannot be kept, each once, and write it into a ``state`` to be saved."""
        known = self._dropped.get(kind, {})
        new = {mark: reason for mark, reason in dropped if mark not in known}
        if new:
            reasons = "; ".join(sorted(set(new.values())))
            log.warning("%d of %s left out: %s", len(new), kind, printable(reasons))
            state["dropped"] = [kind, new]
            self._counts["malformed"] += len(new)

    def drops(self) -> dict[str, dict[str, int]]:
        """Count the records that were left out, by kind: reason -> number.

        Entries of answers that cannot be kept, and those of a local server's source, which it
        counts by the same rules and does not list.
        """
        result: dict[str, dict[str, int]] = {}
        for kind in ("images", "models"):
            counts = Counter(self._dropped.get(kind, {}).values())
            counts.update(self._source_drops.get(kind, {}))
            for reason, number in sorted(counts.items()):
                result.setdefault(kind, {})[printable(reason)[:100]] = number
        return result

    def unseen(self, kind: str, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the items, each once, that this crawl does not have yet."""
        seen = self.seen[kind]
        new: dict[int, dict[str, Any]] = {}
        for item in items:
            if item["id"] not in seen and not self.is_hollow(kind, item):
                new.setdefault(item["id"], item)
        self._counts["repeated"] += len(items) - len(new)
        return list(new.values())

    def _is_news(self, kind: str, item: dict[str, Any]) -> bool:
        if self._known is None:
            return True
        known = self._known.has_model(item) if kind == "models" else None
        return not (self._known.has_image(item["id"]) if known is None else known)

    def is_hollow(self, kind: str, item: dict[str, Any]) -> bool:
        """Whether a record says less than the good one that is known, and so must not replace it.

        A model without a name or a list of versions, and a picture that has lost its metadata:
        the site has answered both for days.
        """
        if self._known is None:
            return False
        if kind == "models":
            hollow = item["id"] in self._known.models and not (
                item.get("name") and isinstance(item.get("modelVersions"), list)
            )
        else:
            mark = self._known.images.get(item["id"])
            hollow = mark is not None and has_meta(mark) and not unwrap_meta(item.get("meta"))
            if hollow:
                self.hollow.add(item["id"])
        self._counts["hollow"] += hollow
        return hollow

    def _reaches_limit(
        self, kind: str, page: Page, new: Iterable[dict[str, Any]], maximum: int | None
    ) -> bool:
        """Whether a walk from the newest on is behind the last item that will be kept."""
        if maximum is None or not page.items:
            return False
        ids = self.seen[kind] | {item["id"] for item in new}
        if len(ids) < maximum:
            return False
        return bool(min(item["id"] for item in page.items) <= heapq.nlargest(maximum, ids)[-1])

    # What is remembered

    def save(
        self, state: dict[str, Any], kind: str = "", new: Iterable[dict[str, Any]] = ()
    ) -> None:
        """Write a page and the state after it to the journal.

        Raises:
            CivitaiError: the crawl's time is up; retryable.
        """
        items = [(kind, item["id"], canonical(self._plain(kind, item))) for item in new]
        self._journal.append(state, items)
        self._take(state, items)
        self._fetched += len(items)
        if self._budget is not None and time.monotonic() - self._started > self._budget:
            spent = CivitaiError(
                f"runtime.crawl_budget_seconds ({self._budget:.0f}) are spent; fetched so far: "
                f"{len(self.seen['models']):,} models, {len(self.seen['images']):,} images, "
                f"{len(self.seen['pages']):,} pages; the same command goes on from here"
            )
            spent.retryable = True
            raise spent

    def judge(self, kind: str, ident: int, gone: bool) -> None:
        """Write down whether something is gone."""
        self.save({"judged": [kind, ident, gone]})

    def tolerate(self, error: ServerError, what: str, ident: int, total: int) -> None:
        """Go on without an answer, unless too many are missing.

        Raises:
            ServerError: more than 1 % of ``total`` are missing, and more than two.
        """
        failed = self.failed.setdefault(what, [])
        failed.append(ident)
        log.warning("%s %d is left as it is: %s", what, ident, error)
        if len(failed) > max(2, total * _MAX_FAILED):
            raise error

    def _take(self, state: dict[str, Any], items: Iterable[Item]) -> None:
        """Bring everything up to a page of the journal."""
        for kind, ident, data in items:
            self.seen[kind].add(ident)
            if kind == "models" or self._known is not None:
                item = orjson.loads(data)
                if kind == "models":
                    self.versions[ident] = list(versions_of(item))
                    self.downloads[ident] = downloads_of(item)
                    self.creators |= dict.fromkeys(self.versions[ident], creator_of(item))
                self.on_item(kind, item)
        if "dropped" in state:
            kind, drops = state["dropped"]
            self._dropped.setdefault(kind, {}).update(drops)
        self._source_drops = state.get("source_drops", self._source_drops)
        if "showcase" in state:
            self.showcases.add(state["showcase"])
        if "judged" in state:
            kind, ident, gone = state["judged"]
            self.judged[kind, ident] = gone
        if "cursor" not in state:
            return
        reached = self._walks.setdefault(state["listing"], WalkState())
        if state["asked"] is None:  # the listing was started anew: old cursors mean nothing
            reached.seen.clear()
        if state["cursor"] is not None and not state["done"]:
            reached.seen.append(state["cursor"])
        reached.cursor, reached.done = state["cursor"], state["done"]
        reached.complete, reached.quiet = state["complete"], state["quiet"]
        reached.pages += 1
        if reached.done:
            reached.seen.clear()

    def _plain(self, kind: str, item: dict[str, Any]) -> dict[str, Any]:
        """An item without traces of how it was fetched, with the crawl that took it in first;
        ids that were in quotes are numbers.
        """
        meta = item.get("meta")
        if isinstance(meta, dict) and "id" in meta and "meta" in meta:
            item["meta"] = unwrap_meta(meta)
        if isinstance(item.get("modelVersionIds"), list):
            item["modelVersionIds"] = [self._number(i) for i in item["modelVersionIds"]]
        versions = item.get("modelVersions")
        for version in versions if isinstance(versions, list) else ():
            self._make_relative(version)
            if isinstance(version, dict) and "id" in version:
                version["id"] = self._number(version["id"])
            files = version.get("files") if isinstance(version, dict) else None
            for file in files if isinstance(files, list) else ():
                self._make_relative(file)
        if kind != "pages":
            annotate(kind, item, self._known)
        return item

    def _number(self, value: Any) -> Any:
        number = whole_number(value)
        self._counts["text_ids"] += number is not None and number != value
        return value if number is None else number

    def _make_relative(self, item: Any) -> None:
        link = item.get("downloadUrl") if isinstance(item, dict) else None
        if not isinstance(link, str):
            return
        try:
            address, parts = Address.parse(link), urlsplit(link)
        except ValueError:
            return  # not the site's; what it is good for is seen when it is used
        if address.origin == self._site.origin or address.is_site:
            item["downloadUrl"] = parts.path + (f"?{parts.query}" if parts.query else "")
