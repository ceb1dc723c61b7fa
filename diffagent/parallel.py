"""A function over many batches in several processes, with the results in order."""

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

_GARBAGE = 100_000  # objects; a batch makes many and leaves few, which 700 would look at often
_AHEAD = 2  # batches a worker that wait, so that none idles and memory stays flat

_task: list[Any] = []  # of a worker: function, state


def ordered_map(
    function: Callable[[State, Item], Result], state: State, items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield ``function(state, item)`` for each item, in order.

    With one worker it runs right here. Else ``function`` and ``state`` are sent to each process
    once; a few items a worker are in memory at a time.

    Raises:
        DiffAgentError: a worker was killed; what ``function`` raises is raised here.
    """
    if workers <= 1:
        yield from (function(state, item) for item in items)
        return
    # loky, because the caller may have threads (Prefect's tasks do), whose locks a fork would keep,
    # and a spawned process would run the caller's script again.
    left = iter(items)
    with ProcessPoolExecutor(
        workers, initializer=_start, initargs=(os.getpid(), function, state)
    ) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in itertools.islice(left, _AHEAD * workers):
            waiting.append(pool.submit(_run, item))
        while waiting:
            try:
                result = waiting.popleft().result()
            except BrokenProcessPool:
                raise DiffAgentError(
                    f"one of {workers} worker processes was killed, most often for want of "
                    "memory; run the command again, with a smaller runtime.workers"
                ) from None
            for item in itertools.islice(left, 1):
                waiting.append(pool.submit(_run, item))
            yield result


def _start(parent: int, function: Callable[..., Any], state: Any) -> None:
    _task[:] = [function, state]
    gc.freeze()
    gc.set_threshold(_GARBAGE)
    end_with(parent)


def _run(item: Any) -> Any:
    function, state = _task
    return function(state, item)
