"""A refresh: a crawl that requests only what can have changed since a snapshot, and loses nothing.

1. Models, newest first, until a page has nothing new, and one page more (items are skipped where
   a page begins; after any news, pages of another length are walked as well).
2. Every other model of the snapshot by ``ids=`` batches of 100. One that a batch lacks is requested
   singly: after a 404 it gets a tombstone; an answer replaces its record; after a broken or empty
   answer, or none at all, the earlier record stays. Versions that a model lacks now are requested
   in the same way.
3. Pictures. ``feed``: newest first until a page and one more bring nothing new. ``versions`` and
   ``showcase``: of every version that is new or changed, or whose model is, and of a share
   (``runtime.site.refresh_share``) of the others, beginning with those that were requested least
   recently. A gallery is walked until a page has nothing new, which is one request when nothing
   is. Pictures of the snapshot that a gallery walked to its end lacks are requested singly by
   ``imageId``.

With ``runtime.site.reconcile`` whole listings are walked instead, and the recall states which
share of
the site's items the snapshot had. Only such a walk finds items that appear in the middle of a
listing, such as a picture that moderation released late.

The new snapshot holds the earlier records, the new ones in their place, and ``changes.json``. An
item that is gone keeps its last good record and has a tombstone until it comes back. A record
counts as changed when it differs in more than ``diffagent.schemas.payloads.VOLATILE``; moved
counters are stored with the next real change and cause no new snapshot.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from diffagent.civitai.pagination import walk_items
from diffagent.crawl.crawler import MODELS_LIMIT, Crawler, CrawlSetup
from diffagent.crawl.snapshot import read_snapshot, write_generations, write_gone, write_snapshot
from diffagent.crawl.snapshot_index import (
    SnapshotIndex,
    fingerprint,
    head_of,
    image_fingerprint,
)
from diffagent.errors import Forbidden, NotFound, ServerError
from diffagent.schemas.payloads import (
    ALL_LEVELS,
    PG,
    canonical,
    image_level,
    json_flaw,
    versions_of,
    whole_number,
)

log = logging.getLogger(__name__)
#: Log of the result of a reconciliation, which the command line always shows.
recall_log = logging.getLogger("diffagent.civitai.recall")

CHANGES = "changes.json"
_OVERLAP = 1
#: Days during which a missing model is requested again: the site answers 404 for days for some
#: models that exist.
_REQUESTED_DAYS = 30
_KINDS = ("models", "versions", "images")
_HOWS = ("added", "changed", "removed", "returned")


class SnapshotChanges:
    """Ids of the items that were added, changed, removed and returned, by kind."""

    def __init__(self, previous: SnapshotIndex) -> None:
        self._previous = previous
        self.ids: dict[str, dict[str, set[int]]] = {
            kind: {how: set() for how in _HOWS} for kind in _KINDS
        }

    def __bool__(self) -> bool:
        return any(ids for hows in self.ids.values() for ids in hows.values())

    def add(self, kind: str, item: dict[str, Any]) -> None:
        """Compare a record with its earlier one."""
        if kind == "images":
            mark = image_fingerprint(item)
            self._compare(kind, item["id"], self._previous.images.get(item["id"]), mark)
        elif kind == "models":
            self._add_model(item)

    def _add_model(self, model: dict[str, Any]) -> None:
        before = self._previous.models.get(model["id"])
        head, versions = (before.head, before.versions) if before else (None, {})
        for ident, version in versions_of(model).items():
            self._compare("versions", ident, versions.get(ident), fingerprint(version))
        self._compare("models", model["id"], head, fingerprint(head_of(model)))

    def _compare(self, kind: str, ident: int, before: int | None, mark: int) -> None:
        if before is None:
            self.ids[kind]["added"].add(ident)
            return
        if (kind, ident) in self._previous.gone:
            self.ids[kind]["returned"].add(ident)
        if before != mark:
            self.ids[kind]["changed"].add(ident)

    def touched(self, kind: str, ident: int) -> bool:
        """Whether an item is new, changed or back."""
        return any(ident in ids for how, ids in self.ids[kind].items() if how != "removed")

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of each."""
        return {
            kind: {how: len(ids) for how, ids in hows.items()} for kind, hows in self.ids.items()
        }

    def to_json(self, previous: str) -> bytes:
        """Return the file of the differences from the snapshot with the digest ``previous``."""
        rows = {
            kind: {how: {"count": len(ids), "ids": sorted(ids)} for how, ids in hows.items()}
            for kind, hows in self.ids.items()
        }
        return orjson.dumps({"previous": previous, **rows}, option=orjson.OPT_INDENT_2) + b"\n"


