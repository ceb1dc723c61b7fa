"""Configuration of the stage ``ratings``."""

from __future__ import annotations

from pydantic import Field

from diffagent.schemas.section import Section


class RatingsConfig(Section):
    """File of ratings that people gave to pictures."""

    path: str = Field(description="JSON file (diffagent.train.ratings.read_ratings)")
