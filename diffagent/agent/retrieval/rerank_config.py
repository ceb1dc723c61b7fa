"""Configuration of the stage ``rerank``."""

from __future__ import annotations

from pydantic import Field

from diffagent.agent.retrieval.fit_config import FittedSelector
from diffagent.schemas.section import Section


class RerankConfig(Section):
    """Fitted selector that proposes models, of which an agent chooses one."""

    retrieval: FittedSelector = Field(default="combined", description="selector that proposes")
    encoder: str = Field(
        default="", description="sentence encoder of that selector, as in FitConfig"
    )
    candidates: int = Field(default=20, ge=2, description="models to propose per prompt")
    num_prompts: int = Field(
        default=500, ge=1, description="prompts of the validation split on which both are weighted"
    )
    seed: int = Field(default=0, ge=0, description="seed of the fitting and of the prompts drawn")
