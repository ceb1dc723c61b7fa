"""Stage ``part``: a table of candidates in parts that can be rendered on different machines."""

from __future__ import annotations

from diffagent.render.part_config import PartConfig
from diffagent.schemas.tables import CANDIDATE_TABLE, CandidateRow
from diffagent.store import StageContext, StageResult, stage


@stage("part", version=1, config=PartConfig)
def part(config: PartConfig, context: StageContext) -> StageResult:
    """Take one part of the input ``candidates``, as candidates.parquet.

    Valid answers are cut in the order of their APIs, which begin with the model: a checkpoint is
    loaded for few parts. Each part has as many of them as the others, or one more or less.
    """
    rows = CANDIDATE_TABLE.read(context.one("candidates").file("candidates.parquet"))
    valid = sorted((row.api or "", place) for place, row in enumerate(rows) if _is_valid(row))
    invalid = [place for place, row in enumerate(rows) if not _is_valid(row)]
    chosen = [
        place
        for group in ([place for _, place in valid], invalid)
        for place in group[_cut(group, config.part, config) : _cut(group, config.part + 1, config)]
    ]
    CANDIDATE_TABLE.write(
        context.out / "candidates.parquet", [rows[place] for place in sorted(chosen)]
    )
    return StageResult(rows={"candidates.parquet": len(chosen)})


def _is_valid(row: CandidateRow) -> bool:
    return row.status == "valid"


def _cut(rows: list[int], part: int, config: PartConfig) -> int:
    return len(rows) * part // config.num_parts
