"""Configuration of the stage ``select``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffagent.agent.retrieval.fit_config import FittedSelector
from diffagent.agent.sample_config import MAX_NEW_TOKENS, Decoding
from diffagent.schemas.section import Section

Selector = Literal["popular", "random", "nearest", "sft", "rrhf", "reranked"] | FittedSelector


class SelectConfig(Section):
    """One selector's answers to held-out prompts: what the stage ``select`` takes."""

    selector: Selector
    split: Literal["validation", "test"] = "test"
    num_prompts: int = Field(default=200, ge=1)
    max_new_tokens: int | None = MAX_NEW_TOKENS
    decoding: Decoding = Field(
        default="unconstrained",
        description="of an agent: 'unconstrained' shows what it hallucinates; 'constrained' has "
        "valid answers alone",
    )
    encoder: str = Field(
        default="",
        description="of fitted selectors: as in FitConfig; '' is MiniLM for those that need one",
    )
    seed: int = Field(
        default=0, ge=0, description="of the prompts drawn, of 'random' and of what is fitted"
    )
