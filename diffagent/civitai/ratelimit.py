"""One rate limit an origin and process, shared by threads."""

from __future__ import annotations

import threading
import time

_buckets: dict[str, TokenBucket] = {}
_lock = threading.Lock()


class TokenBucket:
    """At most ``rate`` requests a second: a bucket of one token, kept as the next one's time.

    Whoever asks takes the next turn at once and then waits for it, so that threads queue up in
    order. Only the monotonic clock is read: setting the machine's clock changes nothing.
    """

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._next = time.monotonic()
        self._lock = threading.Lock()

    def acquire(self) -> float:
        """Wait for a turn; returns the seconds waited."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + (1 / self.rate if self.rate else 0.0)
        if turn > now:
            time.sleep(turn - now)
        return turn - now

    def hold(self, seconds: float) -> None:
        """No turn for anybody for so long: the site asked this process to wait."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def bucket_of(origin: str, rate: float | None) -> TokenBucket:
    """The bucket of an origin in this process; the last rate asked for counts."""
    with _lock:
        bucket = _buckets.setdefault(origin, TokenBucket(rate))
        bucket.rate = rate
        return bucket
