"""Child processes that end with their parent, which cannot stop them when it is killed."""

from __future__ import annotations

import os
import signal
import threading
import time

_POLL_SECONDS = 0.5


def end_with(parent: int) -> None:
    """End this process soon after the process ``parent`` has ended.

    Args:
        parent: id of the process that started this one and wants its answer.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:  # an orphan gets another parent
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
