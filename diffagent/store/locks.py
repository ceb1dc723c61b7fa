"""Exclusive locks on artefacts, which name their holder to those who wait.

The lock is the kernel's (flock): it ends with the process that holds it, whatever becomes of
that. The holder writes who it is into ``NAME.lock``, next to the artefact.
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
#: Between two messages to who waits.
_REMIND_SECONDS = 60.0


class Busy(Exception):  # noqa: N818  a condition that callers handle
    """Another process or thread holds the lock."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock ``PATH.lock`` as long as the block runs.

    A warning names the holder as soon as there is something to wait for, then once a minute.

    Raises:
        Busy: it is held, and ``wait`` is False.
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
                _report(path, stream, waited)
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
        stream.close()  # it was removed while this one waited for it


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


def _report(path: Path, stream: IO[bytes], waited: float) -> None:
    stream.seek(0)
    try:
        holder = json.loads(stream.read())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    log.warning(
        "waiting for %s, which %s is working on%s; this run goes on when that ends or is stopped",
        *(path, who, f" (waited {waited:.0f} s)" if waited > _POLL_SECONDS else ""),
    )