class Refresh(Crawler):
    """A crawl after ``previous``, an earlier snapshot.

    Args:
        setup: parts of the crawl.
        previous: the earlier snapshot.
        looked_at: day on which each version's pictures were last requested; brought up to date.
        share: fraction of the unchanged versions whose pictures are requested.
        full: walk whole listings and request the pictures of all versions.
        rewrite: write a snapshot even without news.
    """

    def __init__(
        self,
        setup: CrawlSetup,
        previous: SnapshotIndex,
        looked_at: dict[int, str],
        *,
        share: float,
        full: bool,
        rewrite: bool,
    ) -> None:
        super().__init__(setup)
        self._previous, self._looked_at = previous, looked_at
        self._full, self._share, self._rewrite = full, share, rewrite
        self.changes = SnapshotChanges(previous)
        self._looked: list[int] = []
        self.state.on_item = self.changes.add

    def run(self) -> None:
        """Request everything that can have changed."""
        overlap = None if self._full else _OVERLAP
        self.crawl_models(overlap)
        self._request_models()
        self._request_versions()
        if self.config.image_source == "feed":
            self.crawl_feed(overlap)
        else:
            self._looked = self.all_versions() if self._full else self._due()
            self.crawl_versions(self._looked, None if self._full else 0)
        self._request_images()
        self._refresh_pages()
        for (kind, ident), gone in self.state.judged.items():
            if gone and (kind, ident) not in self._previous.gone:
                self.changes.ids[kind]["removed"].add(ident)

    def metrics(self) -> dict[str, Any]:
        """Return the counters of this process, the changes, and the recall of a reconciliation."""
        metrics = super().metrics() | {"changes": self.changes.counts()}
        if self._full:
            metrics["recall"] = self._recall()
            recall_log.info("recall of what was known before: %s", metrics["recall"])
        return metrics

    def write(self, out: Path, scratch: Path) -> bool:
        """Write the snapshot if there is anything new; return whether there is."""
        answered = set(self._looked).difference(self.state.failed.get("gallery", ()))
        self._looked_at |= dict.fromkeys(answered, self.date)
        pages = self.state.seen["pages"]
        if not (self.changes or pages or self._rewrite):
            return False
        keep = {kind: self.newest(kind) for kind in ("models", "images")}
        keep["pages"] = sorted(pages | self._previous.pages.keys())
        items = read_snapshot(self._previous.path)
        entries = self._journal.read()
        write_snapshot(out, entries, keep, scratch, previous=items, merge=_merge)
        write_gone(out, self._tombstones())
        generation = {"generation": self._previous.next_generation, "date": self.date}
        write_generations(out, [*self._previous.generations, generation])
        (out / CHANGES).write_bytes(self.changes.to_json(self._previous.digest))
        log.info("changes: %s", self.changes.counts())
        return True

    # Items that may be gone

    def _request_models(self) -> None:
        """Fetch the models of the snapshot that the listing did not show."""
        models = [m for m in sorted(self._previous.models) if not self._has("models", m)]
        starts = range(0, len(models), MODELS_LIMIT)
        batches = {models[start]: models[start : start + MODELS_LIMIT] for start in starts}
        missing: list[int] = []
        with self.meter("known models", len(models)) as more:
            calls = ((first, partial(self._batch, batch)) for first, batch in batches.items())
            for first, answer in self.pool.answers(calls):
                try:
                    items = answer()
                except ServerError as error:
                    self.state.tolerate(error, "batch", first, len(batches))
                    continue
                self.state.save({"batch": first}, "models", self.state.unseen("models", items))
                missing += [m for m in batches[first] if not self._has("models", m)]
                more(len(batches[first]))
        # A model that has been gone for long is not requested singly each time; one that went
        # lately may be back, whatever a batch leaves out.
        missing = [m for m in missing if not self._is_long_gone(m)]
        self._request_singly("models", missing, self.site.get_model)

    def _is_long_gone(self, model: int) -> bool:
        tombstone = self._previous.gone.get(("models", model))
        if tombstone is None:
            return False
        since = date.fromisoformat(self.date) - date.fromisoformat(tombstone["date"])
        return since.days > _REQUESTED_DAYS

    def _batch(self, models: Sequence[int]) -> list[dict[str, Any]]:
        params = self.model_params() | {"ids": ",".join(map(str, models)), "sort": "Newest"}
        return list(
            walk_items(lambda cursor: self.site.get_models(cursor, limit=MODELS_LIMIT, **params))
        )

    def _request_versions(self) -> None:
        """Request the versions of the snapshot that a model shows no more."""
        missing = [
            version
            for model in sorted(self.state.seen["models"] & self._previous.models.keys())
            for version in self._previous.models[model].versions
            if version not in self.state.versions[model] and not self._has("versions", version)
        ]
        self._request_singly("versions", missing, self.site.get_version)

    def _request_images(self) -> None:
        """Request the pictures of the snapshot that listings walked to their ends did not show."""
        if self.config.image_source == "showcase":
            return  # ten of a version's pictures: one that is not shown may be there
        if self.config.image_source == "feed":
            is_whole = self.listings.has_reached_end("feed")
            images: Iterable[int] = self._previous.images if is_whole else ()
        else:
            whole = [v for v in self._looked if self.listings.has_reached_end(f"version/{v}")]
            images = {i for v in whole for i in self._previous.images_of_version.get(v, ())}
        missing = [image for image in sorted(images) if not self._has("images", image)]
        self._request_singly("images", missing, self._image)

    def _image(self, image: int) -> dict[str, Any]:
        page = self.site.get_images(imageId=image, browsingLevel=ALL_LEVELS)
        for item in page.items:
            if item["id"] == image:
                return item
        if page.items or page.malformed or page.cursor:
            raise ServerError(f"image {image} was requested and the answer is another item")
        raise NotFound(f"no image {image}")

    def _request_singly(self, kind: str, idents: Sequence[int], call: Any) -> None:
        if not idents:
            return
        with self.meter(f"missing {kind}", len(idents)) as more:
            for ident, answer in self.pool.answers((i, partial(call, i)) for i in idents):
                more(1)
                try:
                    item = answer()
                except NotFound:
                    self.state.judge(kind, ident, gone=True)
                except ServerError as error:
                    self.state.tolerate(error, kind, ident, self._previous.count(kind))
                except Forbidden as error:
                    log.warning("%s %d is left as it is: %s", kind, ident, error)
                else:
                    self._take_over(kind, ident, item)

    def _take_over(self, kind: str, ident: int, item: dict[str, Any]) -> None:
        """Store an item that a listing lacks and a single request returns."""
        if whole_number(item.get("id")) != ident:
            log.warning("%s %d: the answer is another item; left as it is", kind, ident)
        elif reason := json_flaw(item):
            entry: dict[str, Any] = {"judged": [kind, ident, False]}
            self.state.drop(kind, [(str(ident), reason)], entry)
            self.state.save(entry)
        elif kind == "versions":
            self.state.judge(kind, ident, gone=False)
        else:
            item["id"] = ident
            if kind == "models" and not self.config.nsfw:
                _hide_previews(item)
            self.state.save({"single": ident}, kind, self.state.unseen(kind, [item]))

    def _has(self, kind: str, ident: int) -> bool:
        """Whether the state of an item is known by now."""
        if kind == "images" and ident in self.state.hollow:
            return True
        # Listings show versions and pictures that are back; models are requested.
        is_gone = (kind, ident) in self._previous.gone and kind != "models"
        is_seen = ident in self.state.seen.get(kind, ())
        return is_seen or is_gone or (kind, ident) in self.state.judged

    def _is_gone(self, kind: str, ident: int) -> bool:
        before = (kind, ident) in self._previous.gone
        return self.state.judged.get((kind, ident), before) and not self.changes.touched(
            kind, ident
        )

    def _tombstones(self) -> Iterable[dict[str, Any]]:
        back = {(kind, ident) for kind in _KINDS for ident in self.changes.ids[kind]["returned"]}
        rows = {place: row for place, row in self._previous.gone.items() if place not in back}
        for (kind, ident), gone in self.state.judged.items():
            if gone:
                reason = "not listed" if kind == "images" else "404"
                row = {"kind": kind, "id": ident, "date": self.date, "reason": reason}
                rows.setdefault((kind, ident), row)
        return rows.values()

    # Versions whose pictures are requested

    def _due(self) -> list[int]:
        """Return the versions whose pictures this refresh requests, newest first."""
        due: list[int] = []
        others: list[int] = []
        for model in self.newest("models"):
            for version in self._present_versions(model):
                new = self.changes.touched("versions", version)
                new = new or self.changes.touched("models", model)
                (due if new else others).append(version)
        others.sort(key=lambda v: (self._looked_at.get(v, ""), -v))
        due += others[: math.ceil(len(others) * self._share)]
        return sorted(set(due), reverse=True)

    def all_versions(self) -> list[int]:
        """Return the versions that are not gone, newest first."""
        models = self.newest("models")
        return sorted({v for m in models for v in self._present_versions(m)}, reverse=True)

    def _present_versions(self, model: int) -> Iterable[int]:
        if self._is_gone("models", model):
            return ()
        return (v for v in self.versions(model) if not self._is_gone("versions", v))

    def _refresh_pages(self) -> None:
        """Read the pages of changed models again, and others up to ``crawl.model_pages``.

        A page that cannot be read now does not replace one that could be. The most downloaded
        models change all the time, so pages that were read once stay.
        """
        pages = self._previous.pages
        missing = max(0, self.config.model_pages - len(pages))
        others = [m for m in self.popular() if m not in pages][:missing]
        changed = [m for m in pages if self.changes.touched("models", m)]
        self.crawl_pages([*sorted(changed), *others])

    def save_page(self, page: dict[str, Any]) -> None:
        """Store a page, unless only the earlier one could be read."""
        if page["status"] == "ok" or not self._previous.pages.get(page["id"]):
            super().save_page(page)

    def _recall(self) -> dict[str, float | None]:
        """Return the share of the site's items that the snapshot had, by kind."""
        added = {kind: self.changes.ids[kind]["added"] for kind in _KINDS}
        back = {kind: self.changes.ids[kind]["returned"] for kind in _KINDS}
        shown = {kind: len(self.state.seen[kind]) for kind in ("models", "images")}
        shown["versions"] = sum(map(len, self.state.versions.values()))
        return {
            kind: 1 - len(added[kind] | back[kind]) / shown[kind] if shown[kind] else None
            for kind in _KINDS
        }

    # Items of both snapshots

    def available_ids(self, kind: str) -> set[int]:
        """Return the ids of the earlier snapshot and of this crawl."""
        is_model = kind == "models"
        ids: Iterable[int] = self._previous.models if is_model else self._previous.images
        return self.state.seen[kind].union(ids)

    def versions(self, model: int) -> Iterable[int]:
        """Return the versions of a model: of its new record, else of its earlier one."""
        before = self._previous.models.get(model)
        return self.state.versions.get(model, before.versions if before else ())

    def downloads(self, model: int) -> int:
        """Return the number of downloads of a model."""
        before = self._previous.models.get(model)
        return self.state.downloads.get(model, before.downloads if before else 0)


def _merge(kind: str, new: bytes, old: bytes) -> bytes:
    """Return the new record; a model keeps its earlier versions behind its new ones."""
    if kind != "models":
        return new
    model, before = orjson.loads(new), orjson.loads(old)
    current = versions_of(model)
    lost = [version for i, version in versions_of(before).items() if i not in current]
    if not lost:
        return new
    model["modelVersions"] = [*model["modelVersions"], *lost]
    return canonical(model) + b"\n"


def _hide_previews(model: dict[str, Any]) -> None:
    """Keep only the PG previews of a /models/:id answer, as a listing without nsfw shows them."""
    for version in versions_of(model).values():
        if isinstance(version.get("images"), list):
            version["images"] = [i for i in version["images"] if image_level(i) & PG]
