"""Status line of a terminal: the current stage, its time and its progress.

Without a terminal on standard error the line is not written, so that pipes and logs stay clean.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from diffagent.cli.options import ANSWERS
from diffagent.schemas.printable import printable

_TICK_SECONDS = 1.0
_CLEAR = "\r\x1b[2K"


class Status:
    """A line that is overwritten: name of the stage, time, and its last message.

    Args:
        stream: terminal to write to; None shows nothing.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lock = threading.RLock()
        self._name = self._text = ""
        self._fraction: float | None = None
        self._started = 0.0

    def start(self, name: str) -> None:
        """Show ``name`` as the current stage, from 0:00."""
        with self._lock:
            self._name, self._text, self._fraction = name, "", None
            self._started = time.monotonic()
        self.draw()

    def stop(self) -> None:
        """Clear the line until the next ``start``."""
        self.clear()
        self._name = ""

    def progress(self, fraction: float | None, text: str) -> None:
        """Show how far the stage is: the callback ``diffagent.store.Progress``."""
        with self._lock:
            self._fraction, self._text = fraction, text
        self.draw()

    def show_message(self, text: str) -> None:
        """Show a message of the stage; its progress stays."""
        with self._lock:
            self._text = text
        self.draw()

    def clear(self) -> None:
        """Clear the line, for another line in its place."""
        with self._lock:
            if self._stream and self._name:
                self._write(_CLEAR)

    def draw(self) -> None:
        """Redraw the line."""
        with self._lock:
            if self._stream and self._name:
                self._write(_CLEAR + self._line())

    def _line(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        done = "" if self._fraction is None else f" {self._fraction:4.0%}"
        text = f"{self._name}  {minutes}:{seconds:02}{done}  {self._text}"
        width = shutil.get_terminal_size().columns - 1
        return f"{' '.join(printable(text).split(chr(10))):.{width}}"

    def _write(self, text: str) -> None:
        if self._stream:
            self._stream.write(text)
            self._stream.flush()


class _StatusHandler(logging.Handler):
    """Log handler that shows each record on the status line."""

    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        """Show the message of a record."""
        self._status.show_message(record.getMessage())


@contextlib.contextmanager
def status_line() -> Iterator[Status]:
    """Yield a status line that shows records of the library while the block runs.

    It is shown on a terminal, unless -v shows the log itself or -q hides it. Warnings and errors
    are written above it.
    """
    library = logging.getLogger("diffagent")
    shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if not shown or library.isEnabledFor(logging.INFO) or not library.isEnabledFor(logging.WARNING):
        yield Status(None)
        return
    status, level, over = Status(sys.stderr), library.level, threading.Event()
    handlers = logging.getLogger().handlers

    def make_room(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING and record.name not in ANSWERS:
            return False
        status.clear()
        return True

    def tick() -> None:
        while not over.wait(_TICK_SECONDS):
            status.draw()

    messages, ticker = _StatusHandler(status), threading.Thread(target=tick, daemon=True)
    library.setLevel(logging.INFO)
    library.addHandler(messages)
    for handler in handlers:
        handler.addFilter(make_room)
    ticker.start()
    try:
        yield status
    finally:
        over.set()
        ticker.join()
        status.stop()
        for handler in handlers:
            handler.removeFilter(make_room)
        library.removeHandler(messages)
        library.setLevel(level)
