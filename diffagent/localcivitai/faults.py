"""Faults that the local server injects, as the real site has shown them.

A hash of (seed, kind of fault, request, number of the attempt) decides whether a request fails, so
the same run meets the same faults. A client can survive every fault: at most three attempts in a
row of one request fail, and another way of listing shows each item that a listing hides:

* a cursor leads back (loop): a repeated request returns the right page;
* an empty page with a cursor: the cursor leads on;
* an item is skipped where a page begins: pages of another length begin elsewhere, and an item
  is never skipped for both an even and an odd ``limit``;
* an answer to ``ids=`` leaves an item out: a single request returns it;
* cursors become stale (a deploy changes their arity): a listing from its start has good ones.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FaultName = Literal["none", "flaky", "hostile"]

#: Faults of one answer.
TRANSPORT = (
    "too_many",  # 429 without Retry-After
    "too_many_wait",  # 429 with Retry-After: 1
    "unavailable",  # 503, JSON
    "aborted",  # 499, JSON
    "timeout",  # 524, HTML body
    "html",  # 200, but an HTML page
    "truncated",  # the connection closes in the middle of the body
    "cut",  # a whole answer whose JSON ends in the middle
    "slow",  # the body trickles
)
#: Faults of the storage behind downloads.
STORAGE = (
    "no_range",  # the whole file although a range was requested
    "error_file",  # 200, but a JSON error under the media type of a file
)
#: Faults of a listing's page.
LISTING = ("empty", "loop", "duplicate", "skip", "moved", "missing")

_FREE_ATTEMPT = 4  # every fourth attempt of a request succeeds


@dataclass(frozen=True)
class Profile:
    """Probabilities of the faults.

    Attributes:
        rates: probability of each fault per request; absent: 0.
        deploy_every: number of pages of listings after which all cursors become stale (0: never).
        deploys: greatest number of such deploys.
        new_schema_after: number of pages after which items have another schema (0: never); see
            ``Faults.evolve``.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    deploy_every: int = 0
    deploys: int = 0
    new_schema_after: int = 0


PROFILES: Mapping[FaultName, Profile] = {
    "none": Profile(),
    "flaky": Profile(
        {
            "too_many": 0.02,
            "too_many_wait": 0.001,
            "unavailable": 0.02,
            "timeout": 0.01,
            "truncated": 0.01,
            "slow": 0.005,
            "empty": 0.03,
            "duplicate": 0.03,
        },
        deploy_every=400,
        deploys=1,
    ),
    "hostile": Profile(
        {
            "too_many": 0.05,
            "too_many_wait": 0.002,
            "unavailable": 0.05,
            "timeout": 0.03,
            "html": 0.02,
            "truncated": 0.03,
            "cut": 0.02,
            "slow": 0.005,
            "no_range": 0.2,
            "error_file": 0.05,
            "empty": 0.08,
            "loop": 0.05,
            "duplicate": 0.1,
            "skip": 0.3,
            "moved": 0.2,
            "missing": 0.01,
        },
        deploy_every=150,
        deploys=3,
    ),
}


class Faults:
    """Random faults of one server: thread-safe, and equal for equal seeds and requests.

    Attributes:
        pages: number of pages of listings served.
        injected: number of injected faults by kind.
    """

    def __init__(self, profile: Profile | FaultName = "none", seed: int = 0) -> None:
        self.profile = PROFILES[profile] if isinstance(profile, str) else profile
        self.seed = seed
        self.injected: Counter[str] = Counter()
        self._attempts: Counter[str] = Counter()
        self.pages = 0
        self._lock = threading.Lock()

    def attempt(self, request: str) -> int:
        """Return the number of earlier attempts of a request; 0 without any fault rates."""
        if not self.profile.rates:
            return 0
        with self._lock:
            number = self._attempts[request]
            self._attempts[request] += 1
            return number

    def transport(self, request: str, attempt: int, *, storage: bool = False) -> str | None:
        """Return the fault of an answer, if any; ``storage``: the answer is a file."""
        if attempt % _FREE_ATTEMPT == _FREE_ATTEMPT - 1:
            return None
        for kind in (*TRANSPORT, *STORAGE) if storage else TRANSPORT:
            if self._strikes(kind, f"{request}|{attempt}"):
                return kind
        return None

    def page(self, kind: str, request: str, attempt: int) -> bool:
        """Whether this page of a listing has the fault ``kind``."""
        if kind == "loop" and attempt % _FREE_ATTEMPT == _FREE_ATTEMPT - 1:
            return False
        return self._strikes(kind, f"{request}|{attempt}")

    def skips(self, item: int, limit: int) -> bool:
        """Whether a page of ``limit`` items that begins with ``item`` leaves it out."""
        if not self.profile.rates.get("skip"):
            return False
        parity = self._number(f"parity|{item}") % 2
        return limit % 2 == parity and self._strikes("skip", str(item))

    def leaves_out(self, item: int) -> bool:
        """Whether answers to ``ids=`` leave this item out."""
        return self._strikes("missing", f"item {item}")

    @property
    def requests(self) -> int:
        """Number of requests; not counted without any fault rates."""
        return self._attempts.total()

    @property
    def schema_has_changed(self) -> bool:
        """Whether a deploy has changed the schema."""
        after = self.profile.new_schema_after
        return 0 < after < self.pages

    def evolve(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return an item of a listing as the site sends it after ``new_schema_after`` pages.

        The new schema has ids and numbers in quotes, new values of enumerations, a new field, and
        no ``tags``, ``stats`` and ``hash``.
        """
        if not self.schema_has_changed:
            return item
        dropped = ("tags", "stats", "hash")
        new = {key: value for key, value in item.items() if key not in dropped}
        new |= {"id": str(item["id"]), "schemaVersion": 2, "availability": "Lent"}
        for name in ("width", "height"):
            if name in new:
                new[name] = str(new[name])
        if "modelVersionIds" in new:
            new["modelVersionIds"] = list(map(str, new["modelVersionIds"]))
        if "modelVersions" in new:
            new["modelVersions"] = [
                {**version, "id": str(version["id"]), "baseModelType": "Quantum"}
                for version in new["modelVersions"]
            ]
        return new

    @property
    def epoch(self) -> int:
        """Number of deploys that have made older cursors stale."""
        every = self.profile.deploy_every
        return min(self.pages // every, self.profile.deploys) if every else 0

    def count_page(self) -> None:
        """Count a served page of a listing."""
        with self._lock:
            self.pages += 1

    def _strikes(self, kind: str, key: str) -> bool:
        rate = self.profile.rates.get(kind, 0.0)
        if not rate or self._number(f"{kind}|{key}") >= rate * 2**64:
            return False
        with self._lock:
            self.injected[kind] += 1
        return True

    def _number(self, key: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}|{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")
