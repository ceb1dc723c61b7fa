"""Exclusive locks on artifacts, which name their holder to the processes that wait.

The kernel holds the lock (flock): it ends with its process, however that ends. The holder writes
its process id and host into ``NAME.lock``, next to the artifact.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
#: Seconds between two messages about the same wait.
_REMIND_SECONDS = 60.0


class Busy(Exception):  # noqa: N818  a condition that callers handle
    """Another process or thread holds the lock."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock ``PATH.lock`` as long as the block runs.

    A warning names the holder when the wait begins, then once a minute.

    Raises:
        Busy: another process or thread holds it, and ``wait`` is False.
        OSError: the lock file cannot be written.
    """
    stream = _acquire(path, wait)
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        _write(stream, {"pid": os.getpid(), "host": platform.node(), "since": since})
        yield
    finally:
        _write(stream, {})
        stream.close()


def _acquire(path: Path, wait: bool) -> IO[bytes]:
    file = path.with_name(f"{path.name}.lock")
    started, reminder = time.monotonic(), 0.0
    while True:
        stream = file.open("ab+", buffering=0)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - started
            if wait and waited >= reminder:
                _log_wait(path, stream, waited)
                reminder += _REMIND_SECONDS
            stream.close()
            if not wait:
                raise Busy(str(path)) from None
            time.sleep(_POLL_SECONDS)
            continue
        except OSError:
            stream.close()
            raise
        if _is_at(stream, file):
            return stream
        stream.close()  # the file was removed during the wait


def _is_at(stream: IO[bytes], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _write(stream: IO[bytes], holder: dict[str, str | int]) -> None:
    """Name the holder; on a full disk the lock holds without a name."""
    with contextlib.suppress(OSError):
        stream.truncate(0)
        stream.write(json.dumps(holder).encode())


def _log_wait(path: Path, stream: IO[bytes], waited: float) -> None:
    stream.seek(0)
    try:
        holder = json.loads(stream.read())
        name = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        name = "another process"
    log.warning(
        "waiting for %s, which %s is working on%s; this run goes on when that ends or is stopped",
        *(path, name, f" (waited {waited:.0f} s)" if waited > _POLL_SECONDS else ""),
    )
