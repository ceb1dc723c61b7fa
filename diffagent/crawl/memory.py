"""File next to a crawl's artifact with facts that help the next refresh or a salvage.

``STORE/crawl/IDENTITY.memory.json`` is no content and may be deleted. Without it, the pictures of
all versions count as never requested, and the ids that a damaged snapshot has lost are unknown.
"""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from diffagent.schemas.payloads import generation_of, versions_of
from diffagent.store import atomic_file

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SnapshotInventory:
    """Inventory of a snapshot: ids by kind and generation, tombstones, and generations.

    Kinds are 'models', 'versions' and 'images'.
    """

    ids: dict[str, dict[int, array[int]]] = field(default_factory=dict)
    gone: list[dict[str, Any]] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, item: dict[str, Any]) -> None:
        """Add a model with its versions, or an image."""
        self._add(kind, item["id"], generation_of(item))
        if kind == "models":
            for ident, version in versions_of(item).items():
                self._add("versions", ident, generation_of(version))

    def _add(self, kind: str, ident: int, generation: int) -> None:
        self.ids.setdefault(kind, {}).setdefault(generation, array("q")).append(ident)

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """Yield (kind, id, generation) of every item."""
        for kind, generations in self.ids.items():
            for generation, ids in generations.items():
                for ident in ids:
                    yield kind, ident, generation

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON; ids become differences, which are short."""
        ids = {
            kind: {str(generation): _differences(ids) for generation, ids in generations.items()}
            for kind, generations in self.ids.items()
        }
        return {"ids": ids, "gone": self.gone, "generations": self.generations}

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> SnapshotInventory:
        """Read the JSON of ``to_json``."""
        ids = {
            str(kind): {
                int(generation): array("q", itertools.accumulate(steps))
                for generation, steps in generations.items()
            }
            for kind, generations in data["ids"].items()
        }
        return cls(ids, list(data["gone"]), list(data["generations"]))


def _differences(ids: array[int]) -> list[int]:
    ordered = sorted(ids)
    return [ident - before for before, ident in zip([0, *ordered], ordered, strict=False)]


@dataclass(slots=True)
class CrawlMemory:
    """Facts that outlive a crawl.

    Attributes:
        looked_at: version -> day on which its pictures were last requested.
        inventory: of the last snapshot.
        metrics, drops: of the last crawl, which may have written its snapshot and not its manifest.
    """

    looked_at: dict[int, str] = field(default_factory=dict)
    inventory: SnapshotInventory | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    drops: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> CrawlMemory:
        """Read the file; one that is missing or damaged counts as empty."""
        try:
            data = orjson.loads(path.read_bytes())
            looked_at = {int(version): str(day) for version, day in data["looked_at"].items()}
            inventory = data.get("ledger")
            inventory = SnapshotInventory.of_json(inventory) if inventory else None
            drops = {
                str(kind): {str(reason): int(number) for reason, number in reasons.items()}
                for kind, reasons in (data.get("drops") or {}).items()
            }
            return cls(looked_at, inventory, dict(data.get("metrics") or {}), drops)
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning(
                "%s cannot be read (%s: %s): all versions count as never requested",
                *(path, type(error).__name__, error),
            )
            return cls()

    def save(self, path: Path) -> None:
        """Write the file in one step."""
        data = {
            "looked_at": {str(v): self.looked_at[v] for v in sorted(self.looked_at)},
            "ledger": self.inventory.to_json() if self.inventory else None,
            "metrics": self.metrics,
            "drops": self.drops,
        }
        with atomic_file(path) as file:
            file.write_bytes(orjson.dumps(data))
