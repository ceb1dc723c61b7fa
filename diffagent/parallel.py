"""Map a function over many batches in several processes, with the results in order."""

from __future__ import annotations

import gc
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from loky import BrokenProcessPool, ProcessPoolExecutor

from diffagent.errors import DiffAgentError
from diffagent.parent_process import end_with

Item = TypeVar("Item")
State = TypeVar("State")
Result = TypeVar("Result")

#: Objects between two garbage collections: a batch makes many and leaves few, so that Python's 700
#: would scan them needlessly often.
_GC_THRESHOLD = 100_000
#: Queued batches per worker: no worker idles, and memory stays flat.
_QUEUED = 2

#: Function and state of a worker process.
_task: list[Any] = []


def ordered_map(
    function: Callable[[State, Item], Result], state: State, items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield ``function(state, item)`` for each item, in order.

    With one worker it runs in this process. Otherwise ``function`` and ``state`` are sent to each
    process once, and a few items per worker are in memory at a time.

    Raises:
        DiffAgentError: a worker was killed. Exceptions of ``function`` are raised as they are.
    """
    if workers <= 1:
        yield from (function(state, item) for item in items)
        return
    # loky, because the caller may have threads (Prefect's tasks do), whose locks a fork would keep,
    # and a spawned process would run the caller's script again.
    remaining = iter(items)
    with ProcessPoolExecutor(
        workers, initializer=_start, initargs=(os.getpid(), function, state)
    ) as pool:
        queue: deque[Future[Result]] = deque()
        for item in itertools.islice(remaining, _QUEUED * workers):
            queue.append(pool.submit(_run, item))
        while queue:
            try:
                result = queue.popleft().result()
            except BrokenProcessPool:
                raise DiffAgentError(
                    f"one of {workers} worker processes was killed, most often for want of "
                    "memory; run the command again, with a smaller runtime.tasks.workers"
                ) from None
            for item in itertools.islice(remaining, 1):
                queue.append(pool.submit(_run, item))
            yield result


def _start(parent: int, function: Callable[..., Any], state: Any) -> None:
    _task[:] = [function, state]
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    end_with(parent)


def _run(item: Any) -> Any:
    function, state = _task
    return function(state, item)
