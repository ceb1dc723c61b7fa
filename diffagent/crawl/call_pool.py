"""Threads that make the calls of a crawl to the site.

A walk is a generator that yields calls to the site and is sent their answers (``Steps``).
``CallPool.run`` advances many of them: threads make the calls, and everything else happens in the
one thread that writes the journal. So the rate limit, not the latency of the site, decides how
fast a crawl is, and neither order nor number of threads shows in its result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any, TypeVar

from diffagent.civitai.site import Site
from diffagent.threads import ContextThreadPool

T = TypeVar("T")
#: Yields calls to the site, is sent their answers, and returns a T.
Steps = Generator[Callable[[], Any], Any, T]


class CallPool:
    """Calls to a site, ``threads`` at a time; an error of one stops the site's other calls."""

    def __init__(self, site: Site, threads: int = 1) -> None:
        self._site, self._threads = site, threads

    def run(self, jobs: Iterable[Steps[None]], *, threads: int | None = None) -> None:
        """Advance jobs to their ends, several at a time, in the order given."""
        waiting, number = iter(jobs), threads or self._threads
        running: dict[Future[Any], Steps[None]] = {}

        def advance(job: Steps[None], step: Callable[[], Callable[[], Any]]) -> None:
            try:
                call = step()
            except StopIteration:
                return
            running[pool.submit(call)] = job

        with ContextThreadPool(number, thread_name_prefix="crawl") as pool:
            try:
                while True:
                    while len(running) < number and (job := next(waiting, None)) is not None:
                        advance(job, partial(next, job))
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job, error = running.pop(future), future.exception()
                        if error:
                            advance(job, partial(job.throw, error))
                        else:
                            advance(job, partial(job.send, future.result()))
            except BaseException:
                self._site.stop()
                raise

    def answers(
        self, calls: Iterable[tuple[int, Callable[[], T]]], threads: int | None = None
    ) -> Iterator[tuple[int, Callable[[], T]]]:
        """Make calls, several at a time, and yield their answers in the order of the calls.

        Yields:
            The id of a call, and a function that returns its answer or raises its error.
        """
        number = threads or self._threads
        pending: deque[tuple[int, Future[T]]] = deque()
        with ContextThreadPool(number, thread_name_prefix="crawl") as pool:
            try:
                for ident, call in calls:
                    pending.append((ident, pool.submit(call)))
                    if len(pending) == number:
                        first, future = pending.popleft()
                        yield first, future.result
                for last, future in pending:
                    yield last, future.result
            except BaseException:
                self._site.stop()
                pool.shutdown(cancel_futures=True)
                raise
