"""Configuration of the stage ``sample``."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from diffagent.schemas.section import Section

Decoding = Literal["unconstrained", "constrained"]
MAX_NEW_TOKENS: Any = Field(
    default=None,
    ge=8,
    description="of an answer; null: the room that the agent's max_length leaves after the prompt",
)


class SamplingConfig(Section):
    """Candidates for RRHF."""

    num_prompts: int = Field(default=1000, ge=1, description="prompts of the train split")
    num_shards: int = Field(
        default=8,
        ge=1,
        description="parts of the prompts; each is sampled, rendered and scored by itself, best 30 "
        "s of work or more",
    )
    num_candidates: int = Field(default=4, ge=2, le=32, description="k, besides the DABench API")
    temperature: float = Field(default=0.8, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    num_beam_groups: int = Field(
        default=0,
        ge=0,
        description="num_candidates: diverse beam search, one beam a group, instead; 0: sampling",
    )
    diversity_penalty: float = Field(default=1.0, ge=0)
    max_new_tokens: int | None = MAX_NEW_TOKENS
    batch_size: int = Field(default=16, ge=1, description="prompts per generate call")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="'vllm': for GPUs, with the extra of that name"
    )
    decoding: Decoding = Field(
        default="unconstrained",
        description="'unconstrained' also samples invalid answers, which rank last, as in the "
        "paper; 'constrained' has valid ones alone (transformers)",
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.num_beam_groups not in (0, self.num_candidates):
            raise ValueError(
                f"num_beam_groups must be 0 (sampling) or num_candidates ({self.num_candidates}): "
                "a group has one beam"
            )
        if self.num_beam_groups and self.engine == "vllm":
            raise ValueError("vLLM has no diverse beam search; set num_beam_groups: 0")
        if self.decoding == "constrained" and self.engine == "vllm":
            raise ValueError("vLLM samples unconstrained; set engine: transformers")
        return self


class SampleShard(SamplingConfig):
    """One shard of ``SamplingConfig``: what the stage ``sample`` takes."""

    shard: int = Field(ge=0, description="0 .. num_shards - 1")

    @model_validator(mode="after")
    def _check(self) -> SampleShard:
        if self.shard >= self.num_shards:
            raise ValueError(f"shard {self.shard} of {self.num_shards} does not exist")
        return self
