"""The local side of a remote store: artefacts are built and read in a directory with a bound.

Its root holds ``store-uri``, the address of the store. Whoever reads an artefact holds
``NAME.use`` (shared lock), whose time is that of the last use; what was not used for longest is
removed first, and only when the store has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from diffagent.store import wholeness
from diffagent.store.locks import Busy, locked

log = logging.getLogger(__name__)

_ADDRESS = "store-uri"
_REMOVED = ".removed"


def mark(root: Path, store: str) -> None:
    """Say that ``root`` is the local side of ``store``."""
    address = root / _ADDRESS
    if not address.exists():
        root.mkdir(parents=True, exist_ok=True)
        address.write_text(store, encoding="utf-8")


def remote_of(directory: Path) -> str | None:
    """The URI of the artefact whose local copy ``directory`` is; None: of no remote store."""
    try:
        store = (directory.resolve().parents[1] / _ADDRESS).read_text(encoding="utf-8")
    except (OSError, IndexError):
        return None
    return f"{store}/{directory.resolve().parent.name}/{directory.name}"


@contextlib.contextmanager
def in_use(directories: Iterable[Path]) -> Iterator[None]:
    """Keep ``directories`` from being removed by ``trim`` as long as the block runs."""
    with contextlib.ExitStack() as stack:
        for directory in directories:
            directory.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(_use_of(directory).open("a"))
            fcntl.flock(stream, fcntl.LOCK_SH)
            _use_of(directory).touch()
        yield


def trim(root: Path, limit: int, in_store: Callable[[Path], bool]) -> None:
    """Remove what was not used for longest until whole artefacts take at most ``limit`` bytes.

    Args:
        root: the local side of a store.
        limit: bytes.
        in_store: whether the store has this very artefact; nothing else is removed.
    """
    with contextlib.suppress(Busy), locked(root / ".trim", wait=False):
        manifests = [p for p in root.glob("*/*/manifest.json") if p.parent.name[0] != "."]
        sizes = {p.parent: size for p in manifests if (size := _size(p))}
        total = sum(sizes.values())
        for directory in sorted(sizes, key=_last_use):
            if total <= limit:
                return
            if remove_unused(directory, in_store):
                total -= sizes[directory]
        if total > limit:
            log.warning(
                "%s holds %.1f GB, more than runtime.cache.max_gb (%.1f): the rest is in use, or the "
                "store does not have it yet",
                *(root, total / 1e9, limit / 1e9),
            )


def remove_unused(
    directory: Path,
    may_go: Callable[[Path], bool] = lambda directory: True,
    *,
    lock: Path | None = None,
) -> bool:
    """Remove a directory that no process reads or writes, in one step; False: it stays.

    Args:
        directory: to be removed.
        may_go: has the last word, once no other process can use the directory.
        lock: the artefact whose lock covers it; by default its own.
    """
    lock = lock or directory
    try:
        with locked(lock, wait=False), _use_of(lock).open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not may_go(directory):
                return False
            gone = directory
            if not directory.name.endswith(_REMOVED):
                gone = directory.with_name(f".{directory.name}{_REMOVED}")
                directory.rename(gone)
            shutil.rmtree(gone)
            wholeness.forget(directory)
            if not lock.exists():  # who waits for either notices that the file is another one
                _use_of(lock).unlink(missing_ok=True)
                lock.with_name(f"{lock.name}.lock").unlink(missing_ok=True)
    except (Busy, BlockingIOError):
        return False
    log.info("%s: removed", directory)
    return True


def _use_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.use")


def _last_use(directory: Path) -> float:
    use = _use_of(directory)
    return (use if use.exists() else directory).stat().st_mtime


def _size(manifest: Path) -> int:
    """Bytes of an artefact's files; 0 when it is just being replaced."""
    try:
        return sum(entry["size"] for entry in json.loads(manifest.read_bytes())["files"])
    except FileNotFoundError:
        return 0
