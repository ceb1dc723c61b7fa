"""A folder of records, read as if it was the site (``diffagent.civitai.site.Site``)."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import orjson

from diffagent.civitai.address import Address
from diffagent.civitai.download import PartialDownload
from diffagent.civitai.error_answers import error_of
from diffagent.civitai.page_html import settings_of
from diffagent.civitai.pagination import Page
from diffagent.errors import BadCursor, NotFound
from diffagent.localcivitai.answers import (
    ApiFailure,
    available_file,
    file_digest,
    listed_image,
    listed_model,
    model_answer,
    stored_file,
    validation_failure,
    version_answer,
    version_of_hash,
    versions_of_hashes,
)
from diffagent.localcivitai.listing import (
    BadParameter,
    ImageQuery,
    Listings,
    ModelQuery,
    QueryParameters,
    Selection,
    StaleCursor,
)
from diffagent.localcivitai.replay import Replay

_DOWNLOAD_PATH = re.compile(r"/api/download/models/(\d{1,18})")


class FolderSite:
    """Records on disk behind the interface of a site, with the listings of the local server.

    A crawl of it takes the same snapshot as one of a local server over the same records. The
    records are read and indexed when the first of them is requested.

    Args:
        load: reads the records.
    """

    origin = "https://civitai.com"
    retries = 0

    def __init__(self, load: Callable[[], Replay]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self.requests = 0

    @cached_property
    def _listings(self) -> Listings:
        return Listings(self._load())

    @contextmanager
    def _answering(self, path: str) -> Iterator[Replay]:
        """Yield the records, to one thread at a time, and turn the API's failures into errors."""
        try:
            with self._lock:
                self.requests += 1
                yield self._listings.replay
        except StaleCursor as error:
            raise BadCursor(f"{path}: no cursor of this listing: {str(error)!r}") from None
        except BadParameter as problem:
            raise _error_of(validation_failure(problem), path) from None
        except ApiFailure as failure:
            raise _error_of(failure, path) from None

    def stop(self) -> None:
        """Do nothing: no call waits."""

    def close(self) -> None:
        """Do nothing: the records' temporary files are deleted with this object."""

    def get_models(self, cursor: str | None = None, **params: Any) -> Page:
        """Return one page of /models."""
        with self._answering("/models") as replay:
            parameters = _parameters(params)
            query = ModelQuery.parse(parameters)
            indexes, following = _page(self._listings.models(query), cursor, parameters, 100)
            items = [listed_model(replay, i, self.origin, adult=query.adult) for i in indexes]
            return Page.of(items, following, replay.drops)

    def get_images(self, cursor: str | None = None, **params: Any) -> Page:
        """Return one page of /images with generation metadata."""
        with self._answering("/images") as replay:
            parameters = _parameters(params)
            query = ImageQuery.parse(parameters)
            indexes, following = _page(self._listings.images(query), cursor, parameters, 200)
            items = [orjson.loads(listed_image(replay, i, meta=True)) for i in indexes]
            return Page.of(items, following, replay.drops)

    def get_model(self, model_id: int) -> dict[str, Any]:
        """Return /models/:id."""
        with self._answering(f"/models/{model_id}") as replay:
            return model_answer(replay, model_id, self.origin)

    def get_version(self, version_id: int) -> dict[str, Any]:
        """Return /model-versions/:id."""
        with self._answering(f"/model-versions/{version_id}") as replay:
            return version_answer(replay, version_id, self.origin)

    def get_by_hash(self, digest: str) -> dict[str, Any]:
        """Return the first published version that has a file with this hash."""
        with self._answering(f"/model-versions/by-hash/{digest}") as replay:
            return version_answer(replay, version_of_hash(replay, digest), self.origin)

    def get_ids_by_hash(self, sha256s: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return (model id, version id) of each file, by its lower-case SHA256."""
        with self._answering("/model-versions/by-hash/ids") as replay:
            ids = versions_of_hashes(replay, sha256s)
            return {digest.lower(): pair for digest, pair in ids.items()}

    def get_model_page(self, model_id: int) -> dict[str, Any]:
        """Return the settings that a model's page would hold."""
        with self._answering(f"/models/{model_id}") as replay:
            index = replay.model_index.get(model_id)
            if index is None:
                raise NotFound(f"no model with id {model_id}")
            return settings_of(replay.model(index))

    def download(
        self,
        url: int | str,
        path: Path,
        *,
        sha256: str | None = None,
        size_bytes: int | None = None,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> Path:
        """Copy a model file to ``path``, whole and verified, or not at all.

        See ``diffagent.civitai.site.Site.download`` for the arguments.
        """
        source = self._file(url)
        partial = PartialDownload(repr(url), path, sha256, size_bytes, on_bytes)
        return partial.complete(lambda: partial.copy(source))

    def _file(self, url: int | str) -> Path:
        """Find the file of a version id, or of a download path or address."""
        link = f"/api/download/models/{url}" if isinstance(url, int) else url
        address = Address.on_site(link, self.origin)
        version = _DOWNLOAD_PATH.fullmatch(address.path)
        with self._answering(address.path) as replay:
            if version is None:
                raise NotFound(f"{address.path!r} is no download path of the site")
            choice = QueryParameters(parse_qsl(address.query))
            digest = file_digest(available_file(replay, int(version[1]), choice))
            if source := stored_file(replay, digest):
                return source
        raise NotFound(f"{address.path}: the folder has no file with the SHA256 {digest}")


def _error_of(failure: ApiFailure, path: str) -> Exception:
    return error_of(failure.status, path, orjson.dumps(failure.body))


def _parameters(params: Mapping[str, Any]) -> QueryParameters:
    """Build the query string that the client would send."""
    pairs = []
    for name, value in params.items():
        values = value if isinstance(value, list | tuple) else [value]
        pairs += [(name, str(item)) for item in values]
    return QueryParameters(pairs)


def _page(
    selection: Selection, cursor: str | None, parameters: QueryParameters, most: int
) -> tuple[Sequence[int], str | None]:
    """Return the indexes of a page and the next cursor."""
    limit = parameters.number("limit", low=1, high=most) or 100
    return selection.page(cursor, limit)
