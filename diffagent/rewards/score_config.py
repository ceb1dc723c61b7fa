"""Configuration of the stage ``score``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from diffagent.schemas.section import Section

SHA256 = Field(
    default=None,
    pattern="^[0-9a-fA-F]{64}$",
    description="SHA256 that the file of the weights must have; null: not checked",
)
ScorerDtype = Literal["float32", "bfloat16", "float16"]
DTYPE: Any = Field(
    default="float32",
    description="type of matrix products (autocast); bfloat16 changed cosines by up to 1.1e-3",
)


class ScorerConfig(Section):
    """A reward model."""

    name: Literal["clip", "image_reward", "hps_v2"] = Field(description="kind of the scorer")
    model: str = Field(
        description="name in open_clip, 'v1.0' (ImageReward), 'v2' or 'v2.1' (HPS), or a directory"
    )
    weights: str | None = Field(
        default=None, description="local file, or hub id of the release; ID@REVISION pins it"
    )
    sha256: str | None = SHA256
    weight: float = Field(default=1.0, ge=0, description="weight in the unified score")
    backend: Literal["default", "official"] = Field(
        default="default",
        exclude_if=lambda backend: backend == "default",  # keeps identities of older configs
        description="'official': compute with the authors' package (image-reward, hpsv2)",
    )

    @model_validator(mode="after")
    def _check(self) -> ScorerConfig:
        if self.backend == "official" and self.name == "clip":
            raise ValueError("backend: 'clip' is open_clip itself; 'official' is for the others")
        return self


class RewardsConfig(Section):
    """Reward models, and the formula of the unified score."""

    scorers: tuple[ScorerConfig, ...] = Field(min_length=1, description="reward models")
    unify: Literal["zscore", "chatgen"] = Field(
        default="zscore",
        description="unified score: weighted mean of z-scores, or the formula of ChatGen",
    )
    reference: str | None = Field(
        default=None,
        description="unify 'zscore': JSON file with mean and standard deviation of each scorer",
    )
    invalid_floor: float = Field(default=-10.0, description="unified score of an invalid API call")
    dtype: ScorerDtype = DTYPE
    batch_size: int = Field(default=32, ge=1, description="pictures per batch")
