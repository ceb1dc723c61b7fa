"""The stage ``filter`` as one writes it with json and pandas: the yardstick of bench_build.py.

Everything is loaded into DataFrames, each step is a column that a function makes for every record,
and each filter is a mask. What the stage means is shared with it: the readers of metadata, the
resolver (with the answers that it remembers), the filters' own conditions, how a row is put
together. Not shared is how the work is organised: here nothing is streamed, put off until it is
asked for or left to other processes. The prints, which the stage writes besides, are left out.
"""

from __future__ import annotations

import gzip
import json
from operator import attrgetter
from pathlib import Path

import pandas as pd

from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.model_filters import ModelSift
from diffagent.dabench.filter.record_filters import RECORD_FILTERS, Record
from diffagent.dabench.filter.records import DUPLICATE, PairBuilder, make_api
from diffagent.dabench.filter.resolve import Resolver
from diffagent.dabench.filter.snapshot_rows import read_generations, read_gone
from diffagent.store import Artifact
from diffagent.t2i.catalogue import Catalogue, rename


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
    for column in ("generation", "loras", "embeddings", "params", "level"):
        images[column] = images["record"].map(attrgetter(column))
    for name in config.records:
        if name != DUPLICATE:
            check = RECORD_FILTERS[name]
            reasons = images["record"].map(lambda record, check=check: check(record, config))
            images = images[reasons.isna()].copy()
    pairs = PairBuilder(config, resolver, dates)
    images["api"] = images["record"].map(make_api)
    rows = pd.DataFrame(map(pairs.row, images["record"], images["api"]))
    if DUPLICATE in config.records:
        taught = pd.DataFrame(
            {
                "prompt": rows["prompt"].str.casefold(),
                "response": [api.response().to_json() for api in images["api"]],
            }
        )
        rows = rows[~taught.duplicated()]
    return rows.reset_index(drop=True)


def save(rows: pd.DataFrame, path: Path) -> None:
    """Write the rows as JSON lines."""
    rows.to_json(path, orient="records", lines=True)
