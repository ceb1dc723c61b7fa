"""Tables of scores with their definition, so that scores of different scorers never mix.

The metadata of a parquet file of scores holds the scorers with their digests, the precision, and
the definition of the unified score. Reading files of different definitions together is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.errors import ScoreError
from diffagent.failures import reading
from diffagent.rewards.scorer import Scorer
from diffagent.rewards.unified import Unifier
from diffagent.store import Artifact

_KEY = b"diffagent.scores"

Definition = dict[str, Any]


def define(scorers: Sequence[Scorer], dtype: str, unifier: Unifier | None = None) -> Definition:
    """Returns the definition of the scores of these scorers, and of their unified score."""
    definition: Definition = {
        "dtype": dtype,
        "scorers": {
            scorer.name: {"version": scorer.version, "digest": scorer.digest} for scorer in scorers
        },
    }
    if unifier:
        definition |= {"unified": unifier.definition(), "unified_digest": unifier.digest}
    return definition


def write_scores(table: pa.Table, file: Path, definition: Definition) -> None:
    """Write a table of scores together with its definition."""
    metadata = {_KEY: json.dumps(definition, sort_keys=True)}
    pq.write_table(table.replace_schema_metadata(metadata), file, compression="zstd")


def read_definition(file: Path) -> Definition:
    """Reads the definition of a file; empty for a file without one (ratings by people)."""
    with reading(file):
        metadata: Mapping[bytes, bytes] = pq.read_schema(file).metadata or {}
        definition: Definition = json.loads(metadata.get(_KEY, b"{}"))
    return definition


def read_scores(artifacts: Sequence[Artifact], name: str = "scores.parquet") -> pl.DataFrame:
    """Reads the rows of all artifacts' tables, in order.

    Args:
        artifacts: of the stage ``score``, or ``judge``; at least one.
        name: of the table.

    Raises:
        ScoreError: the scorers, or the definitions of the unified score, differ.
    """
    files = [artifact.file(name) for artifact in artifacts]
    expected = read_definition(files[0])
    for file in files[1:]:
        definition = read_definition(file)
        if definition != expected:
            raise ScoreError(
                f"{str(file)!r} and {str(files[0])!r} hold scores that must not be mixed: "
                f"{_difference(definition, expected)}; score both with one configuration"
            )
    return pl.concat([pl.read_parquet(file) for file in files])


def _difference(a: Definition, b: Definition) -> str:
    """Describes the first difference of two definitions."""
    scorers, others = a.get("scorers", {}), b.get("scorers", {})
    for name in sorted({*scorers, *others}):
        scorer, other = scorers.get(name), others.get(name)
        if scorer != other:
            return f"{name} is {_name(scorer)} in one and {_name(other)} in the other"
    keys = [key for key in ("dtype", "unified") if a.get(key) != b.get(key)]
    return ", ".join(f"{key} {a.get(key)!r} and {b.get(key)!r}" for key in keys)


def _name(scorer: Mapping[str, str] | None) -> str:
    return f"{scorer['version']} ({scorer['digest'][:12]})" if scorer else "missing"
