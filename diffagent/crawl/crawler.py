"""A first crawl: models, then prompts from one of three sources, then pages.

Sources of prompts (``crawl.image_source``), all with generation metadata:

* ``versions``: /images of every model version, the gallery that all users add to;
* ``showcase``: /model-versions/:id of every version, at most ten pictures by the model's creator;
* ``feed``: the whole /images listing.

Items are stored as the site sent them, without traces of how they were fetched
(``diffagent.crawl.stored_form``). A picture of a showcase gets the fields that /images would give
it (``modelVersionIds``, ``baseModel``, ``username``).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffagent.civitai.pagination import Page
from diffagent.civitai.site import Site
from diffagent.crawl.call_pool import CallPool, Steps
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_state import CrawlState
from diffagent.crawl.journal import Journal
from diffagent.crawl.listing_walks import ListingWalks, Pages
from diffagent.crawl.meter import meter
from diffagent.crawl.snapshot import write_generations, write_snapshot
from diffagent.errors import NotFound, SchemaError, ServerError
from diffagent.schemas.payloads import (
    ALL_LEVELS,
    PG,
    image_level,
    json_flaw,
    objects_in,
    unwrap_meta,
    whole_number,
)
from diffagent.store import Progress

MODELS_LIMIT, IMAGES_LIMIT = 100, 200
_FILE_NAME = re.compile(r"/(\d{1,18})\.\w+$")


@dataclass(frozen=True)
class CrawlSetup:
    """Parts of a crawl: its configuration, site, journal, state, threads and progress report."""

    config: CrawlConfig
    site: Site
    journal: Journal
    state: CrawlState
    pool: CallPool
    report: Progress = lambda fraction, text: None


class Crawler:
    """A first crawl of everything that the configuration selects.

    Args:
        setup: parts of the crawl.

    Attributes:
        date: day on which the crawl began, 'YYYY-MM-DD'; set before ``run``.
    """

    date = ""

    def __init__(self, setup: CrawlSetup) -> None:
        self.config, self.site = setup.config, setup.site
        self.state, self.pool = setup.state, setup.pool
        self.listings = ListingWalks(setup.state)
        self._journal = setup.journal
        self.meter = partial(meter, setup.report)

    def run(self) -> None:
        """Fetch everything that the journal lacks."""
        self.crawl_models()
        if self.config.image_source == "feed":
            self.crawl_feed()
        else:
            self.crawl_versions(self.all_versions())
        self.crawl_pages(self.popular()[: self.config.model_pages])

    def metrics(self) -> dict[str, Any]:
        """Return the counters of this process."""
        return self.state.metrics()

    def write(self, out: Path, scratch: Path) -> bool:
        """Write the snapshot; return whether it holds anything new."""
        keep = {kind: self.newest(kind) for kind in ("models", "images")}
        keep["pages"] = sorted(self.state.seen["pages"])
        write_snapshot(out, self._journal.read(), keep, scratch)
        write_generations(out, [{"generation": 0, "date": self.date}])
        return True

    # Requests

    def model_params(self) -> dict[str, Any]:
        """Return the parameters of every listing of models."""
        return {"period": "AllTime"} | ({"nsfw": "true"} if self.config.nsfw else {})

    def crawl_models(self, overlap: int | None = None) -> None:
        """Walk the listing of models."""
        params = self.model_params()
        if self.config.model_types:
            params["types"] = list(self.config.model_types)

        def pages(sort: str, fewer: int) -> Any:
            limit = MODELS_LIMIT - fewer
            return lambda cursor: self.site.get_models(cursor, sort=sort, limit=limit, **params)

        self._walk_listing("models", pages, self.config.max_models, overlap)

    def crawl_feed(self, overlap: int | None = None) -> None:
        """Walk the listing of all images."""
        self._walk_listing("images", self._image_pages({}), self.config.max_images, overlap)

    def _walk_listing(
        self, kind: str, pages: Pages, maximum: int | None, overlap: int | None
    ) -> None:
        name = "feed" if kind == "images" else kind
        with self.meter(name, maximum) as more:
            more(len(self.state.seen[kind]))
            steps = self.listings.walk(
                name, kind, pages, maximum=maximum, overlap=overlap, more=more
            )
            self.pool.run([steps])

    def _image_pages(self, scope: dict[str, Any]) -> Pages:
        # nsfw=true would leave out everything that is not nsfw, unlike the bitmask.
        level = ALL_LEVELS if self.config.nsfw else PG
        params = {"type": "image", "period": "AllTime", "browsingLevel": level, **scope}

        def pages(sort: str, fewer: int) -> Any:
            limit = IMAGES_LIMIT - fewer
            return lambda cursor: self.site.get_images(cursor, sort=sort, limit=limit, **params)

        return pages

    def crawl_versions(self, versions: Sequence[int], overlap: int | None = None) -> None:
        """Fetch the galleries or showcases of versions, in this order.

        One that the site does not return within the budget of a call is left out and named in the
        metrics; more than 1 % of them fail the crawl.
        """
        showcases = self.config.image_source == "showcase"
        with self.meter("showcases" if showcases else "galleries", len(versions)) as more:
            if showcases:
                self._showcases(versions, more)
                return
            # Which galleries are the last ones below a limit depends on those before them.
            threads = 1 if self.config.max_images else None
            self.pool.run(self._galleries(versions, overlap, more), threads=threads)

    def _galleries(
        self, versions: Sequence[int], overlap: int | None, more: Callable[[int], None]
    ) -> Iterator[Steps[None]]:
        for version in versions:
            if self._has_enough_images():
                return
            yield self._gallery(version, len(versions), overlap, more)

    def _gallery(
        self, version: int, total: int, overlap: int | None, more: Callable[[int], None]
    ) -> Steps[None]:
        pages = self._image_pages({"modelVersionId": version})
        try:
            yield from self.listings.walk(f"version/{version}", "images", pages, overlap=overlap)
        except ServerError as error:
            # Galleries of huge checkpoints are known to time out for days.
            self.state.tolerate(error, "gallery", version, total)
        more(1)

    def _showcases(self, versions: Sequence[int], more: Callable[[int], None]) -> None:
        order = [v for v in versions if v not in self.state.showcases]
        more(len(versions) - len(order))
        calls = (
            (v, partial(self.site.get_version, v)) for v in order if not self._has_enough_images()
        )
        # In order: a picture of two showcases belongs to the first.
        for version, answer in self.pool.answers(calls, 1 if self.config.max_images else None):
            try:
                page = self._showcase(version, answer())
            except NotFound:
                page = Page((), None)
            except ServerError as error:
                self.state.tolerate(error, "gallery", version, len(versions))
                page = Page((), None)
            entry: dict[str, Any] = {"showcase": version}
            self.state.drop("images", page.dropped, entry)
            self.state.save(entry, "images", self.state.unseen("images", page.items))
            more(1)

    def _showcase(self, version: int, answer: dict[str, Any]) -> Page:
        creator = self.state.creators.get(version)
        images = showcase_images({**answer, "id": version}, creator, adult=self.config.nsfw)
        return Page.of(images, None)

    def crawl_pages(self, models: Iterable[int]) -> None:
        """Read the HTML pages of models."""
        for model in models:
            if model in self.state.seen["pages"]:
                continue
            page: dict[str, Any] = {"id": model, "status": "ok"}
            try:
                page |= self.site.get_model_page(model) | {"id": model}
                if reason := json_flaw(page):
                    page = {"id": model, "status": "failed", "reason": reason}
            except (NotFound, SchemaError) as error:
                page |= {"status": "failed", "reason": type(error).__name__}
            self.save_page(page)

    def save_page(self, page: dict[str, Any]) -> None:
        """Store a page."""
        self.state.save({"page": page["id"]}, "pages", [page])

    # Contents of the snapshot

    def newest(self, kind: str) -> list[int]:
        """Return the ids that belong to the snapshot."""
        maximum = self.config.max_models if kind == "models" else self.config.max_images
        ids = self.available_ids(kind)
        return sorted(ids) if maximum is None else sorted(heapq.nlargest(maximum, ids))

    def available_ids(self, kind: str) -> set[int]:
        """Return the ids to choose from."""
        return self.state.seen[kind]

    def all_versions(self) -> list[int]:
        """Return the versions of all models of the snapshot, newest first."""
        return sorted({v for m in self.newest("models") for v in self.versions(m)}, reverse=True)

    def versions(self, model: int) -> Iterable[int]:
        """Return the versions of a model."""
        return self.state.versions.get(model, ())

    def popular(self) -> list[int]:
        """Return the models of the snapshot, most downloaded first."""
        return sorted(self.newest("models"), key=lambda m: (-self.downloads(m), m))

    def downloads(self, model: int) -> int:
        """Return the number of downloads of a model."""
        return self.state.downloads.get(model, 0)

    def _has_enough_images(self) -> bool:
        maximum = self.config.max_images
        return maximum is not None and len(self.state.seen["images"]) >= maximum


def showcase_images(
    version: dict[str, Any], creator: str | None, *, adult: bool
) -> list[dict[str, Any]]:
    """Return the pictures of a /model-versions/:id answer as /images would list them.

    Videos, minors and real persons are left out, as /images leaves them out; above PG too, unless
    ``adult``. A picture without an id takes it from its file's name, or is left out.
    """
    pictures = []
    for image in objects_in(version.get("images")):
        if image.get("type", "image") != "image":
            continue
        if image.get("minor") is True or image.get("poi") is True:
            continue
        if not (adult or image_level(image) == PG):
            continue
        name = _FILE_NAME.search(str(image.get("url") or ""))
        ident = whole_number(image.get("id", name and name[1]))
        if ident is None:
            continue
        item = {**image, "id": ident, "meta": unwrap_meta(image.get("meta"))}
        item.setdefault("modelVersionIds", [version["id"]])
        item.setdefault("baseModel", version.get("baseModel"))
        if creator:
            item.setdefault("username", creator)
        pictures.append(item)
    return pictures
