"""Stage ``crawl``: everything that the configuration asks of the site, as a snapshot.

Each listing is walked at least once, newest first. A listing of more than one page is walked a
second time with pages of another length: the site is known to leave out items where a page
begins, and other pages begin elsewhere. When a walk ends in a circle, the same two walks are made
from the oldest end. Items are kept as the site sent them, but for two things that would tell how
they were fetched: addresses on the site become relative, and nested ``meta.meta`` becomes flat.

A gallery that the site cannot give in the whole budget of a call is left out, named in the metrics
(``failed_galleries``); more than 1 % of them fail the stage.

All progress is in a journal (``diffagent.civitai.journal``): a killed crawl goes on behind the
last whole page.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson
from tqdm import tqdm

from diffagent.artifacts import StageContext, StageResult, stage
from diffagent.civitai.client import CivitaiClient, client_for, is_site_host, origin_of
from diffagent.civitai.journal import Item, Journal
from diffagent.civitai.pagination import Page, Walk
from diffagent.civitai.site import site_files
from diffagent.civitai.snapshot import summarise, write_snapshot
from diffagent.errors import CivitaiError, ConfigError, NotFound, SchemaError, ServerError
from schemas.civitai import ALL_LEVELS, PG, canonical, unwrap_meta
from schemas.config import CrawlConfig

log = logging.getLogger(__name__)

JOURNAL, SCRATCH = "journal.gz", "scratch"
_MODELS_LIMIT, _IMAGES_LIMIT = 100, 200
_LOG_SECONDS = 10.0
_MAX_FAILED_GALLERIES = 0.01


@stage("crawl", version=1, config=CrawlConfig, files=site_files)
def crawl(config: CrawlConfig, context: StageContext) -> StageResult:
    """Fetch models, images and pages from ``context.site_url``.

    Writes models/, images/ and pages/ (see ``diffagent.civitai.snapshot``). The content digest
    does not depend on the site's address, on the order of fetching, or on faults.

    Raises:
        ConfigError: there is no address to crawl.
        CivitaiError: the site stopped answering; the next run goes on from there.
    """
    if not context.site_url:
        raise ConfigError("crawl needs the address of a Civitai API: site_url is empty")
    journal, started = context.out / JOURNAL, time.monotonic()
    metrics: dict[str, Any] = {}
    # The journal is removed last: models without it are the whole snapshot of a run that was
    # killed before its manifest was written.
    if journal.exists() or not (context.out / "models").is_dir():
        client = client_for(context.site_url, context.runtime.requests_per_second)
        with client, Journal(journal) as pages:
            work = _Crawl(config, client, pages)
            work.run()
            metrics = work.metrics()
            write_snapshot(context.out, pages.read(), work.keep(), context.out / SCRATCH)
        journal.unlink()
    rows, digest, drift = summarise(context.out)
    metrics |= {"seconds": round(time.monotonic() - started, 2), "schema_drift": drift}
    if drift:
        log.warning("%d field(s) of a shape not known here: see schema_drift", len(drift))
    return StageResult(rows=rows, metrics=metrics, content_digest=digest)


@dataclass
class _Progress:
    """How far one walk has come."""

    cursor: str | None = None
    seen: list[str] = field(default_factory=list)
    done: bool = False
    complete: bool = True
    pages: int = 0


class _Crawl:
    """The state of a crawl: rebuilt from the journal, then carried on."""

    def __init__(self, config: CrawlConfig, client: CivitaiClient, journal: Journal) -> None:
        self._config, self._client, self._journal = config, client, journal
        self._known: dict[str, set[int]] = {"models": set(), "images": set(), "pages": set()}
        self._versions: dict[int, list[int]] = {}
        self._downloads: dict[int, int] = {}
        self._walks: dict[str, _Progress] = {}
        self._counts = dict.fromkeys(("loops", "restarts", "repeated", "malformed"), 0)
        self._fetched = 0
        self._failed: list[int] = []
        self._logged = time.monotonic()
        for entry in journal.read():
            self._take(entry.state, entry.items)

    def run(self) -> None:
        """Fetch what is missing."""
        resumed = {kind: len(ids) for kind, ids in self._known.items() if ids}
        if resumed:
            log.info("going on after %s", resumed)
        self._crawl_models()
        if self._config.image_source == "feed":
            self._listing("feed", "images", self._image_pages({}), self._config.max_images)
        else:
            self._crawl_galleries()
        self._crawl_pages()

    def keep(self) -> dict[str, Sequence[int]]:
        """Ids of each kind that belong to the snapshot."""
        return {
            "models": self._newest("models", self._config.max_models),
            "images": self._newest("images", self._config.max_images),
            "pages": sorted(self._known["pages"]),
        }

    def metrics(self) -> dict[str, Any]:
        """What this process did; a resumed crawl does not count what was done before."""
        client = self._client
        return {
            "requests": client.requests,
            "retries": client.retries,
            "items_fetched": self._fetched,
            "failed_galleries": self._failed,
            **self._counts,
        }

    # What is fetched

    def _crawl_models(self) -> None:
        params: dict[str, Any] = {"period": "AllTime"}
        if self._config.model_types:
            params["types"] = list(self._config.model_types)
        if self._config.nsfw:
            params["nsfw"] = "true"

        def pages(sort: str, fewer: int) -> Callable[[str | None], Page]:
            limit = _MODELS_LIMIT - fewer
            return lambda cursor: self._client.get_models(cursor, sort=sort, limit=limit, **params)

        self._listing("models", "models", pages, self._config.max_models)

    def _image_pages(self, where: dict[str, Any]) -> _Pages:
        # nsfw=true would leave out everything that is not nsfw: the bitmask says what is meant.
        level = ALL_LEVELS if self._config.nsfw else PG
        params = {"type": "image", "period": "AllTime", "browsingLevel": level, **where}

        def pages(sort: str, fewer: int) -> Callable[[str | None], Page]:
            limit = _IMAGES_LIMIT - fewer
            return lambda cursor: self._client.get_images(cursor, sort=sort, limit=limit, **params)

        return pages

    def _crawl_galleries(self) -> None:
        models = self._newest("models", self._config.max_models)
        versions = sorted({v for m in models for v in self._versions.get(m, ())}, reverse=True)
        for version in tqdm(versions, desc="galleries", unit="version", disable=None):
            if self._has_enough("images", self._config.max_images):
                return
            try:
                self._crawl_gallery(version)
            except ServerError as error:
                # Galleries of huge checkpoints are known to time out for days.
                self._failed.append(version)
                log.warning("gallery of version %d is left out: %s", version, error)
                if len(self._failed) > max(2, len(versions) * _MAX_FAILED_GALLERIES):
                    raise

    def _crawl_gallery(self, version: int) -> None:
        pages = self._image_pages({"modelVersionId": version})
        self._listing(f"version/{version}", "images", pages, None)

    def _crawl_pages(self) -> None:
        models = self._newest("models", self._config.max_models)
        popular = sorted(models, key=lambda m: (-self._downloads.get(m, 0), m))
        for model in popular[: self._config.model_pages]:
            if model in self._known["pages"]:
                continue
            page: dict[str, Any] = {"id": model, "status": "ok"}
            try:
                page |= self._client.get_model_page(model)
            except (NotFound, SchemaError) as error:
                page |= {"status": "failed", "reason": type(error).__name__}
            self._save({"listing": "pages"}, "pages", [page])

    # How a listing is walked

    def _listing(self, name: str, kind: str, pages: _Pages, maximum: int | None) -> None:
        """Walk a listing until nothing can be missing; see the module's text."""
        first = self._walk(f"{name}#0", kind, pages("Newest", 0), maximum)
        if first.pages <= 1:
            return
        second = self._walk(f"{name}#1", kind, pages("Newest", 1), maximum)
        if first.complete and second.complete:
            return
        log.warning("listing %r leads in a circle; it is walked from the other end", name)
        third = self._walk(f"{name}#2", kind, pages("Oldest", 0), None)
        fourth = self._walk(f"{name}#3", kind, pages("Oldest", 1), None)
        if not (third.complete or fourth.complete):
            raise CivitaiError(
                f"listing {name!r} leads in a circle from either end; the site is broken for it "
                "now: run the crawl again later, it goes on from here"
            )

    def _walk(
        self, key: str, kind: str, fetch: Callable[[str | None], Page], maximum: int | None
    ) -> _Progress:
        progress = self._walks.setdefault(key, _Progress())
        if progress.done:
            return progress
        walk = Walk(fetch, progress.cursor, progress.seen)
        with tqdm(desc=key, unit="item", disable=True if "/" in key else None) as bar:
            for page in walk:
                new = self._new(kind, page)
                last = page.cursor is None or self._reaches_limit(kind, page, new, maximum)
                state = {
                    "listing": key,
                    "asked": walk.asked,
                    "cursor": page.cursor,
                    "done": last,
                    "complete": walk.complete,
                }
                self._save(state, kind, new)
                self._counts["malformed"] += page.malformed
                bar.update(len(new))
                if last:
                    break
        self._counts["loops"] += walk.loops
        self._counts["restarts"] += walk.restarts
        return progress

    def _new(self, kind: str, page: Page) -> list[dict[str, Any]]:
        known = self._known[kind]
        new: dict[int, dict[str, Any]] = {}
        for item in page.items:
            if item["id"] not in known:
                new.setdefault(item["id"], item)
        self._counts["repeated"] += len(page.items) - len(new)
        return list(new.values())

    def _reaches_limit(
        self, kind: str, page: Page, new: Iterable[dict[str, Any]], maximum: int | None
    ) -> bool:
        """Whether a walk from the newest on is behind the last item that will be kept."""
        if maximum is None or not page.items:
            return False
        ids = self._known[kind] | {item["id"] for item in new}
        if len(ids) < maximum:
            return False
        return bool(min(item["id"] for item in page.items) <= heapq.nlargest(maximum, ids)[-1])

    # What is remembered

    def _save(self, state: dict[str, Any], kind: str, new: Iterable[dict[str, Any]]) -> None:
        items = [(kind, item["id"], canonical(self._plain(item))) for item in new]
        self._journal.append(state, items)
        self._take(state, items)
        self._fetched += len(items)
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("%d models, %d images", len(self._known["models"]), len(self._known["images"]))

    def _take(self, state: dict[str, Any], items: Iterable[Item]) -> None:
        """Bring the state up to a page of the journal."""
        for kind, ident, data in items:
            self._known[kind].add(ident)
            if kind == "models":
                self._remember(ident, data)
        if "cursor" not in state:
            return
        progress = self._walks.setdefault(state["listing"], _Progress())
        if state["asked"] is None:  # the listing was started anew: old cursors mean nothing
            progress.seen.clear()
        if state["cursor"] is not None and not state["done"]:
            progress.seen.append(state["cursor"])
        progress.cursor, progress.done = state["cursor"], state["done"]
        progress.complete = state["complete"]
        progress.pages += 1
        if progress.done:
            progress.seen.clear()

    def _remember(self, ident: int, data: bytes) -> None:
        model = orjson.loads(data)
        versions, stats = model.get("modelVersions"), model.get("stats")
        self._versions[ident] = [
            version["id"]
            for version in (versions if isinstance(versions, list) else ())
            if isinstance(version, dict) and type(version.get("id")) is int
        ]
        with suppress(TypeError, ValueError):
            self._downloads[ident] = int((stats or {}).get("downloadCount") or 0)

    def _plain(self, item: dict[str, Any]) -> dict[str, Any]:
        """An item without traces of how it was fetched."""
        meta = item.get("meta")
        if isinstance(meta, dict) and "id" in meta and "meta" in meta:
            item["meta"] = unwrap_meta(meta)
        versions = item.get("modelVersions")
        for version in versions if isinstance(versions, list) else ():
            self._make_relative(version)
            files = version.get("files") if isinstance(version, dict) else None
            for file in files if isinstance(files, list) else ():
                self._make_relative(file)
        return item

    def _make_relative(self, item: Any) -> None:
        link = item.get("downloadUrl") if isinstance(item, dict) else None
        if not isinstance(link, str):
            return
        parts = urlsplit(link)
        if origin_of(link) == self._client.origin or is_site_host(parts.hostname or ""):
            item["downloadUrl"] = parts.path + (f"?{parts.query}" if parts.query else "")

    def _newest(self, kind: str, maximum: int | None) -> list[int]:
        known = self._known[kind]
        return sorted(known) if maximum is None else sorted(heapq.nlargest(maximum, known))

    def _has_enough(self, kind: str, maximum: int | None) -> bool:
        return maximum is not None and len(self._known[kind]) >= maximum


_Pages = Callable[[str, int], Callable[[str | None], Page]]
