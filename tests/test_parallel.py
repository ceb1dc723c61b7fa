"""Work that is spread over processes comes back in order, a few items at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffagent.errors import DiffAgentError
from diffagent.parallel import ordered_map


def times(factor: int, item: int) -> int:
    time.sleep(0.02 if item % 3 == 0 else 0)  # later items are done sooner
    return factor * item


def fail(_: None, item: int) -> int:
    if item == 3:
        raise DiffAgentError("item 3")
    return item


def die(_: None, item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_order(workers: int) -> None:
    assert list(ordered_map(times, 2, range(20), workers)) == [2 * i for i in range(20)]
    assert list(ordered_map(times, 2, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_few_items_wait(workers: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 30:
            taken += 1
            yield taken

    for done, _ in enumerate(ordered_map(times, 1, items(), workers), 1):
        assert taken - done <= 2 * workers


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_function_arrives(workers: int) -> None:
    with pytest.raises(DiffAgentError, match="item 3"):
        list(ordered_map(fail, None, range(9), workers))


def test_a_killed_worker_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DiffAgentError, match=r"runtime\.tasks\.workers"):
        list(ordered_map(die, None, range(9), 2))


SCRIPT = """
import time
from diffagent.parallel import ordered_map

def slow(state, item):
    print(__import__("os").getpid(), flush=True)
    time.sleep(60)

for _ in ordered_map(slow, None, range(9), 2):
    pass
"""


def test_workers_die_with_a_parent_that_was_killed() -> None:
    # A script without a guard of its main part, which a spawned process would run again.
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(map(alive, workers)):
        time.sleep(0.1)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").split()[2] != "Z"
