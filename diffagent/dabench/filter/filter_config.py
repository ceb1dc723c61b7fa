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
    """Filters of models and records in their order, and their limits.

    Names of filters are those of the drop funnel: the first filter with a reason drops an item.
    ``diffagent.dabench.filter.model_filters`` and ``diffagent.dabench.filter.record_filters``
    describe each filter.
    """

    models: tuple[ModelFilter, ...] = Field(
        default=("model_type", "base_model", "nsfw", "file_availability"),
        description="filters of model versions, in order; optional ones are licence and downloads",
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
        description="filters of generation records, in order; optional ones are text_to_image, "
        "size_stated, networks_complete and reactions",
    )
    model_types: tuple[str, ...] = Field(
        default=("Checkpoint", "LORA", "LoCon", "DoRA", "TextualInversion"),
        description="model types to keep",
    )
    base_models: tuple[str, ...] = Field(
        default=("SD 1.5", "SDXL 1.0"),
        description="base models to keep: Civitai's names, ecosystems ('sdxl', 'flux1') or 'all'; "
        "the default is the paper's",
    )
    allow_nsfw: bool = Field(default=False, description="keep models marked NSFW")
    allow_real_persons: bool = Field(
        default=False, description="keep models and images of real persons (Civitai's poi)"
    )
    max_image_nsfw_level: int = Field(
        default=1,
        ge=1,
        le=31,
        description="highest nsfw_level of an image: 1 PG, 2 PG-13, 4 R, 8 X, 16 XXX",
    )
    require_scans: bool = Field(
        default=True, description="drop files whose pickle or virus scan is not 'Success'"
    )
    commercial_use: tuple[Literal["yes", "no", "unknown"], ...] = Field(
        default=("yes",), description="filter 'licence': states of commercial use to keep"
    )
    min_downloads: int = Field(
        default=1, ge=0, description="filter 'downloads': least downloads of a version"
    )
    min_reactions: int = Field(
        default=1, ge=0, description="filter 'reactions': least reactions of an image"
    )
    min_steps: int = Field(default=1, ge=1, description="least sampling steps of a record")
    max_steps: int = Field(default=150, le=150, description="most sampling steps of a record")
    max_cfg_scale: float = Field(
        default=30, le=30, description="highest guidance scale of a record"
    )
    min_prompt_words: int = Field(default=1, ge=1, description="least words of a prompt")
    max_prompt_chars: int = Field(default=4000, ge=1, description="most characters of a prompt")
    min_confidence: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="least confidence in the checkpoint's version. Measured on showcases: 0.7 "
        "resolves 79 % of the pictures, 94 % of them to the right version and 99 % to the right "
        "model, and 2 % of those whose checkpoint the snapshot lacks; 0.9 resolves 74 %, with 95 % "
        "and 99 % right, and none of those",
    )
    use_galleries: bool = Field(
        default=False,
        description="use the gallery that a picture was posted to as weak evidence of its "
        "checkpoint; leave it off where galleries are the ground truth of a measurement",
    )
    max_hash_lookups: int = Field(
        default=0, ge=0, description="unknown checkpoint hashes to look up on the site"
    )

    @model_validator(mode="after")
    def _check_filters(self) -> Self:
        for name, chosen in (("models", self.models), ("records", self.records)):
            if twice := sorted({x for x in chosen if chosen.count(x) > 1}):
                raise ValueError(f"{name} has {', '.join(twice)} twice; name each filter once")
            if missing := [x for x in _NEEDED[name] if x not in chosen]:
                raise ValueError(
                    f"{name} lacks {', '.join(missing)}, which no dataset can do without; their "
                    "settings relax them"
                )
        if "duplicate" in self.records[:-1]:
            raise ValueError(
                "'duplicate' must be the last of records, since it compares kept records"
            )
        return self
