"""The manifest: the file that makes a directory an artifact."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

#: Version of all stored tables, part of every identity; incremented when a column changes its
#: meaning.
SCHEMA_VERSION = 2

#: Names of files that only people read.
_FOR_PEOPLE = ("README.md", "LICENSE.md", "loss.png", "training_log.jsonl")


class _ManifestPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_ManifestPart):
    """A file of an artifact; ``path`` is relative to the artifact's directory."""

    path: str
    size: int = Field(ge=0, description="bytes")
    sha256: str
    rows: int | None = Field(default=None, ge=0)

    @property
    def for_people(self) -> bool:
        """Whether only people read the file (card, licence, plot, log); they may edit it."""
        path = PurePosixPath(self.path)
        return path.name in _FOR_PEOPLE or path.parts[0] == "plots"


class InputRef(_ManifestPart):
    """A parent of an artifact; the parents make the lineage readable from disk."""

    stage: str
    identity: str
    content_digest: str


class FunnelStep(_ManifestPart):
    """The number of items that a filter dropped for one reason."""

    filter: str
    reason: str
    dropped: int = Field(ge=0)


class Funnel(_ManifestPart):
    """Counts of the items of one kind (models, records, ...): seen, dropped by reason, kept."""

    unit: str
    seen: int = Field(ge=0)
    kept: int = Field(ge=0)
    steps: tuple[FunnelStep, ...] = ()

    def check(self) -> None:
        """Check that every item seen is kept or dropped for a reason.

        Raises:
            ValueError: the counts do not add up.
        """
        dropped = sum(step.dropped for step in self.steps)
        if self.kept + dropped != self.seen:
            raise ValueError(
                f"funnel of {self.unit!r}: kept {self.kept} + dropped {dropped} != seen {self.seen}"
            )


class Manifest(_ManifestPart):
    """Description of an artifact: its stage, configuration, inputs, files and measurements.

    ``identity`` is the sha256 of the request (stage, versions, config, content digests of the
    inputs); ``content_digest`` is that of the result (the files, or a stage's semantic digest).
    """

    stage: str
    stage_version: int
    schema_version: int = SCHEMA_VERSION
    identity: str
    content_digest: str
    series: str = Field(
        default="",
        description="digest of the configurations of the stage and its ancestors without their "
        "content; equal in all refreshes of a run",
    )
    config: dict[str, Any]
    inputs: dict[str, tuple[InputRef, ...]] = {}
    files: tuple[FileEntry, ...]
    rows: dict[str, int] = {}
    funnels: tuple[Funnel, ...] = ()
    metrics: dict[str, Any] = {}
    created_at: datetime
    wall_seconds: float = Field(ge=0)
    peak_memory_bytes: int = Field(ge=0)
    versions: dict[str, str] = {}
