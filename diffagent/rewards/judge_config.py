"""Configuration of the stage ``judge``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from diffagent.rewards.score_config import DTYPE, SHA256, ScorerDtype
from diffagent.schemas.section import Section


class JudgeConfig(Section):
    """One held-out judge. Its names are none of `ScorerConfig`'s: it cannot become a reward."""

    name: Literal["pick_score", "aesthetic"]
    model: str = Field(
        description="'pick_score': directory or hub id (ID@REVISION pins it) of a CLIP in "
        "transformers' layout; "
        "'aesthetic': open_clip name or directory of the CLIP under the head"
    )
    weights: str | None = Field(default=None, description="'aesthetic': of a CLIP given by name")
    head: str | None = Field(default=None, description="'aesthetic': file of the head")
    sha256: str | None = SHA256

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        if (self.name == "aesthetic") != (self.head is not None):
            raise ValueError("head: the file that 'aesthetic' needs, and no other judge has")
        return self


class JudgesConfig(Section):
    """Who judges the pictures of an evaluation, beside the rewards that agents are trained on."""

    judges: tuple[JudgeConfig, ...] = ()
    dtype: ScorerDtype = DTYPE
    batch_size: int = Field(default=32, ge=1)
