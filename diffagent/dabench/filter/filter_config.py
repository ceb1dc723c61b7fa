"""Configuration of the stage ``filter``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from diffagent.schemas.section import Section

ModelFilter = Literal[
    "model_type", "base_model", "nsfw", "file_availability", "licence", "downloads"
]
RecordFilter = Literal[
    "media_type",
    "image_level",
    "checkpoint_resolved",
    "checkpoint_kept",
    "prompt",
    "parameters_parsed",
    "parameters_in_range",
    "text_to_image",
    "size_stated",
    "networks_complete",
    "reactions",
    "duplicate",
]
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "models": ("model_type", "nsfw", "file_availability"),
    "records": (
        "image_level",
        "checkpoint_resolved",
        "checkpoint_kept",
        "prompt",
        "parameters_parsed",
        "parameters_in_range",
    ),
}


class FilterConfig(Section):
    """What enters DABench: which filters, in which order, with what limits.

    Names of filters and reasons are those of the drop funnel: an item is dropped by the first
    filter that has a reason. What each filter does is in
    ``diffagent.dabench.filter.model_filters`` and ``diffagent.dabench.filter.record_filters``.
    """

    models: tuple[ModelFilter, ...] = Field(
        default=("model_type", "base_model", "nsfw", "file_availability"),
        description="filters of model versions; also there: licence, downloads",
    )
    records: tuple[RecordFilter, ...] = Field(
        default=(
            "media_type",
            "image_level",
            "checkpoint_resolved",
            "checkpoint_kept",
            "prompt",
            "parameters_parsed",
            "parameters_in_range",
            "duplicate",
        ),
        description="filters of generation records; also there: text_to_image, size_stated, "
        "networks_complete, reactions",
    )
    model_types: tuple[str, ...] = ("Checkpoint", "LORA", "LoCon", "DoRA", "TextualInversion")
    base_models: tuple[str, ...] = Field(
        default=("SD 1.5", "SDXL 1.0"),
        description="as in the paper; Civitai's names, ecosystems ('sdxl', 'flux1') or 'all'",
    )
    allow_nsfw: bool = False
    allow_real_persons: bool = False
    max_image_nsfw_level: int = Field(default=1, ge=1, le=31, description="bit: 1 PG, 2 PG-13, 4 R")
    require_scans: bool = Field(default=True, description="pickle and virus scan must be Success")
    commercial_use: tuple[Literal["yes", "no", "unknown"], ...] = Field(
        default=("yes",), description="'licence': states of commercial use that pass"
    )
    min_downloads: int = Field(default=1, ge=0, description="'downloads': of the version")
    min_reactions: int = Field(default=1, ge=0, description="'reactions': of all kinds")
    min_steps: int = Field(default=1, ge=1)
    max_steps: int = Field(default=150, le=150)
    max_cfg_scale: float = Field(default=30, le=30)
    min_prompt_words: int = Field(default=1, ge=1)
    max_prompt_chars: int = Field(default=4000, ge=1)
    min_confidence: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="of the checkpoint's version. On showcases 0.7 answers 79 % of the pictures, "
        "94 % of them right to the version and 99 % to the model, and 2 % of the pictures whose "
        "checkpoint is not in the snapshot; 0.9 answers 74 %, 95 %, 99 % and none of those",
    )
    use_galleries: bool = Field(
        default=False,
        description="take the gallery that a picture was posted to for weak evidence of what made "
        "it; not where galleries are the truth that something is measured against",
    )
    max_hash_lookups: int = Field(
        default=0, ge=0, description="unknown checkpoint hashes to ask the site for; 0: none"
    )

    @model_validator(mode="after")
    def _check_filters(self) -> Self:
        for name, chosen in (("models", self.models), ("records", self.records)):
            if twice := sorted({x for x in chosen if chosen.count(x) > 1}):
                raise ValueError(f"{name} names {', '.join(twice)} twice")
            if missing := [x for x in _NEEDED[name] if x not in chosen]:
                raise ValueError(
                    f"{name} lacks {', '.join(missing)}, which cannot be left out; their settings "
                    "say what they let pass"
                )
        if "duplicate" in self.records[:-1]:
            raise ValueError("'duplicate' must be the last of records: it compares what is kept")
        return self
