"""Configuration of the stage ``sample``."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from diffagent.schemas.section import Section

Decoding = Literal["unconstrained", "constrained"]
MAX_NEW_TOKENS: Any = Field(
    default=None,
    ge=8,
    description="tokens of an answer; null: as many as the agent's max_length leaves after the "
    "prompt",
)


class SamplingConfig(Section):
    """Candidates for RRHF: how many, and how they are sampled."""

    num_prompts: int = Field(default=1000, ge=1, description="prompts of the train split")
    num_shards: int = Field(
        default=8,
        ge=1,
        description="parts of the prompts, each sampled, rendered and scored by itself; 30 s of "
        "work or more each is best",
    )
    num_candidates: int = Field(
        default=4,
        ge=2,
        le=32,
        description="k: candidates per prompt, in addition to the DABench API",
    )
    temperature: float = Field(default=0.8, gt=0, description="sampling temperature")
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus sampling")
    num_beam_groups: int = Field(
        default=0,
        ge=0,
        description="0: sampling; num_candidates: diverse beam search with one beam per group",
    )
    diversity_penalty: float = Field(
        default=1.0, ge=0, description="penalty of diverse beam search"
    )
    max_new_tokens: int | None = MAX_NEW_TOKENS
    batch_size: int = Field(default=16, ge=1, description="prompts per call of generate")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="'vllm' needs a GPU and the extra vllm"
    )
    decoding: Decoding = Field(
        default="unconstrained",
        description="'unconstrained' also samples invalid answers, which rank last, as in the "
        "paper; 'constrained' samples valid answers only (engine transformers)",
    )
    seed: int = Field(default=0, ge=0, description="seed of the prompts drawn and of the sampling")

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
    """One shard of ``SamplingConfig``."""

    shard: int = Field(ge=0, description="number of the shard, below num_shards")

    @model_validator(mode="after")
    def _check(self) -> SampleShard:
        if self.shard >= self.num_shards:
            raise ValueError(f"shard {self.shard} must be below num_shards ({self.num_shards})")
        return self
