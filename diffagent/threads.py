"""Threads that log as the code that hands them work."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ContextThreadPool(ThreadPoolExecutor):
    """Threads in which a call has the context variables of the code that submitted it.

    By these Prefect knows the run that a log record belongs to: without them a retry in a thread
    would be missing from the run's log.
    """

    def submit(
        self,
        fn: Callable[Arguments, Result],
        /,
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Future[Result]:
        """Schedule ``fn(*args, **kwargs)`` in a copy of the present context."""
        context = contextvars.copy_context()
        return super().submit(lambda: context.run(fn, *args, **kwargs))
