"""Configuration of the stage ``rerank``."""

from __future__ import annotations

from pydantic import Field

from diffagent.agent.retrieval.fit_config import FittedSelector
from diffagent.schemas.section import Section


class RerankConfig(Section):
    """A fitted selector that proposes, for an agent that chooses: what ``rerank`` takes."""

    retrieval: FittedSelector = "combined"
    encoder: str = Field(default="", description="as in FitConfig")
    candidates: int = Field(default=20, ge=2, description="models that are proposed")
    num_prompts: int = Field(
        default=500, ge=1, description="of the validation split, by which both are weighed"
    )
    seed: int = Field(default=0, ge=0)
