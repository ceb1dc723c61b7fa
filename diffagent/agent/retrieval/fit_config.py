"""Configuration of the stage ``fit``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffagent.schemas.section import Section

FittedSelector = Literal[
    "neighbours", "bm25", "embeddings", "cards", "card-embeddings", "model-token", "combined"
]


class FitConfig(Section):
    """Selector to fit on a dataset."""

    selector: FittedSelector = Field(default="combined", description="selector to fit")
    encoder: str = Field(
        default="",
        description="sentence encoder: 'minilm', a directory, or NAME or NAME@REVISION on the hub; "
        "'': none",
    )
    seed: int = Field(default=0, ge=0, description="seed of the fitting")
