"""Configuration of the stage ``fit``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffagent.schemas.section import Section

FittedSelector = Literal[
    "neighbours", "bm25", "embeddings", "cards", "card-embeddings", "model-token", "combined"
]


class FitConfig(Section):
    """A selector that is fitted, and kept: what the stage ``fit`` takes."""

    selector: FittedSelector = "combined"
    encoder: str = Field(
        default="",
        description="sentence encoder: 'minilm', a directory, a hub's NAME or NAME@REVISION, '' "
        "for none",
    )
    seed: int = Field(default=0, ge=0)
