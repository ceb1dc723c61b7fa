"""One token bucket an origin and process, shared by threads."""

from __future__ import annotations

import threading
import time

_buckets: dict[str, TokenBucket] = {}
_lock = threading.Lock()


class TokenBucket:
    """At most ``rate`` requests a second on average, and ``burst`` at once."""

    def __init__(self, rate: float | None, burst: int = 1) -> None:
        self.rate = rate
        self.burst = burst
        self._tokens = float(burst)
        self._filled = time.monotonic()
        self._lock = threading.Lock()

    def acquire(self) -> float:
        """Wait for a turn; returns the seconds waited."""
        if self.rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self.burst, self._tokens + (now - self._filled) * self.rate)
            self._filled = now
            # A negative balance is a queue: each waiter has its own place in it.
            self._tokens -= 1
            wait = max(0.0, -self._tokens / self.rate)
        if wait:
            time.sleep(wait)
        return wait


def bucket_of(origin: str, rate: float | None) -> TokenBucket:
    """The bucket of an origin in this process; the last rate asked for counts."""
    with _lock:
        bucket = _buckets.setdefault(origin, TokenBucket(rate))
        bucket.rate = rate
        return bucket
