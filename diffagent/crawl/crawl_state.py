"""State of a crawl: everything that was fetched so far, rebuilt from the journal."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from diffagent.civitai.pagination import DroppedEntry
from diffagent.civitai.site import Site
from diffagent.crawl.journal import Item, Journal
from diffagent.crawl.snapshot_index import SnapshotIndex, creator_of, downloads_of, has_meta
from diffagent.crawl.stored_form import to_stored_form
from diffagent.errors import ArtifactError, CivitaiError, ServerError
from diffagent.schemas.payloads import canonical, unwrap_meta, versions_of
from diffagent.schemas.printable import printable

log = logging.getLogger(__name__)

_MAX_FAILED = 0.01
_COUNTS = ("loops", "restarts", "repeated", "malformed", "text_ids", "hollow")


@dataclass(slots=True)
class WalkState:
    """Progress of one walk. ``quiet``: number of pages without news in a row, up to now."""

    cursor: str | None = None
    seen: list[str] = field(default_factory=list)
    done: bool = False
    complete: bool = True
    pages: int = 0
    quiet: int = 0

    @property
    def has_reached_end(self) -> bool:
        """Whether the walk reached the listing's end without meeting a circle."""
        return self.done and self.complete and self.cursor is None


class CrawlState:
    """Everything that a crawl has fetched, as its journal states it.

    Args:
        site: of the crawl.
        journal: its pages.
        budget_seconds: time after which ``save`` ends this process's part of the crawl.
        previous: the snapshot before this crawl, if any.

    Attributes:
        seen: ids of each kind that this crawl has fetched.
        versions, downloads: of each model that it has fetched.
        creators: of each version of these.
        showcases: versions whose showcase it has fetched.
        hollow: images that have lost their metadata, so that their earlier record stays.
        judged: (kind, id) -> whether the item is gone, where it was requested singly.
        failed: kind of call -> ids without an answer.
        walks: progress of each walk through a listing.
        on_item: called with the kind and record of each new item.
    """

    def __init__(
        self,
        site: Site,
        journal: Journal,
        *,
        budget_seconds: float | None = None,
        previous: SnapshotIndex | None = None,
    ) -> None:
        self._site, self._journal = site, journal
        self._budget, self._previous = budget_seconds, previous
        self._started = time.monotonic()
        self.seen: dict[str, set[int]] = {"models": set(), "images": set(), "pages": set()}
        self.versions: dict[int, list[int]] = {}
        self.downloads: dict[int, int] = {}
        self.creators: dict[int, str | None] = {}
        self.showcases: set[int] = set()
        self.hollow: set[int] = set()
        self.judged: dict[tuple[str, int], bool] = {}
        self.failed: dict[str, list[int]] = {}
        self.walks: dict[str, WalkState] = {}
        self.on_item: Callable[[str, dict[str, Any]], None] = lambda kind, item: None
        #: Kind -> key of an entry that cannot be kept -> reason.
        self._dropped: dict[str, dict[str, str]] = {}
        #: Of a folder, the records that it could not list: kind -> reason -> number.
        self._source_drops: Mapping[str, Mapping[str, int]] = {}
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._fetched = 0

    def resume(self, request: dict[str, Any]) -> dict[str, Any]:
        """Continue the journal if it is of this request, else clear it.

        Args:
            request: identifies the crawl; its ``date`` may differ.

        Returns:
            The request as it was when the crawl began.
        """
        entries = self._journal.read()
        first = next(entries, None)
        begun: dict[str, Any] = first.state.get("request", {}) if first else {}
        if begun and {**begun, "date": None} == {**request, "date": None}:
            for entry in entries:
                try:
                    self._apply(entry.state, entry.items)
                except (ValueError, KeyError, TypeError) as error:
                    raise ArtifactError(
                        f"{str(self._journal.path)!r} holds a page of another version of this "
                        f"program ({type(error).__name__}: {error}); move it away: the crawl then "
                        "begins again, from the last snapshot when there is one"
                    ) from None
            fetched = {kind: len(ids) for kind, ids in self.seen.items() if ids}
            log.info("continuing after %s", fetched)
            return begun
        entries.close()
        self._journal.clear()
        self._journal.append({"request": request})
        return request

    # Reports

    def count(self, **numbers: int) -> None:
        """Add to the counters of the metrics."""
        for name, number in numbers.items():
            self._counts[name] += number

    def metrics(self) -> dict[str, Any]:
        """Return the counters of this process; a resumed crawl omits those of earlier ones."""
        return {
            "requests": self._site.requests,
            "retries": self._site.retries,
            "items_fetched": self._fetched,
            "failed_galleries": self.failed.get("gallery", []),
            "unanswered": sum(len(ids) for ids in self.failed.values()),
            **self._counts,
        }

    def drops(self) -> dict[str, dict[str, int]]:
        """Count the records that were left out, by kind: reason -> number.

        These are entries of answers that cannot be kept, and records that a folder cannot list,
        which it counts by the same rules.
        """
        result: dict[str, dict[str, int]] = {}
        for kind in ("images", "models"):
            counts = Counter(self._dropped.get(kind, {}).values())
            counts.update(self._source_drops.get(kind, {}))
            for reason, number in sorted(counts.items()):
                result.setdefault(kind, {})[printable(reason)[:100]] = number
        return result

    # Items of an answer

    def unseen(self, kind: str, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those of the items, each once, that this crawl does not have yet."""
        seen = self.seen[kind]
        new: dict[int, dict[str, Any]] = {}
        for item in items:
            if item["id"] not in seen and not self._is_hollow(kind, item):
                new.setdefault(item["id"], item)
        self._counts["repeated"] += len(items) - len(new)
        return list(new.values())

    def is_news(self, kind: str, item: dict[str, Any]) -> bool:
        """Whether the previous snapshot lacks an item."""
        if self._previous is None:
            return True
        if kind == "models":
            return not self._previous.has_model(item)
        return not self._previous.has_image(item["id"])

    def _is_hollow(self, kind: str, item: dict[str, Any]) -> bool:
        """Whether a record states less than its earlier record, and so must not replace it.

        A model without a name or a list of versions, and a picture that has lost its metadata:
        the site has answered both for days.
        """
        if self._previous is None:
            return False
        if kind == "models":
            hollow = item["id"] in self._previous.models and not (
                item.get("name") and isinstance(item.get("modelVersions"), list)
            )
        else:
            mark = self._previous.images.get(item["id"])
            hollow = mark is not None and has_meta(mark) and not unwrap_meta(item.get("meta"))
            if hollow:
                self.hollow.add(item["id"])
        self._counts["hollow"] += hollow
        return hollow

    def drop(self, kind: str, dropped: Iterable[DroppedEntry], state: dict[str, Any]) -> None:
        """Count entries that cannot be kept, each once, and add them to a ``state`` to save."""
        before = self._dropped.get(kind, {})
        new = {key: reason for key, reason in dropped if key not in before}
        if new:
            reasons = "; ".join(sorted(set(new.values())))
            log.warning("%d of %s left out: %s", len(new), kind, printable(reasons))
            state["dropped"] = [kind, new]
            self._counts["malformed"] += len(new)

    # Changes of the state

    def save(
        self, state: dict[str, Any], kind: str = "", new: Iterable[dict[str, Any]] = ()
    ) -> None:
        """Write a page and the state after it to the journal.

        Raises:
            CivitaiError: the crawl's time is up; retryable.
        """
        items: list[Item] = []
        for item in new:
            text_ids = to_stored_form(kind, item, self._site.origin, self._previous)
            self._counts["text_ids"] += text_ids
            items.append((kind, item["id"], canonical(item)))
        self._journal.append(state, items)
        self._apply(state, items)
        self._fetched += len(items)
        if self._budget is not None and time.monotonic() - self._started > self._budget:
            spent = CivitaiError(
                f"runtime.site.budget_seconds ({self._budget:.0f}) are spent; fetched so far: "
                f"{len(self.seen['models']):,} models, {len(self.seen['images']):,} images, "
                f"{len(self.seen['pages']):,} pages; the same command goes on from here"
            )
            spent.retryable = True
            raise spent

    def judge(self, kind: str, ident: int, gone: bool) -> None:
        """Record whether an item is gone."""
        self.save({"judged": [kind, ident, gone]})

    def tolerate(self, error: ServerError, call: str, ident: int, total: int) -> None:
        """Continue without an answer, unless too many are missing.

        Raises:
            ServerError: more than 1 % of ``total`` are missing, and more than two.
        """
        failed = self.failed.setdefault(call, [])
        failed.append(ident)
        log.warning("%s %d is left as it is: %s", call, ident, error)
        if len(failed) > max(2, total * _MAX_FAILED):
            raise error

    def _apply(self, state: dict[str, Any], items: Iterable[Item]) -> None:
        """Change the state by a page of the journal."""
        for kind, ident, data in items:
            self.seen[kind].add(ident)
            if kind == "models" or self._previous is not None:
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
        if "cursor" in state:
            self._advance(self.walks.setdefault(state["listing"], WalkState()), state)

    @staticmethod
    def _advance(walk: WalkState, state: dict[str, Any]) -> None:
        """Change a walk by the page that it fetched."""
        if state["asked"] is None:  # the listing started again: old cursors mean nothing
            walk.seen.clear()
        if state["cursor"] is not None and not state["done"]:
            walk.seen.append(state["cursor"])
        walk.cursor, walk.done = state["cursor"], state["done"]
        walk.complete, walk.quiet = state["complete"], state["quiet"]
        walk.pages += 1
        if walk.done:
            walk.seen.clear()
