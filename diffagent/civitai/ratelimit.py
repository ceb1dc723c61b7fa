"""Rate limit of an origin in this process, shared by threads."""

from __future__ import annotations

import threading
import time

_buckets: dict[str, TokenBucket] = {}
_lock = threading.Lock()


class TokenBucket:
    """At most ``rate`` requests a second: a bucket of one token, stored as the next turn's time.

    ``acquire`` reserves the next turn at once and then waits for it, so that threads queue up in
    order. It reads only the monotonic clock: setting the machine's clock changes nothing.
    """

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._next = time.monotonic()
        self._lock = threading.Lock()

    def acquire(self) -> float:
        """Wait for a turn; return the seconds waited."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + (1 / self.rate if self.rate else 0.0)
        if turn > now:
            time.sleep(turn - now)
        return turn - now

    def hold(self, seconds: float) -> None:
        """Give no turn for so many seconds: the site requests this process to wait."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def bucket_of(origin: str, rate: float | None) -> TokenBucket:
    """Return the bucket of an origin in this process; the last requested rate counts."""
    with _lock:
        bucket = _buckets.setdefault(origin, TokenBucket(rate))
        bucket.rate = rate
        return bucket
