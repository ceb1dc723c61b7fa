"""The model store: gives the local file of a model, from a folder, the cache or the site.

A file is looked for in the folders that other programs keep (`diffagent.render.files.folders`),
then in
the cache (`diffagent.render.files.model_cache`), then downloaded into it through the Civitai
client, verified
by size and SHA256. Only safetensors enter (`diffagent.t2i.weights`). Names that a site gives
never become paths.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from filelock import FileLock, Timeout

from diffagent.crawl.meter import meter
from diffagent.errors import CivitaiError, DiffAgentError, RenderError
from diffagent.render.files.folders import ModelFolders
from diffagent.render.files.model_cache import ModelCache
from diffagent.t2i.weights import check_weights

if TYPE_CHECKING:
    from diffagent.schemas.runtime import RuntimeConfig

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_POLLS_UNTIL_WORD = 40  # two seconds


class ModelFile(Protocol):
    """What the store has to know of a file: a row of the catalogue."""

    @property
    def model(self) -> str: ...
    @property
    def air(self) -> str: ...
    @property
    def download_path(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def size_bytes(self) -> int | None: ...


class Downloader(Protocol):
    """The part of the Civitai client that the store uses: it verifies size and SHA256."""

    def download(
        self,
        url: str,
        path: Path,
        *,
        sha256: str | None = None,
        size_bytes: int | None = None,
        on_bytes: Callable[[int], None] = ...,
    ) -> Any: ...


class ModelStore:
    """Model files by their SHA256. Threads may share it, and processes its directory.

    Args:
        directory: of the cache.
        client: downloads what is not there.
        folders: that other programs keep, read in place.
        max_bytes: limit of the cache; None: no limit.
        max_downloads: at once, by all processes that share the directory.
    """

    def __init__(
        self,
        directory: Path,
        client: Downloader,
        *,
        folders: Sequence[Path] = (),
        max_bytes: int | None = None,
        max_downloads: int = 2,
    ) -> None:
        self.cache = ModelCache(directory, max_bytes)
        self.folders = ModelFolders(folders, directory / "folders.json")
        self.client = client
        self._max_downloads = max_downloads
        self._pool = ThreadPoolExecutor(max_downloads, "prefetch")
        self._closed = threading.Event()
        self._away: CivitaiError | None = None  # the site's last answer to all tries

    @classmethod
    def of(cls, runtime: RuntimeConfig, client: Downloader) -> Self:
        """The store that a run's settings describe."""
        return cls(
            runtime.models_directory,
            client,
            folders=[Path(folder) for folder in runtime.models.folders],
            max_bytes=runtime.models.max_bytes,
            max_downloads=runtime.models.max_downloads,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def path(self, sha256: str) -> Path:
        """Where the cache has the file of this hash, lower case, or will have it."""
        return self.cache.path(sha256)

    def fetch(self, file: ModelFile) -> Path:
        """The local file of a model, downloaded when it is not there.

        It is not evicted until ``release``, once for each ``fetch``, or ``close``.

        Raises:
            RenderError: not a sound safetensors file ('bad-model-file'), the catalogue has no
                hash to verify it by ('no-hash'), or it does not fit on the disk or into the limit
                ('no-room').
            CivitaiError: the site does not give it, or gives something else. EarlyAccess and
                DownloadsDisabled say why.
        """
        sha256 = _hash(file)
        target = self.cache.verified(sha256)
        if not target:
            if local := self.folders.find(sha256, file.size_bytes):
                return local
            self.cache.check_room(file.size_bytes or 0)
        target = self.cache.use(sha256, size=file.size_bytes or 0, model=file.model, air=file.air)
        try:
            if not self.cache.verified(sha256):
                with self._first_of([self.cache.download_lock(sha256)], file.model):
                    if not self.cache.verified(sha256):
                        self._download(file, sha256)
        except BaseException as error:
            self.cache.release(sha256)
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise RenderError(
                    f"{file.model!r} cannot be stored in the model cache: {error.strerror}",
                    reason="no-room",
                ) from error
            raise
        return target

    def release(self, *files: ModelFile) -> None:
        """Let files be evicted that were fetched and are not read any more."""
        for file in files:
            self.cache.release(_hash(file))

    def prefetch(self, files: Iterable[ModelFile]) -> list[Future[None]]:
        """Fetch files in the background, so that ``fetch`` finds them; returns at once.

        What goes wrong is logged, and told by ``fetch``. A file that was prefetched and not
        fetched yet may be evicted, as the last of all.
        """
        return [self._pool.submit(self._prefetch, file) for file in files]

    def local(self, sha256: str) -> Path | None:
        """The file of this hash, lower case, where it needs no download."""
        return self.folders.find(sha256) or self.cache.verified(sha256)

    def close(self) -> None:
        """Break off what is prefetched, and let everything be evicted.

        A prefetch that waits for the site ends when its client is closed.
        """
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.cache.close()

    def _prefetch(self, file: ModelFile) -> None:
        try:
            self.fetch(file)
        except (DiffAgentError, OSError) as error:
            log.info("prefetching %r: %s", file.model, error)
        else:
            self.release(file)

    def _download(self, file: ModelFile, sha256: str) -> None:
        if not file.download_path:
            raise RenderError(
                f"{file.model!r} is in none of the model folders; --download, or the site that "
                "has it (crawl.site), would fetch it",
                reason="not-here",
            )
        if self._away:
            raise self._away
        unchecked = self.path(sha256).with_suffix(".unchecked")
        part = unchecked.with_name(f"{unchecked.name}.part")
        progress = meter(lambda *_: None, file.model, file.size_bytes, "B")
        with self._turn(file.model), progress as more:
            there = part.stat().st_size if part.exists() else 0
            self.cache.make_room(max((file.size_bytes or 0) - there, 0))

            def on_bytes(number: int) -> None:
                more(number)
                if self._closed.is_set():
                    raise CivitaiError(f"{file.model!r}: broken off, the store was closed")

            try:
                self.client.download(
                    file.download_path,
                    unchecked,
                    sha256=file.sha256,
                    size_bytes=file.size_bytes,
                    on_bytes=on_bytes,
                )
            except CivitaiError as error:
                error.args = (f"{file.model!r}: {error}",)
                if error.retryable:  # all patience is spent: the next file waits no second time
                    self._away = error
                raise
            try:
                check_weights(unchecked)
            except RenderError as error:
                unchecked.unlink()
                problem = str(error).replace(unchecked.name, file.model)
                raise RenderError(problem, reason=error.reason) from error
            target = self.cache.settle(unchecked, sha256)
        log.info("fetched %r: %d bytes", file.model, target.stat().st_size)
        self.cache.make_room()

    def _turn(self, model: str) -> contextlib.AbstractContextManager[None]:
        """One of the downloads that all processes together may run at once."""
        folder = self.cache.directory / "downloads"
        folder.mkdir(parents=True, exist_ok=True)
        locks = [FileLock(folder / f"{n}.lock") for n in range(self._max_downloads)]
        return self._first_of(locks, model)

    @contextlib.contextmanager
    def _first_of(self, locks: Sequence[FileLock], model: str) -> Iterator[None]:
        """Hold the first of some locks that is free; a long wait is logged once."""
        polls = 0
        while not (held := next((lock for lock in locks if _try(lock)), None)):
            polls += 1
            if polls == _POLLS_UNTIL_WORD:
                log.warning(
                    "%r waits for downloads of other processes (%s); it goes on when one ends",
                    *(model, locks[0].lock_file),
                )
            if self._closed.wait(_POLL_SECONDS):
                raise CivitaiError("the store was closed while a download waited for its turn")
        try:
            yield
        finally:
            held.release()


def _try(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _hash(file: ModelFile) -> str:
    return (file.sha256 or "").lower()
