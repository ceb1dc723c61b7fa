"""The stage ``ratings``: turns human ratings of pictures into ranked candidates.

Its artifact has the tables that sampling and scoring write, so ``rrhf`` reads it as both
``candidates`` and ``scores``: no rendering and no scorer is needed. Raters take the place of
seeds: the reward of a candidate is the mean of its ratings.
"""

from __future__ import annotations

from diffagent.agent.candidates import write_candidates
from diffagent.schemas.tables import SCORE_TABLE, CandidateRow, ScoreRow
from diffagent.store import StageContext, StageResult, named_files, stage
from diffagent.train.ratings import read_ratings, response
from diffagent.train.ratings_config import RatingsConfig

SOURCE = "ratings"


@stage("ratings", version=1, config=RatingsConfig, files=lambda config: named_files(config.path))
def import_ratings(config: RatingsConfig, context: StageContext) -> StageResult:
    """Write candidates.parquet and scores.parquet from the file ``config.path``."""
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
