"""Repeated calls to a server: exponential backoff with jitter, within a time budget."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from diffagent.errors import DiffAgentError

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Limits on how long and how often a call is tried.

    Attributes:
        first, longest: seconds of the first and of the longest pause.
        budget: seconds without progress after which a call fails.
        connect_timeout, read_timeout: seconds without a connection, and without a byte.
        answer: seconds that a whole answer may take, however slowly it arrives; not for a file.
        slowest: bytes per second below which the download of a file makes no progress.
    """

    first: float = 1.0
    longest: float = 30.0
    budget: float = 600.0
    connect_timeout: float = 10.0
    read_timeout: float = 120.0
    answer: float = 300.0
    slowest: float = 1024.0

    def pause(self, failures: int, rng: random.Random) -> float:
        """Return the seconds to pause after so many failures in a row: exponential, with jitter."""
        return min(self.longest, self.first * 2.0 ** min(failures, 30)) * rng.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Failure:
    """A failed try: its error, the failures in a row, and the seconds until the next try."""

    error: DiffAgentError
    failures: int
    pause: float


class Retries:
    """The retry loop of one client; threads may share it.

    Args:
        patience: gives the pauses.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._rng = random.Random(0)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let every call that waits for its next try fail with the error of its last one."""
        self._stopped.set()

    def run(
        self,
        call: Callable[[], T],
        *,
        seconds_left: Callable[[], float],
        can_retry: Callable[[DiffAgentError], bool],
        give_up: Callable[[Failure], DiffAgentError],
        on_failure: Callable[[Failure], None],
        has_progressed: Callable[[], bool] = lambda: False,
    ) -> T:
        """Call until it succeeds, fails for good, or makes no progress within its budget.

        Args:
            call: may raise an error with ``retry_after``, the least seconds until the next try.
            seconds_left: of the budget.
            can_retry: called after each failure: whether the next try may succeed.
            give_up: makes the error for a next try that would be later than the budget allows.
            on_failure: called before each pause.
            has_progressed: whether the failed try got further than the one before, which resets
                the pauses.

        Raises:
            DiffAgentError: the error of ``give_up``, or one of ``call`` that no try can mend.
        """
        failures = 0
        while True:
            try:
                return call()
            except DiffAgentError as raised:
                if not can_retry(raised):
                    raise
                error = raised
            if has_progressed():
                failures = 0
            retry_after = getattr(error, "retry_after", None) or 0.0
            pause = max(self._patience.pause(failures, self._rng), retry_after)
            failures += 1
            failure = Failure(error, failures, pause)
            if pause > seconds_left():
                raise give_up(failure) from None
            on_failure(failure)
            if self._stopped.wait(pause):
                raise error
