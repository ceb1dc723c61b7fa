"""Configuration of the stage ``evaluate``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from diffagent.agent.sample_config import MAX_NEW_TOKENS, Decoding
from diffagent.agent.select_config import Selector
from diffagent.schemas.section import Section


class EvaluationConfig(Section):
    """What is compared, and on what."""

    selectors: tuple[Selector, ...] = ("popular", "random", "nearest", "combined", "sft", "rrhf")
    split: Literal["validation", "test"] = "test"
    num_prompts: int = Field(default=200, ge=2)
    max_new_tokens: int | None = MAX_NEW_TOKENS
    decoding: Decoding = Field(default="unconstrained", description="as in SelectConfig")
    encoder: str = Field(default="", description="as in SelectConfig")
    num_shards: int = Field(
        default=1,
        ge=1,
        description="parts that each selector's answers are rendered and scored in; best 30 s of "
        "work or more each",
    )
    bootstrap_samples: int = Field(default=2000, ge=100)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    report_prompts: int = Field(default=12, ge=0, description="prompts shown with pictures")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if self.num_shards > self.num_prompts:
            raise ValueError(f"{self.num_shards} num_shards are more than num_prompts")
        return self
