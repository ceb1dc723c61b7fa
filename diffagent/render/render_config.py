"""Configuration of the stage ``render``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffagent.schemas.section import Section


class RenderConfig(Section):
    """Pictures to render for each API call, and the program that renders them."""

    seeds: tuple[int, ...] = Field(
        default=(0,), min_length=1, description="seeds; one picture of each call per seed"
    )
    max_pixels: int = Field(
        default=1024 * 1024, ge=64 * 64, description="width * height at most; larger calls fail"
    )
    max_failed_fraction: float = Field(
        default=0.1, ge=0, le=1, description="share of failed pictures above which the stage fails"
    )
    backend: Literal["diffusers", "a1111", "comfyui"] = Field(
        default="diffusers",
        description="program that draws; A1111 and ComfyUI are servers: runtime.render_server",
    )
    safety: Literal["off", "flag", "withhold"] = Field(
        default="off",
        description="NSFW classifier (extra safety): 'flag' logs and records unsafe pictures, "
        "'withhold' makes them failed rows",
    )
    safety_threshold: float = Field(
        default=0.8, gt=0, le=1, description="probability of NSFW from which a picture is unsafe"
    )
