"""Configuration of the stage ``part``."""

from __future__ import annotations

from pydantic import Field

from diffagent.schemas.section import Section


class PartConfig(Section):
    """One part of a table of candidates."""

    num_parts: int = Field(ge=1, description="parts of the table")
    part: int = Field(ge=0, description="number of the part, below num_parts")
