"""Human ratings of pictures as ranked responses: alignment with no rendering and no scorer.

The stage ``ratings`` writes the tables that sampling and scoring would have written, so its
artefact goes into ``train_rrhf`` twice, as ``candidates`` and as ``scores``. The raters stand
where the seeds do: a candidate's reward is the mean of its ratings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffagent.agent.candidates import write_candidates
from diffagent.errors import SchemaError
from diffagent.schemas.config import RatingsConfig
from diffagent.schemas.tables import SCORE_TABLE, CandidateRow, ScoreRow
from diffagent.store.artifacts import StageContext, StageResult, canonical_json, named_files, stage

SOURCE = "ratings"


@dataclass(frozen=True)
class RatedPrompt:
    """A prompt, and for each model the ratings of its picture, higher is better."""

    prompt: str
    ratings: dict[str, tuple[float, ...]]


def read_ratings(path: str | Path) -> list[RatedPrompt]:
    """Rated prompts of a file in GenAI-Bench's form (arXiv 2406.13743), by their ids.

    The form: ``{id: {"prompt": text, "models": {name: [rating, ...]}}}``.

    Raises:
        SchemaError: the file is missing or has another form.
    """
    try:
        rows = json.loads(Path(path).read_bytes())
        prompts = [
            RatedPrompt(
                str(row["prompt"]),
                {str(name): tuple(map(float, given)) for name, given in row["models"].items()},
            )
            for _, row in sorted(rows.items())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SchemaError(
            f"{str(path)!r} holds no ratings ({type(error).__name__}: {error}); expected is "
            '{"1": {"prompt": "a fox", "models": {"SDXL": [4, 5, 4]}}}',
            field="ratings",
        ) from error
    if not prompts or not all(p.ratings and all(p.ratings.values()) for p in prompts):
        raise SchemaError(
            f"{str(path)!r}: there must be prompts, and a rating of each model", field="ratings"
        )
    return prompts


def response(model: str) -> str:
    """What an agent writes to choose ``model``: rated models have no version and no parameters."""
    return canonical_json({"model": model}).decode()


@stage("ratings", version=1, config=RatingsConfig, files=lambda config: named_files(config.path))
def import_ratings(config: RatingsConfig, context: StageContext) -> StageResult:
    """Ratings -> candidates.parquet and scores.parquet."""
    candidates: list[CandidateRow] = []
    scores: list[ScoreRow] = []
    prompts = read_ratings(config.path)
    for number, rated in enumerate(prompts):
        for k, (model, ratings) in enumerate(sorted(rated.ratings.items())):
            candidates.append(
                CandidateRow(
                    prompt_id=number,
                    prompt=rated.prompt,
                    candidate=k,
                    source=SOURCE,
                    text=response(model),
                    status="valid",
                )
            )
            scores += [
                ScoreRow(
                    prompt_id=number,
                    source=SOURCE,
                    candidate=k,
                    seed=rater,
                    unified=rating,
                    status="ok",
                )
                for rater, rating in enumerate(ratings)
            ]
    write_candidates(candidates, context.out)
    SCORE_TABLE.write(context.out / "scores.parquet", scores)
    return StageResult(rows={"prompts": len(prompts), "candidates": len(candidates)})
