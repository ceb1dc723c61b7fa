"""Tables of scores with what their numbers mean, so that those of different scorers never mix.

A parquet file of scores says in its own metadata which scorers of which digests made it, in
which precision, and how the unified score is defined. Who reads several files at once gets an
error when they do not say the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from diffagent.errors import ScoreError
from diffagent.failures import reading
from diffagent.rewards.scorer import Scorer
from diffagent.rewards.unified import Unifier
from diffagent.schemas.rows import RowT, Table
from diffagent.schemas.tables import SCORE_TABLE
from diffagent.store.artifacts import Artifact

_KEY = "diffagent.scores"

Definition = dict[str, Any]


def define(scorers: Sequence[Scorer], dtype: str, unifier: Unifier | None = None) -> Definition:
    """What the numbers of these scorers, and of their unified score, mean."""
    definition: Definition = {
        "dtype": dtype,
        "scorers": {
            scorer.name: {"version": scorer.version, "digest": scorer.digest} for scorer in scorers
        },
    }
    if unifier:
        definition |= {"unified": unifier.definition(), "unified_digest": unifier.digest}
    return definition


def write_scores(
    table: Table[RowT], file: Path, rows: Sequence[RowT], definition: Definition
) -> None:
    """Writes rows of scores together with the definition of their numbers."""
    table.write(file, rows, {_KEY: json.dumps(definition, sort_keys=True)})


def read_definition(file: Path) -> Definition:
    """What the numbers of a file mean; nothing when it does not say (ratings by people)."""
    with reading(file):
        metadata: Mapping[bytes, bytes] = pq.read_schema(file).metadata or {}
        definition: Definition = json.loads(metadata.get(_KEY.encode(), b"{}"))
    return definition


def read_scores(
    artifacts: Sequence[Artifact],
    name: str = "scores.parquet",
    table: Table[Any] = SCORE_TABLE,
) -> pl.DataFrame:
    """Returns the rows of the tables of all artifacts, in order.

    Args:
        artifacts: of the stage ``score``, or ``judge``; at least one.
        name: of the files.
        table: of the files.

    Raises:
        ScoreError: they were not made by the same scorers, or unified in the same way.
    """
    files = [artifact.file(name) for artifact in artifacts]
    expected = read_definition(files[0])
    for file in files[1:]:
        found = read_definition(file)
        if found != expected:
            raise ScoreError(
                f"{str(file)!r} and {str(files[0])!r} hold scores that must not be mixed: "
                f"{_difference(found, expected)}; score both with one configuration"
            )
    return table.read_frame(files)


def _difference(a: Definition, b: Definition) -> str:
    """The first thing that two definitions do not share."""
    mine, theirs = a.get("scorers", {}), b.get("scorers", {})
    for name in sorted({*mine, *theirs}):
        one, other = mine.get(name), theirs.get(name)
        if one != other:
            return f"{name} is {_name(one)} in one and {_name(other)} in the other"
    keys = [key for key in ("dtype", "unified") if a.get(key) != b.get(key)]
    return ", ".join(f"{key} {a.get(key)!r} and {b.get(key)!r}" for key in keys)


def _name(scorer: Mapping[str, str] | None) -> str:
    return f"{scorer['version']} ({scorer['digest'][:12]})" if scorer else "missing"
