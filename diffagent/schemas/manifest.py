"""The manifest that makes a directory an artefact."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

#: Raised by one whenever the meaning of any stored table changes; part of every identity.
SCHEMA_VERSION = 2

#: Names of files that no stage reads.
_FOR_PEOPLE = ("README.md", "LICENSE.md", "loss.png", "training_log.jsonl")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    """One file of an artefact; ``path`` is relative to the artefact's directory."""

    path: str
    size: int = Field(ge=0, description="bytes")
    sha256: str
    rows: int | None = Field(default=None, ge=0)

    @property
    def for_people(self) -> bool:
        """Whether only people read it (a card, a licence, a plot, a log), who may edit it."""
        path = PurePosixPath(self.path)
        return path.name in _FOR_PEOPLE or path.parts[0] == "plots"


class InputRef(_Frozen):
    """A parent of an artefact: lineage is readable from disk alone."""

    stage: str
    identity: str
    content_digest: str


class FunnelStep(_Frozen):
    """One reason why items were dropped by a filter. ``kept + sum(dropped) == seen`` holds."""

    filter: str
    reason: str
    dropped: int = Field(ge=0)


class Funnel(_Frozen):
    """What happened to every item of one kind (models, records, ...)."""

    unit: str
    seen: int = Field(ge=0)
    kept: int = Field(ge=0)
    steps: tuple[FunnelStep, ...] = ()

    def check(self) -> None:
        """Raise ValueError unless every item seen is kept or dropped for a reason."""
        dropped = sum(step.dropped for step in self.steps)
        if self.kept + dropped != self.seen:
            raise ValueError(
                f"funnel of {self.unit!r}: kept {self.kept} + dropped {dropped} != seen {self.seen}"
            )


class Manifest(_Frozen):
    """What an artefact is, what it was made from and what is in it.

    ``identity`` names the request (stage, versions, config, inputs' content digests);
    ``content_digest`` names the answer (the files, or a stage's own semantic digest).
    """

    stage: str
    stage_version: int
    schema_version: int = SCHEMA_VERSION
    identity: str
    content_digest: str
    series: str = Field(
        default="",
        description="names the stage with its configuration and those of its ancestors, whatever "
        "their content: equal in all refreshes",
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
