"""Locks: exclusive between threads and processes, and no wait in silence."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffagent.store import locks
from diffagent.store.locks import Busy, locked

_HOLD = (
    "import sys; from pathlib import Path; from diffagent.store.locks import locked\n"
    "with locked(Path(sys.argv[1])): print('holds', flush=True); sys.stdin.read()"
)


def test_a_wait_logs_the_holder_at_once_and_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_REMIND_SECONDS", 0.5)
    path = tmp_path / "artifact"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin and holder.stdout and holder.stdout.readline() == "holds\n"
    with pytest.raises(Busy), locked(path, wait=False):
        raise AssertionError("held twice")
    entered = threading.Event()

    def wait() -> None:
        with locked(path):
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while len(caplog.records) < 2:
        assert not entered.wait(0.05)
    holder.stdin.close()  # it ends
    thread.join(10)
    assert entered.is_set() and holder.wait(10) == 0
    first, again = (record.getMessage() for record in caplog.records[:2])
    assert f"process {holder.pid} on {os.uname().nodename}, since 20" in first
    assert str(path) in first and "(waited" not in first and "(waited" in again
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    command = [sys.executable, "-c", _HOLD, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "holds\n"
    holder.kill()
    holder.wait(10)
    with locked(path, wait=False):
        assert str(os.getpid()) in path.with_name("artifact.lock").read_text()


def test_a_lock_file_that_is_removed_still_excludes(tmp_path: Path) -> None:
    path, order = tmp_path / "artifact", []

    def second() -> None:
        with locked(path):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        path.with_name("artifact.lock").unlink()
        with locked(path):  # of a new file: the waiting thread must take this one's turn, not ours
            order.append("first")
            thread.join(0.6)
            assert order == ["first"]
    thread.join(10)
    assert order == ["first", "second"]
