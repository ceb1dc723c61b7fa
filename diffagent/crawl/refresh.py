"""A crawl that knows the one before: asks only for what can have changed, and loses nothing.

1. Models, newest first, until a page has nothing new, and one page more (items are skipped where
   a page begins; when there was anything new, pages of another length are walked as well).
2. Every other known model by ``ids=`` batches of 100. One that a batch lacks is asked for singly:
   404 and it gets a tombstone; an answer, and it is taken over; a broken or empty answer, or none
   at all, and the old record stays as it is. Versions that a model has no more are asked for in
   the same way.
3. Pictures. ``feed``: newest first until a page and one more hold only known ones. ``versions``
   and ``showcase``: of every version that is new or changed, or whose model is, and of a share
   (``runtime.refresh_share``) of the others, those first that were not looked at for the longest;
   a gallery is walked until a page has nothing new, which is one request when nothing is. Known
   pictures that a gallery walked to its end lacks are asked for singly by ``imageId``.

With ``runtime.reconcile`` whole listings are walked instead, and the recall says which share of
what the site has was known before: what has changed its id's place in no listing's beginning (a
picture released late by moderation) is only found so.

The new snapshot holds the old records, the new ones in their place, and ``changes.json``. What is
gone keeps its last good record and has a tombstone until it comes back. A record counts as
changed when it differs in more than ``diffagent.schemas.payloads.VOLATILE``; counters that moved
are taken over with the next real change, and are no reason for a new snapshot.
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
from diffagent.crawl.crawler import MODELS_LIMIT, Crawler, Session
from diffagent.crawl.known import Known, fingerprint, head_of, image_fingerprint
from diffagent.crawl.snapshot import read_snapshot, write_generations, write_gone, write_snapshot
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
#: What a reconciliation is asked for; the command line shows it always.
recall_log = logging.getLogger("diffagent.civitai.recall")

CHANGES = "changes.json"
_OVERLAP = 1
#: The site has known models that it answers 404 for, for days.
_ASKED_FOR_DAYS = 30
_KINDS = ("models", "versions", "images")
_HOWS = ("added", "changed", "removed", "returned")


class Changes:
    """Ids of what was added, changed, removed and returned, for each kind."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self.ids: dict[str, dict[str, set[int]]] = {
            kind: {how: set() for how in _HOWS} for kind in _KINDS
        }

    def __bool__(self) -> bool:
        return any(ids for hows in self.ids.values() for ids in hows.values())

    def add(self, kind: str, item: dict[str, Any]) -> None:
        """Compare a record with the known one."""
        if kind == "images":
            mark = image_fingerprint(item)
            self._compare(kind, item["id"], self._known.images.get(item["id"]), mark)
        elif kind == "models":
            self._add_model(item)

    def _add_model(self, model: dict[str, Any]) -> None:
        before = self._known.models.get(model["id"])
        head, versions = (before.head, before.versions) if before else (None, {})
        for ident, version in versions_of(model).items():
            self._compare("versions", ident, versions.get(ident), fingerprint(version))
        self._compare("models", model["id"], head, fingerprint(head_of(model)))

    def _compare(self, kind: str, ident: int, before: int | None, mark: int) -> None:
        if before is None:
            self.ids[kind]["added"].add(ident)
            return
        if (kind, ident) in self._known.gone:
            self.ids[kind]["returned"].add(ident)
        if before != mark:
            self.ids[kind]["changed"].add(ident)

    def touched(self, kind: str, ident: int) -> bool:
        """Whether something is new, changed or back."""
        return any(ident in ids for how, ids in self.ids[kind].items() if how != "removed")

    def counts(self) -> dict[str, dict[str, int]]:
        """How many of each."""
        return {
            kind: {how: len(ids) for how, ids in hows.items()} for kind, hows in self.ids.items()
        }

    def to_json(self, previous: str) -> bytes:
        """The file of the artefact: what differs from the snapshot with the digest ``previous``."""
        rows = {
            kind: {how: {"count": len(ids), "ids": sorted(ids)} for how, ids in hows.items()}
            for kind, hows in self.ids.items()
        }
        return orjson.dumps({"previous": previous, **rows}, option=orjson.OPT_INDENT_2) + b"\n"


