"""Counting what filters do: every item seen is kept, or dropped for exactly one reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from diffagent.schemas.manifest import Funnel, FunnelStep


class FunnelCounter:
    """Counts items of one unit. ``filters`` gives the order of the steps in the result."""

    def __init__(self, unit: str, filters: Sequence[str]) -> None:
        self.unit = unit
        self._filters = tuple(filters)
        self._kept = 0
        self._dropped: Counter[tuple[str, str]] = Counter()

    def keep(self, count: int = 1) -> None:
        """Count items that passed."""
        self._kept += count

    def drop(self, name: str, reason: str, count: int = 1) -> None:
        """Count items that filter ``name`` dropped."""
        self._dropped[name, reason] += count

    def result(self) -> Funnel:
        """The funnel so far; steps in the order of the filters, most frequent reason first."""
        order = {name: position for position, name in enumerate(self._filters)}
        steps = sorted(
            self._dropped.items(), key=lambda item: (order[item[0][0]], -item[1], item[0][1])
        )
        return Funnel(
            unit=self.unit,
            seen=self._kept + sum(self._dropped.values()),
            kept=self._kept,
            steps=tuple(
                FunnelStep(filter=name, reason=reason, dropped=count)
                for (name, reason), count in steps
            ),
        )
