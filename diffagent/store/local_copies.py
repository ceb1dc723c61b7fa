"""The local side of a remote store: a directory with a size limit that holds copies of artifacts.

Artifacts are built and read there. Its root holds ``store-uri``, the address of the store. Every
process that reads an artifact holds a shared lock on ``NAME.use``, whose time is that of the last
use; the least recently used copies are removed first, and only those that the store has.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.failures import explained
from diffagent.store import integrity, object_store
from diffagent.store.integrity import Extent
from diffagent.store.locks import Busy, locked
from diffagent.store.manifest_file import MANIFEST

log = logging.getLogger(__name__)

_ADDRESS = "store-uri"
_REMOVED = ".removed"


def mark(root: Path, store: str) -> None:
    """Record that ``root`` is the local side of ``store``."""
    address = root / _ADDRESS
    if not address.exists():
        root.mkdir(parents=True, exist_ok=True)
        address.write_text(store, encoding="utf-8")


def remote_of(directory: Path) -> str | None:
    """Return the URI of the artifact that ``directory`` is a copy of; None in a local store."""
    try:
        store = (directory.resolve().parents[1] / _ADDRESS).read_text(encoding="utf-8")
    except (OSError, IndexError):
        return None
    return f"{store}/{directory.resolve().parent.name}/{directory.name}"


def is_current(directory: Path, content_digest: str) -> bool:
    """Whether ``directory`` holds a whole artifact with this content digest."""
    try:
        stat = (directory / MANIFEST).stat()
    except OSError:
        return False
    return _whole_content(directory, stat.st_ino, stat.st_mtime_ns) == content_digest


@functools.lru_cache(maxsize=1024)
def _whole_content(directory: Path, inode: int, mtime_ns: int) -> str:
    """Return the content digest of a whole artifact, checked once while its manifest stays.

    The result is empty for a damaged artifact.
    """
    try:
        return integrity.checked_manifest(directory).content_digest
    except ArtifactError:
        return ""


def fetch_copy(uri: str, content_digest: str, directory: Path, extent: Extent = "changed") -> None:
    """Make ``directory`` hold the artifact at ``uri``; the caller has the lock of ``directory``.

    Args:
        uri: of the artifact.
        content_digest: of the artifact; other content that is in ``directory`` is renamed.
        directory: of the copy.
        extent: which files of a copy that exists already are compared with its manifest.

    Raises:
        ArtifactError: the store cannot be read, or has other or damaged content by now.
    """
    damaged = None
    if directory.exists():
        try:
            present = integrity.checked_manifest(directory, extent).content_digest
        except DamagedArtifact as error:
            log.warning("%s; it is copied from the store again", integrity.first_clause(error))
            damaged = integrity.set_aside(directory)
        else:
            if present == content_digest:
                return
            integrity.retire(directory, present)
    manifest = object_store.read_expected(uri, content_digest)
    mark(directory.parents[1], uri.rsplit("/", 2)[0])
    with explained(f"copying {uri}", directory.parent):
        object_store.pull(uri, manifest, directory)
    integrity.note_read(directory, manifest)
    if damaged:
        shutil.rmtree(damaged)


@contextlib.contextmanager
def in_use(directories: Iterable[Path]) -> Iterator[None]:
    """Keep ``directories`` from being removed (``remove_unused``) as long as the block runs."""
    with contextlib.ExitStack() as stack:
        for directory in directories:
            directory.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(_use_file(directory).open("a"))
            fcntl.flock(stream, fcntl.LOCK_SH)
            _use_file(directory).touch()
        yield


def trim(root: Path, limit: int, in_store: Callable[[Path], bool]) -> None:
    """Remove the least recently used artifacts until all take at most ``limit`` bytes.

    Args:
        root: the local side of a store.
        limit: bytes.
        in_store: whether the store has this very artifact; no other is removed.
    """
    with contextlib.suppress(Busy), locked(root / ".trim", wait=False):
        manifests = [p for p in root.glob(f"*/*/{MANIFEST}") if p.parent.name[0] != "."]
        sizes = {p.parent: size for p in manifests if (size := _size(p))}
        total = sum(sizes.values())
        for directory in sorted(sizes, key=_last_use):
            if total <= limit:
                return
            if remove_unused(directory, in_store):
                total -= sizes[directory]
        if total > limit:
            log.warning(
                "%s holds %.1f GB, more than runtime.cache.max_gb (%.1f): the rest is in use, "
                "or the store does not have it yet",
                *(root, total / 1e9, limit / 1e9),
            )


def remove_unused(
    directory: Path,
    is_removable: Callable[[Path], bool] = lambda directory: True,
    *,
    lock: Path | None = None,
) -> bool:
    """Remove a directory that no process reads or writes, in one step; False when it stays.

    Args:
        directory: to be removed.
        is_removable: decides last, when no other process can use the directory any more.
        lock: the artifact whose lock covers the directory; by default the directory itself.
    """
    lock = lock or directory
    try:
        with locked(lock, wait=False), _use_file(lock).open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_removable(directory):
                return False
            hidden = directory
            if not directory.name.endswith(_REMOVED):
                hidden = directory.with_name(f".{directory.name}{_REMOVED}")
                directory.rename(hidden)
            shutil.rmtree(hidden)
            integrity.forget(directory)
            if not lock.exists():  # a process that waits for either notices that the file changed
                _use_file(lock).unlink(missing_ok=True)
                lock.with_name(f"{lock.name}.lock").unlink(missing_ok=True)
    except (Busy, BlockingIOError):
        return False
    log.info("%s: removed", directory)
    return True


def _use_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.use")


def _last_use(directory: Path) -> float:
    use = _use_file(directory)
    return (use if use.exists() else directory).stat().st_mtime


def _size(manifest: Path) -> int:
    """Return the bytes of an artifact's files; 0 while it is being replaced."""
    try:
        return sum(entry["size"] for entry in json.loads(manifest.read_bytes())["files"])
    except FileNotFoundError:
        return 0
