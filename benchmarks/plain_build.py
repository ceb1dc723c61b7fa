"""The stage ``filter`` as one writes it with json and pandas: the yardstick of bench_build.py.

Everything is loaded into DataFrames and each step maps a function over a column. What the stage
means is shared with it (readers of metadata, the resolver, the filters' own conditions), so both
give the same rows; how the work is organised is not.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd

from diffagent.artifacts import Artifact
from diffagent.dabench.catalogue import Catalogue, rename
from diffagent.dabench.model_filters import ModelSift
from diffagent.dabench.record_filters import RECORD_FILTERS, Record
from diffagent.dabench.records import DUPLICATE, PairBuilder
from diffagent.dabench.resolve import Resolver
from diffagent.dabench.snapshot import read_generations, read_gone
from schemas.api import parse_api
from schemas.config import FilterConfig


def load(snapshot: Artifact, kind: str) -> pd.DataFrame:
    """All items of a snapshot, each once."""
    rows = []
    for path in snapshot.glob(f"{kind}/*.jsonl.gz"):
        with gzip.open(path) as lines:
            rows += [json.loads(line) for line in lines]
    return pd.DataFrame({"item": rows, "id": [row["id"] for row in rows]}).drop_duplicates("id")


def build(snapshot: Artifact, config: FilterConfig) -> pd.DataFrame:
    """The rows of ``records-00000.parquet``."""
    dates = read_generations(snapshot)
    resolver = Resolver()
    models = ModelSift(config, resolver, read_gone(snapshot), dates)
    load(snapshot, "models")["item"].map(models.add)
    resolver.use(Catalogue(rename(models.entries)))

    images = load(snapshot, "images")
    images["record"] = images["item"].map(lambda item: Record(item, resolver))
    images["made"] = images["record"].map(lambda record: record.generation)
    images["found"] = images["record"].map(lambda record: record.found)
    for name in config.records:
        if name != DUPLICATE:
            check = RECORD_FILTERS[name]
            reasons = images["record"].map(lambda record, check=check: check(record, config))
            images = images[reasons.isna()]
    pairs = PairBuilder(config, resolver, dates)
    rows = pd.DataFrame([pairs.build(item).row for item in images["item"]])
    if DUPLICATE in config.records:
        taught = pd.DataFrame(
            {
                "prompt": rows["prompt"].str.casefold(),
                "response": rows["api"].map(lambda api: parse_api(api).response().to_json()),
            }
        )
        rows = rows[~taught.duplicated()]
    return rows.reset_index(drop=True)


def save(rows: pd.DataFrame, path: Path) -> None:
    """Write the rows as JSON lines."""
    rows.to_json(path, orient="records", lines=True)


def as_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain objects."""
    return json.loads(rows.to_json(orient="records"))
