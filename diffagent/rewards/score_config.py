"""Configuration of the stage ``score``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from diffagent.schemas.section import Section

SHA256 = Field(
    default=None, pattern="^[0-9a-fA-F]{64}$", description="of the weights' file; checked if given"
)
ScorerDtype = Literal["float32", "bfloat16", "float16"]
DTYPE: Any = Field(
    default="float32",
    description="of matrix products (autocast); bfloat16 moved cosines by up to 1.1e-3",
)


class ScorerConfig(Section):
    """One reward model."""

    name: Literal["clip", "image_reward", "hps_v2"]
    model: str = Field(
        description="open_clip name, 'v1.0' (ImageReward), 'v2' or 'v2.1' (HPS), or a directory"
    )
    weights: str | None = Field(
        default=None, description="local file, or hub id of the release, ID@REVISION to pin it"
    )
    sha256: str | None = SHA256
    weight: float = Field(default=1.0, ge=0, description="weight in the unified score")


class RewardsConfig(Section):
    """Which rewards, and how they become one number."""

    scorers: tuple[ScorerConfig, ...] = Field(min_length=1)
    unify: Literal["zscore", "chatgen"] = "zscore"
    reference: str | None = Field(
        default=None, description="'zscore': JSON file with mean and std of each metric"
    )
    invalid_floor: float = Field(default=-10.0, description="unified score of an invalid call")
    dtype: ScorerDtype = DTYPE
    batch_size: int = Field(default=32, ge=1)
