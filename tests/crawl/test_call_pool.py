"""Calls are made by threads, at most so many at once; all else is in one thread and in order."""

from __future__ import annotations

import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from diffagent.civitai.client import CivitaiClient
from diffagent.crawl.call_pool import CallPool, Steps
from diffagent.crawl.crawl_state import CrawlState
from diffagent.crawl.journal import Journal
from diffagent.crawl.meter import meter
from diffagent.errors import ServerError


class Client:
    """Counts calls that are made at once; ``stop`` ends those that wait."""

    origin = "https://civitai.com"

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.now = self.most = 0
        self.lock = threading.Lock()

    def stop(self) -> None:
        self.stopped.set()

    def call(self, answer: Any, seconds: float = 0.01) -> Any:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            if self.stopped.wait(seconds):
                raise ServerError("stopped")
            if isinstance(answer, Exception):
                raise answer
            return answer
        finally:
            with self.lock:
                self.now -= 1


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def pool(client: Client) -> CallPool:
    return CallPool(cast(CivitaiClient, client), threads=3)


def test_jobs_are_carried_on_at_once_by_one_thread(client, pool):
    got: dict[int, list[int]] = {}
    threads = set()

    def job(number: int) -> Steps[None]:
        for step in range(4):
            answer = yield partial(client.call, (number, step))
            assert answer == (number, step)
            threads.add(threading.get_ident())
            got.setdefault(number, []).append(step)

    pool.run(job(number) for number in range(7))
    assert got == {number: [0, 1, 2, 3] for number in range(7)}
    assert client.most == 3
    assert threads == {threading.get_ident()}


def test_a_job_may_survive_an_error_and_the_others_do(client, pool):
    done = []

    def job(number: int) -> Steps[None]:
        try:
            yield lambda: client.call(ServerError("524") if number == 2 else number)
        except ServerError:
            done.append("survived")
        done.append(number)

    pool.run(job(number) for number in range(5))
    assert sorted(map(str, done)) == ["0", "1", "2", "3", "4", "survived"]


@pytest.mark.parametrize("way", ["run", "answers"])
def test_an_error_ends_what_other_threads_wait_for(client, pool, way):
    started = time.monotonic()
    calls = [lambda: client.call(1, 60.0), lambda: client.call(ServerError("gone"))]

    def job(call: Any) -> Steps[None]:
        yield call

    with pytest.raises(ServerError, match=r"gone|stopped"):
        if way == "run":
            pool.run(job(call) for call in calls)
        else:
            for _, answer in pool.answers(enumerate(reversed(calls))):
                answer()
    client.stop()  # as the client's own end does
    assert time.monotonic() - started < 30


def test_answers_come_in_order(client, pool):
    calls = ((n, lambda n=n: client.call(n, 0.02 if n % 3 == 0 else 0.0)) for n in range(20))
    assert [(n, answer()) for n, answer in pool.answers(calls)] == [(n, n) for n in range(20)]
    assert client.most <= 3


def test_a_journal_of_another_request_is_not_taken_up(client, tmp_path):
    request = {"previous": "a", "reconcile": False, "date": "2026-01-01"}
    with Journal(tmp_path / "journal.gz") as first:
        state = CrawlState(cast(CivitaiClient, client), first)
        assert state.resume(request) == request
        state.save({"showcase": 5}, "images", [{"id": 1}])

    def again(**changes: Any) -> tuple[str, set[int]]:
        with Journal(tmp_path / "journal.gz") as journal:
            other = CrawlState(cast(CivitaiClient, client), journal)
            return other.resume({**request, **changes})["date"], other.seen["images"]

    assert again(date="2026-02-02") == ("2026-01-01", {1}), "it began on another day"
    assert again(previous="b", date="2026-02-02") == ("2026-02-02", set())


def test_a_meter_tells_what_is_left(monkeypatch):
    monkeypatch.setattr("diffagent.crawl.meter._REPORT_SECONDS", 0.0)
    clock = iter([0.0, 0.0, 30.0, 60.0, 120.0])
    # The module's name for it alone: other threads of this process read the clock too.
    monkeypatch.setattr(
        "diffagent.crawl.meter.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    told: list[tuple[float | None, str]] = []
    with meter(lambda fraction, text: told.append((fraction, text)), "galleries", 4) as more:
        for _ in range(3):
            more(1)
    assert told == [
        (0.25, "galleries: 1 of 4, about 90 s left"),
        (0.5, "galleries: 2 of 4, about 60 s left"),
        (0.75, "galleries: 3 of 4, about 40 s left"),
    ]
