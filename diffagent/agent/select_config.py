"""Configuration of the stage ``select``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffagent.agent.retrieval.fit_config import FittedSelector
from diffagent.agent.sample_config import MAX_NEW_TOKENS, Decoding
from diffagent.schemas.section import Section

Selector = Literal["popular", "random", "nearest", "sft", "rrhf", "reranked"] | FittedSelector


class SelectConfig(Section):
    """A selector, and the held-out prompts that it answers."""

    selector: Selector = Field(description="selector that answers")
    split: Literal["validation", "test"] = Field(default="test", description="split of the prompts")
    num_prompts: int = Field(default=200, ge=1, description="prompts, drawn by the seed")
    max_new_tokens: int | None = MAX_NEW_TOKENS
    decoding: Decoding = Field(
        default="unconstrained",
        description="of an agent: 'unconstrained' counts its hallucinations; 'constrained' gives "
        "valid answers only",
    )
    encoder: str = Field(
        default="",
        description="sentence encoder of fitted selectors, as in FitConfig; '': MiniLM for those "
        "that need one",
    )
    seed: int = Field(
        default=0, ge=0, description="seed of the prompts drawn, of 'random' and of fitting"
    )
