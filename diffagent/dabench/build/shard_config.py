"""Configuration of the stage ``shard``."""

from __future__ import annotations

from pydantic import Field

from diffagent.schemas.section import Section


class DABenchConfig(Section):
    """Splits and shards of DABench."""

    validation_fraction: float = Field(
        default=0.1, gt=0, lt=0.5, description="share of the pairs in the validation split"
    )
    test_fraction: float = Field(
        default=0.1, gt=0, lt=0.5, description="share of the pairs in the test split"
    )
    rows_per_shard: int = Field(default=20_000, ge=1, description="rows of a parquet file at most")
    near_duplicate_jaccard: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="Jaccard similarity of word pairs from which two prompts share a split",
    )
    series_jaccard: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="the same for prompts of one creator; no effect unless below "
        "near_duplicate_jaccard",
    )
    seed: int = Field(default=0, ge=0, description="seed of the splits")
