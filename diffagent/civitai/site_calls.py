"""Calls to one site, each retried until it makes no progress for the whole of its budget."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from diffagent.civitai.ratelimit import TokenBucket
from diffagent.civitai.transport import Deadline
from diffagent.errors import CivitaiError, RateLimited, ServerError
from diffagent.retries import Failure, Patience, Retries

log = logging.getLogger(__name__)

T = TypeVar("T")
#: Seconds between two warnings of failed attempts: of different calls, and of one call.
_NEXT_WARNING, _REPEATED_WARNING = 5.0, 30.0


class SiteCalls:
    """Calls of one client, retried after ``ServerError`` and ``RateLimited``.

    Threads share it: a Retry-After that one of them receives holds the rate limit of all, and one
    warning covers failures at the same time.

    Attributes:
        retries: number of repeated attempts.
    """

    def __init__(self, origin: str, patience: Patience, bucket: TokenBucket) -> None:
        self.retries = 0
        self._origin, self._patience, self._bucket = origin, patience, bucket
        self._loop = Retries(patience)
        self._call = threading.local()
        self._lock = threading.Lock()
        self._warned = -math.inf

    def stop(self) -> None:
        """Make calls of all threads fail at their next pause."""
        self._loop.stop()

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
        budget = self._call.budget = Deadline(self._patience.budget, self._patience.slowest)
        try:
            return self._retry(call, progress, budget)
        finally:
            self._call.budget = None

    def _retry(self, call: Callable[[], T], progress: Callable[[], int], budget: Deadline) -> T:
        reached, failures = progress(), 0

        def has_progressed() -> bool:
            nonlocal reached
            gain, reached = progress() - reached, progress()
            return gain > 0 and budget.gained(gain)

        def note(failure: Failure) -> None:
            nonlocal failures
            failures = failure.failures
            if retry_after := getattr(failure.error, "retry_after", None):
                self._bucket.hold(retry_after)  # the site addresses the whole process
            with self._lock:
                self.retries += 1
            self._warn(failure, budget.left())

        result = self._loop.run(
            call,
            seconds_left=budget.left,
            can_retry=lambda error: isinstance(error, ServerError | RateLimited),
            give_up=lambda failure: self._final_error(failure, budget.seconds),
            on_failure=note,
            has_progressed=has_progressed,
        )
        if failures:
            log.info("%s answers again", self._origin)
        return result

    def _final_error(self, failure: Failure, budget: float) -> CivitaiError:
        """Return the error of a call whose next attempt would be later than its budget allows."""
        error = failure.error
        kind = ServerError if isinstance(error, ServerError) else RateLimited
        retry_after: float | None = getattr(error, "retry_after", None)
        wait = retry_after or 0.0
        reason = f" (the site requests a pause of {wait:.0f} s)" if wait >= failure.pause else ""
        attempts = f"{failure.failures} attempts" if failure.failures > 1 else "one attempt"
        return kind(
            f"{self._origin}: gave up after {attempts}; the next one would be later than the "
            f"{budget:.0f} s of its budget: {error}{reason}",
            retry_after=retry_after,
        )

    def _warn(self, failure: Failure, left: float) -> None:
        """Log a failed attempt: the first of a call at once, further ones every half minute.

        Several threads fail at the same time when a site is away: one line covers them all.
        """
        now, interval = time.monotonic(), _REPEATED_WARNING
        if failure.failures == 1:
            interval = _NEXT_WARNING
        with self._lock:
            loud = now - self._warned >= interval
            self._warned = now if loud else self._warned
        log.log(
            logging.WARNING if loud else logging.DEBUG,
            "%s: attempt %d failed (%s); next attempt in %.1f s, the last one before %s",
            *(self._origin, failure.failures, failure.error, failure.pause),
            time.strftime("%H:%M:%S", time.localtime(time.time() + left)),
        )
