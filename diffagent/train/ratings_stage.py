"""The stage ``ratings``: turns human ratings of pictures into ranked candidates.

Its artifact has the tables that sampling and scoring write, so ``rrhf`` reads it as both
``candidates`` and ``scores``: no rendering and no scorer is needed. Raters take the place of
seeds: the reward of a candidate is the mean of its ratings.
"""

from __future__ import annotations

from diffagent.agent.candidates import write_candidates
from diffagent.schemas.config import RatingsConfig
from diffagent.schemas.tables import SCORES, CandidateRow, ScoreRow
from diffagent.store import StageContext, StageResult, named_files, stage
from diffagent.train.ratings import read_ratings, response

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
                    number, rated.prompt, k, SOURCE, response(model), None, "valid", reason=None
                )
            )
            scores += [
                ScoreRow(number, SOURCE, k, rater, None, None, None, None, rating, "ok", None)
                for rater, rating in enumerate(ratings)
            ]
    write_candidates(candidates, context.out)
    SCORES.write(scores, context.out / SCORES.file_name)
    return StageResult(rows={"prompts": len(prompts), "candidates": len(candidates)})
