"""Configuration of the stage ``ratings``."""

from __future__ import annotations

from pydantic import Field

from diffagent.schemas.section import Section


class RatingsConfig(Section):
    """Ratings that people gave to pictures: what the stage ``ratings`` takes."""

    path: str = Field(description="JSON file: see diffagent.train.ratings.read_ratings")
