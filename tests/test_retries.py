"""Calls are tried again with pauses, within a budget that progress renews."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest

from diffagent.errors import ConfigError, DiffAgentError, ServerError
from diffagent.retries import Failure, Patience, Retries

QUICK = Patience(first=0.001, longest=0.002)


def run(
    call: Callable[[], int],
    *,
    retries: Retries | None = None,
    seconds_left: float = 9.0,
    on_failure: Callable[[Failure], None] = lambda failure: None,
    has_progressed: Callable[[], bool] = lambda: False,
) -> int:
    return (retries or Retries(QUICK)).run(
        call,
        seconds_left=lambda: seconds_left,
        can_retry=lambda error: error.retryable,
        give_up=lambda failure: DiffAgentError(f"gave up after {failure.failures}"),
        on_failure=on_failure,
        has_progressed=has_progressed,
    )


def failing(times: int, error: DiffAgentError) -> Callable[[], int]:
    numbers = itertools.count(1)

    def call() -> int:
        if (number := next(numbers)) <= times:
            raise error
        return number

    return call


def test_a_transient_failure_is_tried_again() -> None:
    failures: list[Failure] = []
    error = ServerError("away")
    assert run(failing(3, error), on_failure=failures.append) == 4
    assert [f.failures for f in failures] == [1, 2, 3]
    assert all(f.error is error and 0 < f.pause <= QUICK.longest for f in failures)


def test_what_no_try_can_mend_is_raised_at_once() -> None:
    with pytest.raises(ConfigError, match="wrong"):
        run(failing(1, ConfigError("wrong")))


def test_a_pause_beyond_the_budget_gives_up() -> None:
    with pytest.raises(DiffAgentError, match="gave up after 1"):
        run(failing(1, ServerError("away", retry_after=10.0)))
    with pytest.raises(DiffAgentError, match="gave up after 1"):
        run(failing(1, ServerError("away")), seconds_left=0.0)


def test_progress_resets_the_pauses() -> None:
    failures: list[Failure] = []
    run(failing(3, ServerError("cut")), on_failure=failures.append, has_progressed=lambda: True)
    assert [f.failures for f in failures] == [1, 1, 1]


def test_a_stopped_client_waits_no_longer() -> None:
    retries = Retries(Patience(first=60.0, longest=60.0))
    threading.Timer(0.05, retries.stop).start()
    with pytest.raises(ServerError, match="away"):
        run(failing(9, ServerError("away")), retries=retries, seconds_left=600.0)
