"""Configuration of the stage ``judge``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from diffagent.rewards.score_config import DTYPE, SHA256, ScorerDtype
from diffagent.schemas.section import Section


class JudgeConfig(Section):
    """A held-out judge; its names differ from those of ``ScorerConfig``, so none is a reward."""

    name: Literal["pick_score", "aesthetic"] = Field(description="kind of the judge")
    model: str = Field(
        description="'pick_score': directory or hub id (ID@REVISION pins it) of a CLIP of "
        "transformers; 'aesthetic': name in open_clip, or directory, of the CLIP below the head"
    )
    weights: str | None = Field(
        default=None, description="'aesthetic': weights of a CLIP that model names"
    )
    head: str | None = Field(default=None, description="'aesthetic': safetensors file of the head")
    sha256: str | None = SHA256

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        if (self.name == "aesthetic") != (self.head is not None):
            raise ValueError("head: 'aesthetic' needs this file, and no other judge uses it")
        return self


class JudgesConfig(Section):
    """Held-out judges of an evaluation, in addition to the rewards that agents are trained on."""

    judges: tuple[JudgeConfig, ...] = Field(default=(), description="held-out judges")
    dtype: ScorerDtype = DTYPE
    batch_size: int = Field(default=32, ge=1, description="pictures per batch")
