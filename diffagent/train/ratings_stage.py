"""The stage ``ratings``: turns human ratings of pictures into ranked candidates.

Its artifact has the tables that sampling and scoring write, so ``rrhf`` reads it as both
``candidates`` and ``scores``: no rendering and no scorer is needed. Raters take the place of
seeds: the reward of a candidate is the mean of its ratings.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.agent.candidates import write_candidates
from diffagent.schemas.tables import SCORES
from diffagent.store import StageContext, StageResult, named_files, stage
from diffagent.train.ratings import read_ratings, response
from diffagent.train.ratings_config import RatingsConfig

SOURCE = "ratings"


@stage("ratings", version=1, config=RatingsConfig, files=lambda config: named_files(config.path))
def import_ratings(config: RatingsConfig, context: StageContext) -> StageResult:
    """Write candidates.parquet and scores.parquet from the file ``config.path``."""
    candidates: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    prompts = read_ratings(config.path)
    for number, rated in enumerate(prompts):
        for k, (model, ratings) in enumerate(sorted(rated.ratings.items())):
            key = {"prompt_id": number, "source": SOURCE, "candidate": k}
            answer = {"text": response(model), "api": None, "status": "valid", "reason": None}
            candidates.append({**key, "prompt": rated.prompt, **answer, "logprob": None})
            scores += [
                {**dict.fromkeys(SCORES.names), **key, "seed": rater, "unified": rating}
                | {"status": "ok"}
                for rater, rating in enumerate(ratings)
            ]
    write_candidates(candidates, context.out)
    pq.write_table(pa.Table.from_pylist(scores, schema=SCORES), context.out / "scores.parquet")
    return StageResult(rows={"prompts": len(prompts), "candidates": len(candidates)})
