"""Progress reports to a terminal, the log, and the watcher of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from diffagent.schemas.printable import printable
from diffagent.store import Progress

log = logging.getLogger(__name__)

_REPORT_SECONDS = 5.0


@contextmanager
def meter(
    report: Progress, name: str, total: int | None = None, unit: str = "it"
) -> Iterator[Callable[[int], None]]:
    """Report progress: a bar on a terminal, and every few seconds to the log and ``report``.

    Args:
        report: takes the fraction done (None: unknown) and a text with the time left.
        name: of the counted things.
        total: number of them; None: unknown.
        unit: of the bar's count; 'B': bytes, reported as megabytes.

    Yields:
        A function to call with the number of things done since its last call.
    """
    name = printable(name)
    done, begun, reported = 0, time.monotonic(), time.monotonic()
    with tqdm(desc=name, total=total, disable=None, unit=unit, unit_scale=unit == "B") as bar:

        def more(number: int) -> None:
            nonlocal done, reported
            done += number
            bar.update(number)
            now = time.monotonic()
            if now - reported < _REPORT_SECONDS and done != total:
                return
            reported = now
            text = f"{name}: {_amount(done, unit)}"
            text += f" of {_amount(total, unit)}" if total else ""
            if total and 0 < done < total:
                text += f", about {_span((now - begun) / done * (total - done))} left"
            log.info("%s", text)
            report(min(1.0, done / total) if total else None, text)

        yield more


def _amount(number: int, unit: str) -> str:
    return f"{number / 1e6:,.0f} MB" if unit == "B" else f"{number:,}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
