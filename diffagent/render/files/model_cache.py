"""Model files on disk by their content, for several processes at once, within a limit of bytes.

Of a file with the SHA256 ``abcd...`` there are in ``DIR/ab``:

* ``abcd....safetensors``: the file, verified; written through to the disk, then renamed;
* ``abcd....unchecked``, ``abcd....unchecked.part``: it on its way;
* ``abcd....json``: its name for people, whether a person imported it, and the size and times at
  which its hash was verified; the time of this small file is that of the last use;
* ``abcd....pin``: there as long as the file is pinned;
* ``abcd....lock``: held by the process that downloads it.

``DIR/in-use/ID`` names the files that one process uses. It is locked as long as that process
lives, so that what a killed one has used is free again. Using and evicting happen under
``DIR/cache.lock``: a file is either in use before it could be evicted, or gone before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from diffagent.errors import ConfigError, RenderError
from diffagent.store import atomic_file, sha256_file
from diffagent.t2i.weights import check_weights, reading

log = logging.getLogger(__name__)

_HEX = frozenset("0123456789abcdef")
_WEIGHTS = ("safetensors", "unchecked", "unchecked.part")


@dataclass(frozen=True)
class CachedModel:
    """A file of the cache, or what there is of it.

    ``size`` in bytes is what it takes or, while it is on its way, will take; ``used`` is when it
    was used last, in seconds since the epoch; ``complete``: not on its way or left there;
    ``imported``: by a person, so that it is evicted only when that is asked for.
    """

    sha256: str
    size: int
    used: float
    complete: bool = True
    pinned: bool = False
    in_use: bool = False
    model: str = ""
    air: str = ""
    imported: bool = False

    def may_go(self, imported: bool = False) -> bool:
        """Whether it may be evicted; ``imported``: also files that a person imported."""
        return not (self.pinned or self.in_use or (self.imported and not imported))


def to_evict(
    files: Iterable[CachedModel], excess: int, imported: bool = False
) -> list[CachedModel]:
    """Choose the files that have to go to free ``excess`` bytes, or all where that is not enough.

    Nothing that is pinned, in use or imported goes. Remains of broken downloads go first, then
    what was not used for the longest time, and no more than needed.

    Args:
        files: of the cache.
        excess: bytes.
        imported: files that a person imported may go too.
    """
    free = (file for file in files if file.may_go(imported))
    chosen: list[CachedModel] = []
    for file in sorted(free, key=lambda file: (file.complete, file.used, file.sha256)):
        if excess <= 0:
            break
        chosen.append(file)
        excess -= file.size
    return chosen


class ModelCache:
    """The directory, and what this process uses of it. Threads may share it.

    Args:
        directory: may be shared by processes.
        max_bytes: of all files; None: no limit. What is pinned or in use stays even beyond it.
    """

    def __init__(self, directory: Path, max_bytes: int | None = None) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self._uses: Counter[str] = Counter()
        self._register: IO[str] | None = None
        self._mutex = threading.RLock()

    def path(self, sha256: str) -> Path:
        """Where the file of this hash lies, or will."""
        if len(sha256) != 64 or not set(sha256) <= _HEX:
            raise RenderError(f"{sha256!r} is not a SHA256 in lower case", reason="no-hash")
        return self.directory / sha256[:2] / f"{sha256}.safetensors"

    def use(self, sha256: str, *, size: int = 0, model: str = "", air: str = "") -> Path:
        """Keep a file from being evicted until ``release``, whether it is there yet or not.

        Args:
            sha256: of the file.
            size: in bytes, that room is kept for until the file is there.
            model: its name, for people.
            air: its AIR, for people.
        """
        target = self.path(sha256)
        with self._locked():
            if "model" in self._about(sha256):
                os.utime(target.with_suffix(".json"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._note(sha256, model=model, air=air, size=size)
            self._uses[sha256] += 1
            if self._uses[sha256] == 1:
                self._write_uses()
        return target

    def release(self, sha256: str) -> None:
        """Take back one ``use``, if there is one."""
        with self._locked():
            if not self._uses[sha256]:
                return
            self._uses[sha256] -= 1
            if self._uses[sha256] > 0:
                return
            del self._uses[sha256]
            self._write_uses()
            names = {path.name for path in self.path(sha256).parent.glob(f"{sha256}.*")}
            if not names & {f"{sha256}.{end}" for end in _WEIGHTS} and (
                sha256 not in self._all_uses()
            ):
                self._unlink(sha256)  # it did not come

    def close(self) -> None:
        """Take back every ``use``."""
        with self._mutex:
            self._uses.clear()
            if self._register:
                Path(self._register.name).unlink(missing_ok=True)
                self._register.close()
                self._register = None

    def files(self) -> list[CachedModel]:
        """What is there, sorted by hash."""
        with self._locked():
            return self._files()

    def verified(self, sha256: str) -> Path | None:
        """The file of this hash; None when there is none.

        Its size and times are compared at each use, and its hash after each change of them. A
        file that has another hash by now is deleted, so that it is fetched again.
        """
        target = self.path(sha256)
        try:
            stamp = _stamp(target)
            if self._about(sha256).get("verified") == stamp:
                return target
            log.info("verifying %s: its size or time has changed, or it never was", target.name)
            actual = sha256_file(target)
        except FileNotFoundError:  # or another thread or process has just deleted it
            return None
        with self._locked():
            if actual == sha256:
                self._note(sha256, verified=stamp)
                return target
            if target.exists() and _stamp(target) == stamp:
                log.warning(
                    "%s is damaged: %d bytes with SHA256 %s; it is deleted and fetched again",
                    target, stamp[0], actual,
                )  # fmt: skip
                target.unlink()
        return None

    def settle(self, unchecked: Path, sha256: str) -> Path:
        """Make a file whose hash was checked the one of the cache.

        It reaches the disk before its name does, so that a machine that goes down leaves the whole
        file or none.
        """
        target = self.path(sha256)
        _sync(unchecked)
        unchecked.replace(target)
        _sync(target.parent)
        with self._locked():
            self._note(sha256, verified=_stamp(target))
        return target

    def check_room(self, coming: int) -> None:
        """Refuse a file that does not fit, before anything is evicted for it.

        Args:
            coming: bytes.

        Raises:
            RenderError: it is larger than the limit, or than what is free on the disk and what
                may be evicted; reason 'no-room'.
        """
        with self._locked():
            self._check_room(coming, self._files())

    def _check_room(self, coming: int, files: Iterable[CachedModel]) -> None:
        if self.max_bytes is not None and coming > self.max_bytes:
            raise RenderError(
                f"a file of {coming} bytes is larger than the model cache may be "
                f"({self.max_bytes}); raise runtime.models.max_gb (--limit-gb)",
                reason="no-room",
            )
        free = shutil.disk_usage(self.directory).free
        evictable = sum(file.size for file in files if file.may_go())
        if coming > free + evictable:
            raise RenderError(
                f"a file of {coming} bytes does not fit on the disk of the model cache: {free} "
                f"bytes are free and {evictable} can be evicted; make room, or name a directory "
                "elsewhere (runtime.models.directory, --models)",
                reason="no-room",
            )

    def make_room(self, coming: int = 0, *, imported: bool = False) -> list[CachedModel]:
        """Evict until the limit is kept, and ``coming`` more bytes fit on the disk.

        Args:
            coming: bytes.
            imported: files that a person imported may go too.

        Returns:
            The files that went.

        Raises:
            RenderError: see `check_room`; then nothing went.
        """
        with self._locked():
            files = self._files()
            self._check_room(coming, files)
            used = sum(file.size for file in files)
            over = used - self.max_bytes if self.max_bytes is not None else 0
            missing = coming - shutil.disk_usage(self.directory).free
            gone = to_evict(files, max(over, missing), imported)
            for file in gone:
                self._unlink(file.sha256)
                log.info("evicted %s %r: %d bytes", file.sha256[:10], file.model, file.size)
        if over > sum(file.size for file in gone):
            log.warning(
                "the model cache %r takes %d bytes, more than its limit of %s: the rest is pinned, "
                "imported or in use",
                str(self.directory),
                used - sum(file.size for file in gone),
                self.max_bytes,
            )
        return gone

    def pin(self, sha256: str, pinned: bool = True) -> None:
        """Never evict a file, or let it be evicted again."""
        mark = self.path(sha256).with_suffix(".pin")
        with self._locked():
            if pinned:
                mark.touch()
            else:
                mark.unlink(missing_ok=True)

    def remove(self, sha256: str) -> None:
        """Evict one file.

        Raises:
            ConfigError: it is pinned, in use or not there.
        """
        with self._locked():
            found = next((file for file in self._files() if file.sha256 == sha256), None)
            if found is None or found.pinned or found.in_use:
                why = "in use by a process" if found else "not there"
                if found and found.pinned:
                    why = "pinned; see `diffagent models unpin`"
                raise ConfigError(f"{sha256} is not evicted: {why}")
            self._unlink(sha256)

    def add(self, source: Path) -> tuple[str, Path]:
        """Copy a file into the cache, checked as a download is; only a person's wish evicts it.

        Returns:
            Its SHA256 and where it lies.

        Raises:
            RenderError: it cannot be read, must not be loaded ('bad-model-file'), or does not fit
                ('no-room').
        """
        with reading(str(source), "cannot be read"):
            if not source.is_file():
                why = "it is a folder" if source.is_dir() else "there is no such file"
                raise RenderError(f"{str(source)!r}: {why}", reason="bad-model-file")
            size = source.stat().st_size
            self.check_room(size)
            check_weights(source)
            sha256 = sha256_file(source)
        target = self.use(sha256, size=size, model=source.stem)
        try:
            with self.download_lock(sha256):
                if not self.verified(sha256):
                    self.make_room(size)
                    self._copy(source, sha256)
            with self._locked():
                self._note(sha256, imported=True)
        finally:
            self.release(sha256)
        return sha256, target

    def _copy(self, source: Path, sha256: str) -> None:
        unchecked = self.path(sha256).with_suffix(".unchecked")
        try:
            shutil.copyfile(source, unchecked)
            if sha256_file(unchecked) != sha256:
                raise RenderError(
                    f"{str(source)!r} changed while it was copied; import it again",
                    reason="bad-model-file",
                )
            self.settle(unchecked, sha256)
        except OSError as error:
            raise RenderError(
                f"{str(source)!r} cannot be copied to {str(self.directory)!r}: {error.strerror}",
                reason="no-room",
            ) from error
        finally:
            unchecked.unlink(missing_ok=True)

    def download_lock(self, sha256: str) -> FileLock:
        """Held by who puts the file there."""
        return FileLock(self.path(sha256).with_suffix(".lock"))

    # Under the lock

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                with FileLock(self.directory / "cache.lock"):
                    yield
            except OSError as error:
                problem = (
                    f"the model cache {str(self.directory)!r} cannot be written: "
                    f"{error.strerror or error}; name a directory with --models or "
                    "runtime.models.directory"
                )
                if error.errno == errno.ENOSPC:  # of one file: the others may be there already
                    raise RenderError(problem, reason="no-room") from error
                raise ConfigError(problem) from error

    def _about(self, sha256: str) -> dict[str, Any]:
        """The notes of a file; {} when there are none."""
        try:
            about = json.loads(self.path(sha256).with_suffix(".json").read_bytes())
        except (FileNotFoundError, ValueError):  # the machine went down while it was written
            return {}
        return about if isinstance(about, dict) else {}

    def _note(self, sha256: str, **notes: Any) -> None:
        """Change notes of a file."""
        with atomic_file(self.path(sha256).with_suffix(".json")) as file:
            file.write_text(json.dumps({**self._about(sha256), **notes}))

    def _files(self) -> list[CachedModel]:
        uses = self._all_uses()
        parts: dict[str, dict[str, Path]] = {}
        for path in self.directory.glob("??/*"):
            sha256, _, ending = path.name.partition(".")
            if len(sha256) == 64 and set(sha256) <= _HEX:
                parts.setdefault(sha256, {})[ending] = path
        return [self._describe(name, parts[name], name in uses) for name in sorted(parts)]

    def _describe(self, sha256: str, parts: dict[str, Path], in_use: bool) -> CachedModel:
        # What comes may be renamed meanwhile; what is there stays under this lock.
        stats = [_stat(parts[end]) for end in _WEIGHTS if end in parts]
        size = sum(stat.st_size for stat in stats if stat)
        complete = "safetensors" in parts
        about = self._about(sha256)
        if "json" in parts:
            stats = [parts["json"].stat()]
        if in_use and not complete:
            size = max(size, about.get("size", 0))
        return CachedModel(
            sha256=sha256,
            size=size,
            used=max((stat.st_mtime for stat in stats if stat), default=0.0),
            complete=complete,
            pinned="pin" in parts,
            in_use=in_use,
            model=about.get("model", ""),
            air=about.get("air", ""),
            imported=about.get("imported") is True,
        )

    def _unlink(self, sha256: str) -> None:
        # The lock too: who waits for it has said before that the file is in use.
        for path in self.path(sha256).parent.glob(f"{sha256}.*"):
            path.unlink(missing_ok=True)

    def _write_uses(self) -> None:
        if self._register is None:
            if not self._uses:
                return
            folder = self.directory / "in-use"
            folder.mkdir(exist_ok=True)
            self._register = (folder / uuid.uuid4().hex).open("w", encoding="ascii")
            fcntl.flock(self._register, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._register.seek(0)
        self._register.truncate()
        self._register.write("\n".join(self._uses))
        self._register.flush()

    def _all_uses(self) -> set[str]:
        """Hashes in use by any process; forgets the processes that are no more."""
        found = set(self._uses)
        for path in (self.directory / "in-use").glob("*"):
            if self._register and path.name == Path(self._register.name).name:
                continue
            with contextlib.suppress(FileNotFoundError), path.open(encoding="ascii") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.update(stream.read().split())
                else:
                    path.unlink(missing_ok=True)
        return found


def _stamp(path: Path) -> list[int]:
    """Size and times of a file, which change whenever its content does."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stat(path: Path) -> os.stat_result | None:
    return path.stat() if path.exists() else None
