"""Configuration of the stage ``part``."""

from __future__ import annotations

from pydantic import Field

from diffagent.schemas.section import Section


class PartConfig(Section):
    """One part of a table of candidates: what the stage ``part`` takes."""

    num_parts: int = Field(ge=1)
    part: int = Field(ge=0, description="0 .. num_parts - 1")