class Refresh(Crawler):
    """A crawl after ``known``, an earlier snapshot.

    Args:
        session: what it works with.
        known: the snapshot.
        looked_at: when each version's pictures were last asked for; brought up to date.
        share: of the versions that did not change, how many are looked at.
        full: walk whole listings and look at all versions.
        rewrite: write a snapshot even when nothing is new.
    """

    def __init__(
        self,
        session: Session,
        known: Known,
        looked_at: dict[int, str],
        *,
        share: float,
        full: bool,
        rewrite: bool,
    ) -> None:
        super().__init__(session)
        self._known, self._looked_at = known, looked_at
        self._full, self._share, self._rewrite = full, share, rewrite
        self.changes = Changes(known)
        self._looked: list[int] = []
        self.walks.on_item = self.changes.add

    def run(self) -> None:
        """Ask for what can have changed."""
        overlap = None if self._full else _OVERLAP
        self.crawl_models(overlap)
        self._ask_for_models()
        self._ask_for_versions()
        if self.config.image_source == "feed":
            self.crawl_feed(overlap)
        else:
            self._looked = self.all_versions() if self._full else self._due()
            self.crawl_versions(self._looked, None if self._full else 0)
        self._ask_for_images()
        self._refresh_pages()
        for (kind, ident), gone in self.walks.judged.items():
            if gone and (kind, ident) not in self._known.gone:
                self.changes.ids[kind]["removed"].add(ident)

    def metrics(self) -> dict[str, Any]:
        """What this process did, what has changed, and the recall of a reconciliation."""
        found = super().metrics() | {"changes": self.changes.counts()}
        if self._full:
            found["recall"] = self._recall()
            recall_log.info("recall of what was known before: %s", found["recall"])
        return found

    def write(self, out: Path, scratch: Path) -> bool:
        """Write the snapshot, if there is anything new; returns whether there is."""
        answered = set(self._looked).difference(self.walks.failed.get("gallery", ()))
        self._looked_at |= dict.fromkeys(answered, self.date)
        pages = self.walks.seen["pages"]
        if not (self.changes or pages or self._rewrite):
            return False
        keep = {kind: self.newest(kind) for kind in ("models", "images")}
        keep["pages"] = sorted(pages | self._known.pages.keys())
        items = read_snapshot(self._known.path)
        entries = self._journal.read()
        write_snapshot(out, entries, keep, scratch, previous=items, merge=_merge)
        write_gone(out, self._tombstones())
        this = {"generation": self._known.next_generation, "date": self.date}
        write_generations(out, [*self._known.generations, this])
        (out / CHANGES).write_bytes(self.changes.to_json(self._known.digest))
        log.info("changes: %s", self.changes.counts())
        return True

    # What may be gone

    def _ask_for_models(self) -> None:
        """Fetch the known models that the listing did not show."""
        known = [m for m in sorted(self._known.models) if not self._has("models", m)]
        starts = range(0, len(known), MODELS_LIMIT)
        batches = {known[start]: known[start : start + MODELS_LIMIT] for start in starts}
        missing: list[int] = []
        with self.meter("known models", len(known)) as more:
            calls = ((first, partial(self._batch, batch)) for first, batch in batches.items())
            for first, answer in self.walks.answers(calls):
                try:
                    found = answer()
                except ServerError as error:
                    self.walks.tolerate(error, "batch", first, len(batches))
                    continue
                self.walks.save({"batch": first}, "models", self.walks.unseen("models", found))
                missing += [m for m in batches[first] if not self._has("models", m)]
                more(len(batches[first]))
        # A model that has gone for good is not asked for singly each time; one that went lately
        # may be back, whatever a batch leaves out.
        missing = [m for m in missing if not self._is_long_gone(m)]
        self._ask_singly("models", missing, self.site.get_model)

    def _is_long_gone(self, model: int) -> bool:
        tombstone = self._known.gone.get(("models", model))
        if tombstone is None:
            return False
        since = date.fromisoformat(self.date) - date.fromisoformat(tombstone["date"])
        return since.days > _ASKED_FOR_DAYS

    def _batch(self, models: Sequence[int]) -> list[dict[str, Any]]:
        params = self.model_params() | {"ids": ",".join(map(str, models)), "sort": "Newest"}
        return list(
            walk_items(lambda cursor: self.site.get_models(cursor, limit=MODELS_LIMIT, **params))
        )

    def _ask_for_versions(self) -> None:
        """Ask for the known versions that a model shows no more."""
        missing = [
            version
            for model in sorted(self.walks.seen["models"] & self._known.models.keys())
            for version in self._known.models[model].versions
            if version not in self.walks.versions[model] and not self._has("versions", version)
        ]
        self._ask_singly("versions", missing, self.site.get_version)

    def _ask_for_images(self) -> None:
        """Ask for the known pictures that listings walked to their ends did not show."""
        if self.config.image_source == "showcase":
            return  # ten of a version's pictures: one that is not shown may be there
        if self.config.image_source == "feed":
            known: Iterable[int] = self._known.images if self.walks.walked_whole("feed") else ()
        else:
            whole = [v for v in self._looked if self.walks.walked_whole(f"version/{v}")]
            known = {i for v in whole for i in self._known.images_of_version.get(v, ())}
        missing = [image for image in sorted(known) if not self._has("images", image)]
        self._ask_singly("images", missing, self._image)

    def _image(self, image: int) -> dict[str, Any]:
        page = self.site.get_images(imageId=image, browsingLevel=ALL_LEVELS)
        for item in page.items:
            if item["id"] == image:
                return item
        if page.items or page.malformed or page.cursor:
            raise ServerError(f"image {image} was asked for and something else came")
        raise NotFound(f"no image {image}")

    def _ask_singly(self, kind: str, idents: Sequence[int], call: Any) -> None:
        if not idents:
            return
        with self.meter(f"missing {kind}", len(idents)) as more:
            for ident, answer in self.walks.answers((i, partial(call, i)) for i in idents):
                more(1)
                try:
                    item = answer()
                except NotFound:
                    self.walks.judge(kind, ident, gone=True)
                except ServerError as error:
                    self.walks.tolerate(error, kind, ident, self._known.count(kind))
                except Forbidden as error:
                    log.warning("%s %d is left as it is: %s", kind, ident, error)
                else:
                    self._take_over(kind, ident, item)

    def _take_over(self, kind: str, ident: int, item: dict[str, Any]) -> None:
        """What was missing in a listing is there when it is asked for."""
        if whole_number(item.get("id")) != ident:
            log.warning("%s %d: an answer that is something else; left as it is", kind, ident)
        elif reason := json_flaw(item):
            state: dict[str, Any] = {"judged": [kind, ident, False]}
            self.walks.drop(kind, [(str(ident), reason)], state)
            self.walks.save(state)
        elif kind == "versions":
            self.walks.judge(kind, ident, gone=False)
        else:
            item["id"] = ident
            if kind == "models" and not self.config.nsfw:
                _hide_previews(item)
            self.walks.save({"single": ident}, kind, self.walks.unseen(kind, [item]))

    def _has(self, kind: str, ident: int) -> bool:
        """Whether it is known by now what became of something."""
        if kind == "images" and ident in self.walks.hollow:
            return True
        # Versions and pictures that are gone show when they are back; models are asked for.
        known_gone = (kind, ident) in self._known.gone and kind != "models"
        seen = ident in self.walks.seen.get(kind, ())
        return seen or known_gone or (kind, ident) in self.walks.judged

    def _is_gone(self, kind: str, ident: int) -> bool:
        before = (kind, ident) in self._known.gone
        return self.walks.judged.get((kind, ident), before) and not self.changes.touched(
            kind, ident
        )

    def _tombstones(self) -> Iterable[dict[str, Any]]:
        back = {(kind, ident) for kind in _KINDS for ident in self.changes.ids[kind]["returned"]}
        rows = {place: row for place, row in self._known.gone.items() if place not in back}
        for (kind, ident), gone in self.walks.judged.items():
            if gone:
                reason = "not listed" if kind == "images" else "404"
                row = {"kind": kind, "id": ident, "date": self.date, "reason": reason}
                rows.setdefault((kind, ident), row)
        return rows.values()

    # What is looked at

    def _due(self) -> list[int]:
        """Versions whose pictures this refresh asks for, newest first."""
        due: list[int] = []
        others: list[int] = []
        for model in self.newest("models"):
            for version in self._there(model):
                new = self.changes.touched("versions", version)
                new = new or self.changes.touched("models", model)
                (due if new else others).append(version)
        others.sort(key=lambda v: (self._looked_at.get(v, ""), -v))
        due += others[: math.ceil(len(others) * self._share)]
        return sorted(set(due), reverse=True)

    def all_versions(self) -> list[int]:
        """Versions that are there, newest first."""
        return sorted({v for m in self.newest("models") for v in self._there(m)}, reverse=True)

    def _there(self, model: int) -> Iterable[int]:
        if self._is_gone("models", model):
            return ()
        return (v for v in self.versions(model) if not self._is_gone("versions", v))

    def _refresh_pages(self) -> None:
        """Read pages of models that changed again, and of others until there are enough.

        A page that cannot be read now does not replace one that could be. Which models are the
        most downloaded moves all the time, so pages that were read once stay.
        """
        wanted, known = self.config.model_pages, self._known.pages
        missing = max(0, wanted - len(known))
        others = [m for m in self.popular() if m not in known][:missing]
        changed = [m for m in known if self.changes.touched("models", m)]
        self.crawl_pages([*sorted(changed), *others])

    def save_page(self, page: dict[str, Any]) -> None:
        """Keep a page, unless it is worse than the known one."""
        if page["status"] == "ok" or not self._known.pages.get(page["id"]):
            super().save_page(page)

    def _recall(self) -> dict[str, float | None]:
        """Share of what the site shows that was known before, for each kind."""
        added = {kind: self.changes.ids[kind]["added"] for kind in _KINDS}
        back = {kind: self.changes.ids[kind]["returned"] for kind in _KINDS}
        there = {kind: len(self.walks.seen[kind]) for kind in ("models", "images")}
        there["versions"] = sum(map(len, self.walks.versions.values()))
        return {
            kind: 1 - len(added[kind] | back[kind]) / there[kind] if there[kind] else None
            for kind in _KINDS
        }

    # What is there to choose from

    def known_ids(self, kind: str) -> set[int]:
        """Ids of the old snapshot and of this crawl."""
        known: Iterable[int] = self._known.models if kind == "models" else self._known.images
        return self.walks.seen[kind].union(known)

    def versions(self, model: int) -> Iterable[int]:
        """Versions of a model, of this crawl if it has it."""
        known = self._known.models.get(model)
        return self.walks.versions.get(model, known.versions if known else ())

    def downloads(self, model: int) -> int:
        """How often a model was downloaded."""
        known = self._known.models.get(model)
        return self.walks.downloads.get(model, known.downloads if known else 0)


def _merge(kind: str, new: bytes, old: bytes) -> bytes:
    """A new record; a model also has the versions that it had before, behind its own."""
    if kind != "models":
        return new
    model, before = orjson.loads(new), orjson.loads(old)
    have = versions_of(model)
    lost = [version for i, version in versions_of(before).items() if i not in have]
    if not lost:
        return new
    model["modelVersions"] = [*model["modelVersions"], *lost]
    return canonical(model) + b"\n"


def _hide_previews(model: dict[str, Any]) -> None:
    """/models/:id shows previews of all levels; a listing without nsfw only those that are PG."""
    for version in versions_of(model).values():
        if isinstance(version.get("images"), list):
            version["images"] = [i for i in version["images"] if image_level(i) & PG]
