"""Configuration of the stage ``render``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffagent.schemas.section import Section


class RenderConfig(Section):
    """How an API call becomes a picture."""

    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="pictures per call")
    max_pixels: int = Field(default=1024 * 1024, ge=64 * 64, description="larger sizes are refused")
    max_failed_fraction: float = Field(default=0.1, ge=0, le=1)
    backend: Literal["diffusers", "a1111", "comfyui"] = Field(
        default="diffusers",
        description="program that draws; A1111 and ComfyUI are servers: runtime.render_server",
    )
    safety: Literal["off", "flag", "withhold"] = Field(
        default="off",
        description="check of pictures by a classifier (extra safety): 'flag' logs and records "
        "it, 'withhold' makes an unsafe picture a failed row",
    )
    safety_threshold: float = Field(
        default=0.8, gt=0, le=1, description="probability from which a picture is unsafe"
    )
