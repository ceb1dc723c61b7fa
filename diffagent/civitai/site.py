"""Interface of a Civitai to read from, whether it is the web site or a folder of its records.

``diffagent.civitai.client.CivitaiClient`` implements it over HTTP,
``diffagent.localcivitai.folder_site.FolderSite`` over records on disk;
``diffagent.localcivitai.site.open_site`` chooses by the address that a configuration names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffagent.civitai.pagination import Page


class Site(Protocol):
    """A Civitai to read from; threads may share it."""

    @property
    def origin(self) -> str:
        """'scheme://host[:port]' of the links in the site's records."""

    @property
    def requests(self) -> int:
        """Number of requests made."""

    @property
    def retries(self) -> int:
        """Number of requests that were repeated after a failure."""

    def stop(self) -> None:
        """Make calls of other threads fail instead of waiting for the site."""

    def close(self) -> None:
        """Release connections and files."""

    def get_models(self, cursor: str | None = None, **params: Any) -> Page:
        """Return one page of /models; parameters are the API's (``types`` may be a list)."""

    def get_images(self, cursor: str | None = None, **params: Any) -> Page:
        """Return one page of /images with generation metadata."""

    def get_model(self, model_id: int) -> dict[str, Any]:
        """Return /models/:id.

        Raises:
            NotFound: the site has no such model.
        """

    def get_version(self, version_id: int) -> dict[str, Any]:
        """Return /model-versions/:id, whose pictures have generation metadata.

        Raises:
            NotFound: the site has no such version.
        """

    def get_by_hash(self, digest: str) -> dict[str, Any]:
        """Return the version that has a file with this hash (AutoV1/2/3, SHA256, CRC32, BLAKE3).

        Several versions may have it; the site returns the one that was published first.

        Raises:
            NotFound: no file has this hash.
        """

    def get_ids_by_hash(self, sha256s: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return (model id, version id) by lower-case SHA256, for each file that the site has."""

    def get_model_page(self, model_id: int) -> dict[str, Any]:
        """Return the settings that only a model's page holds (``page_html.page_settings``).

        Raises:
            NotFound: the site has no such model.
            SchemaError: the page's state has an unknown form.
        """

    def download(
        self,
        url: int | str,
        path: Path,
        *,
        sha256: str | None = None,
        size_bytes: int | None = None,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> Path:
        """Fetch a model file to ``path``, whole and verified, or not at all.

        Args:
            url: a version id, or a download path or address of this site.
            path: destination; the file gets this name only once it is verified.
            sha256: hex digest that the file must have.
            size_bytes: size that the file must have, within the site's rounding to 1 kB.
            on_bytes: called with the number of bytes added, negative when the file starts again;
                an exception that it raises ends the transfer.

        Raises:
            CivitaiError: the size or SHA256 differs, or the site does not provide the file.
        """
