"""Stage ``part``: a table of candidates in parts that can be rendered on different machines."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.render.part_config import PartConfig
from diffagent.store import StageContext, StageResult, stage


@stage("part", version=1, config=PartConfig)
def part(config: PartConfig, context: StageContext) -> StageResult:
    """Take one part of the input ``candidates``, as candidates.parquet.

    Valid answers are cut in the order of their APIs, which begin with the model: a checkpoint is
    loaded for few parts. Each part has as many of them as the others, or one more or less.
    """
    table = pq.read_table(context.one("candidates").file("candidates.parquet"))
    rows = list(enumerate(zip(table["status"].to_pylist(), table["api"].to_pylist(), strict=True)))
    valid = sorted((api, row) for row, (status, api) in rows if status == "valid")
    invalid = [row for row, (status, _) in rows if status != "valid"]
    chosen = [
        row
        for group in ([row for _, row in valid], invalid)
        for row in group[_cut(group, config.part, config) : _cut(group, config.part + 1, config)]
    ]
    made = table.take(pa.array(sorted(chosen), pa.int64()))
    pq.write_table(made, context.out / "candidates.parquet", compression="zstd")
    return StageResult(rows={"candidates.parquet": made.num_rows})


def _cut(rows: list[int], part: int, config: PartConfig) -> int:
    return len(rows) * part // config.num_parts
