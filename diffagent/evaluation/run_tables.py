"""The tables of a run that the evaluation compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from diffagent.errors import ArtifactError
from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.rewards.scores import read_scores
from diffagent.store import Artifact, StageContext


@dataclass(frozen=True)
class RunTables:
    """Rows of all selectors, and the rows of the evaluated split of DABench."""

    candidates: pl.DataFrame
    renders: pl.DataFrame
    scores: pl.DataFrame
    dabench: pl.DataFrame
    judgements: pl.DataFrame | None


def read_run_tables(config: EvaluationConfig, context: StageContext) -> RunTables:
    """Read the inputs of the stage ``evaluate``.

    Raises:
        ArtifactError: the inputs are not those of the selectors.
        ScoreError: the selectors were scored by different scorers.
    """
    judgements = context.inputs.get("judgements")
    tables = RunTables(
        candidates=_read(context.many("candidates"), "candidates.parquet"),
        renders=_read(context.many("renders"), "renders.parquet"),
        scores=read_scores(context.many("scores")),
        dabench=_read_split(context.one("dabench"), config.split),
        judgements=read_scores(judgements, "judgements.parquet") if judgements else None,
    )
    sources = set(tables.candidates["source"])
    if sources != set(config.selectors):
        raise ArtifactError(
            f"the candidates are of {sorted(sources)}, the evaluation is of "
            f"{sorted(config.selectors)}; run the stage 'select' for each of them"
        )
    return tables


def _read(artifacts: Sequence[Artifact], name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(a.file(name)) for a in artifacts])


def _read_split(dabench: Artifact, split: str) -> pl.DataFrame:
    files = dabench.glob(f"data/{split}-*.parquet")
    if not files:
        raise ArtifactError(f"{str(dabench.path)!r} has no split {split!r}")
    return pl.concat([pl.read_parquet(file) for file in files])
