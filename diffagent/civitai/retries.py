"""The retry rule of the client: backoff with jitter until a call makes no progress for too long."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from diffagent.civitai.ratelimit import TokenBucket
from diffagent.civitai.transport import Deadline
from diffagent.errors import CivitaiError, RateLimited, ServerError

log = logging.getLogger(__name__)

T = TypeVar("T")
#: Seconds between two warnings of failed attempts: of different calls, and of one call.
_NEXT_WARNING, _REPEATED_WARNING = 5.0, 30.0


@dataclass(frozen=True)
class Patience:
    """How long and how often a call is attempted.

    Attributes:
        first, longest: seconds of the first and of the longest pause.
        budget: seconds without progress after which a call fails.
        connect_timeout, read_timeout: seconds without a connection, and without a byte.
        answer: seconds that a whole answer may take, however slowly it arrives; not of a file.
        slowest: bytes a second; a file that arrives more slowly makes no progress.
    """

    first: float = 1.0
    longest: float = 30.0
    budget: float = 600.0
    connect_timeout: float = 10.0
    read_timeout: float = 120.0
    answer: float = 300.0
    slowest: float = 1024.0

    def pause(self, failures: int, rng: random.Random) -> float:
        """Return the pause after so many failures in a row: exponential, with jitter."""
        return min(self.longest, self.first * 2.0 ** min(failures, 30)) * rng.uniform(0.5, 1.0)


LOOPBACK_PATIENCE = Patience(first=0.02, longest=0.5, budget=120.0)


class RetryLoop:
    """Repeats the calls of one client while they fail with ``ServerError`` or ``RateLimited``.

    Threads share it: a Retry-After that one of them receives holds the rate limit of all, and one
    warning covers failures at the same time.

    Attributes:
        retries: number of repeated attempts.
    """

    def __init__(self, origin: str, patience: Patience, bucket: TokenBucket) -> None:
        self.patience, self.retries = patience, 0
        self._origin, self._bucket = origin, bucket
        self._rng = random.Random(0)
        self._call = threading.local()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._warned = -math.inf

    def stop(self) -> None:
        """Make calls of all threads fail at their next pause."""
        self._stopped.set()

    @property
    def budget(self) -> Deadline | None:
        """Time that the current call of this thread has left; None outside a call."""
        budget: Deadline | None = getattr(self._call, "budget", None)
        return budget

    def run(self, call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Call until it succeeds, fails for good, or makes no progress for the whole budget.

        Args:
            call: one attempt. A ``run`` inside it makes no attempts of its own.
            progress: number of bytes received so far; fast progress renews the budget.

        Raises:
            ServerError, RateLimited: of the last attempt.
        """
        if self.budget:
            return call()
        budget = self._call.budget = Deadline(self.patience.budget, self.patience.slowest)
        try:
            return self._attempt(call, progress, budget)
        finally:
            self._call.budget = None

    def _attempt(self, call: Callable[[], T], progress: Callable[[], int], budget: Deadline) -> T:
        failures, reached = 0, progress()
        while True:
            problem: ServerError | RateLimited
            try:
                result = call()
            except (ServerError, RateLimited) as error:
                problem = error
            else:
                if failures:
                    log.info("%s answers again", self._origin)
                return result
            more, reached = progress() - reached, progress()
            if more > 0 and budget.gained(more):
                failures = 0
            wait = problem.retry_after or 0.0
            pause = max(self.patience.pause(failures, self._rng), wait)
            failures += 1
            if pause > budget.left():
                reason = f" (the site requests a pause of {wait:.0f} s)" if wait >= pause else ""
                attempts = f"{failures} attempts" if failures > 1 else "one attempt"
                raise type(problem)(
                    f"{self._origin}: gave up after {attempts}; the next one would be later than "
                    f"the {budget.seconds:.0f} s of its budget: {problem}{reason}",
                    retry_after=problem.retry_after,
                ) from None
            if wait:  # the site addresses the whole process
                self._bucket.hold(wait)
            with self._lock:
                self.retries += 1
            self._warn(problem, failures, pause, budget.left())
            if self._stopped.wait(pause):
                raise problem

    def _warn(self, problem: CivitaiError, failures: int, pause: float, left: float) -> None:
        """Log a failed attempt: the first of a call at once, further ones every half minute.

        Several threads fail at the same time when a site is away: one line covers them all.
        """
        now = time.monotonic()
        with self._lock:
            loud = now - self._warned >= (_NEXT_WARNING if failures == 1 else _REPEATED_WARNING)
            self._warned = now if loud else self._warned
        log.log(
            logging.WARNING if loud else logging.DEBUG,
            "%s: attempt %d failed (%s); next attempt in %.1f s, the last one before %s",
            *(self._origin, failures, problem, pause),
            time.strftime("%H:%M:%S", time.localtime(time.time() + left)),
        )
