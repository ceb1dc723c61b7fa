"""The pairs of a split, and which of them a stage works on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from diffagent.errors import ArtifactError
from diffagent.failures import reading
from diffagent.schemas.api import T2IAPI, parse_api


@dataclass(frozen=True)
class Pair:
    """One row of DABench: the id of the record, its prompt and its API."""

    id: int
    prompt: str
    api: T2IAPI


def read_split(dabench: Path, split: str) -> list[Pair]:
    """All pairs of a split ('train', 'validation', 'test') of a dataset directory, by id.

    Raises:
        ArtifactError: the split has no rows.
    """
    files = sorted(dabench.glob(f"data/{split}-*.parquet"))
    if files:
        tables = []
        for file in files:
            with reading(file):
                tables.append(pl.read_parquet(file, columns=["id", "prompt", "api"]))
        rows = pl.concat(tables).sort("id").iter_rows()
        pairs = [Pair(i, prompt, parse_api(api)) for i, prompt, api in rows]
        if pairs:
            return pairs
    raise ArtifactError(
        f"the {split} split of {str(dabench)!r} is empty; loosen the filters or crawl more"
    )


def draw(pairs: list[Pair], num_prompts: int, seed: int) -> list[Pair]:
    """``num_prompts`` of the pairs (all when there are fewer), in a random order.

    The order depends on (seed, id) alone: adding pairs or asking for more prompts does not
    reshuffle the others.
    """
    return sorted(pairs, key=lambda pair: _rank(seed, pair.id))[:num_prompts]


def draw_ids(ids: Iterable[int], seed: int) -> list[int]:
    """Ids in the order of `draw`."""
    return sorted(ids, key=lambda ident: _rank(seed, ident))


def _rank(seed: int, ident: int) -> bytes:
    return hashlib.sha256(f"{seed}/{ident}".encode()).digest()
