"""Configuration of the stage ``evaluate``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from diffagent.agent.sample_config import MAX_NEW_TOKENS, Decoding
from diffagent.agent.select_config import Selector
from diffagent.schemas.section import Section


class EvaluationConfig(Section):
    """Selectors to compare, and the prompts and statistics of the comparison."""

    selectors: tuple[Selector, ...] = Field(
        default=("popular", "random", "nearest", "combined", "sft", "rrhf"),
        description="selectors to compare",
    )
    split: Literal["validation", "test"] = Field(default="test", description="split of the prompts")
    num_prompts: int = Field(default=200, ge=2, description="prompts, drawn by the seed")
    max_new_tokens: int | None = MAX_NEW_TOKENS
    decoding: Decoding = Field(
        default="unconstrained",
        description="of agents: 'unconstrained' counts their hallucinations; 'constrained' gives "
        "valid answers only",
    )
    encoder: str = Field(
        default="",
        description="sentence encoder of fitted selectors: 'minilm', a directory, or NAME@REVISION "
        "on the hub; '': MiniLM for those that need one",
    )
    num_shards: int = Field(
        default=1,
        ge=1,
        description="parts in which the answers of a selector are rendered and scored; 30 s of "
        "work or more each is best",
    )
    bootstrap_samples: int = Field(default=2000, ge=100, description="resamples of the intervals")
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="confidence level of the intervals"
    )
    report_prompts: int = Field(
        default=12, ge=0, description="prompts whose pictures the report shows"
    )
    note: str = Field(default="", description="warning at the top of the report")
    seed: int = Field(
        default=0, ge=0, description="seed of the prompts drawn, the selectors and the bootstrap"
    )

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if self.num_shards > self.num_prompts:
            raise ValueError(
                f"num_shards ({self.num_shards}) must not exceed num_prompts ({self.num_prompts})"
            )
        return self
