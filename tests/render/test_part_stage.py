"""Parts of a table of candidates: every row once, alike in number, a checkpoint in few parts."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.evaluation.evaluate_stage import evaluate
from diffagent.render.part_config import PartConfig
from diffagent.render.part_stage import part
from diffagent.store import StageContext, StageResult, stage
from tests.evaluation.evaluation_run import Run

CONFIG = EvaluationConfig(
    selectors=("sft", "nearest"), num_prompts=20, report_prompts=3, bootstrap_samples=100
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("store"), CONFIG)


@pytest.mark.parametrize("num_parts", [1, 3, 20])
def test_every_row_is_in_one_part(run: Run, num_parts: int) -> None:
    whole = pq.read_table(run.inputs["candidates"][0].file("candidates.parquet"))
    parts = [
        pq.read_table(
            part.run(
                PartConfig(num_parts=num_parts, part=i),
                {"candidates": run.inputs["candidates"][:1]},
                run.runtime,
            ).file("candidates.parquet")
        )
        for i in range(num_parts)
    ]
    found = [row["prompt_id"] for table in parts for row in table.to_pylist()]
    assert sorted(found) == sorted(whole["prompt_id"].to_pylist())
    valid = [table["status"].to_pylist().count("valid") for table in parts]
    assert max(valid) - min(valid) <= 1
    models = [
        {row["api"].split(",")[0] for row in table.to_pylist() if row["api"]} for table in parts
    ]
    assert sum(map(len, models)) <= len(set.union(*models)) + num_parts - 1, "few loads"


def test_a_sharded_evaluation_says_the_same(run: Run) -> None:
    """Renders and scores in two parts give the report and the numbers of the whole."""

    @stage("half", version=1, config=PartConfig)
    def half(config: PartConfig, context: StageContext) -> StageResult:
        source = context.one("whole")
        for file in source.glob("*.parquet"):
            table = pq.read_table(file)
            middle = table.num_rows // 2
            rows = table.slice(0, middle) if config.part == 0 else table.slice(middle)
            pq.write_table(rows, context.out / file.name)
        images = {f"{recipe}.png" for recipe in rows.to_pydict().get("recipe", ()) if recipe}
        for picture in source.glob("images/*.png"):
            if picture.name in images:
                target = Path(context.out, "images", picture.name)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(picture.read_bytes())
        manifest = source.manifest
        return StageResult(metrics=manifest.metrics)

    halves = [PartConfig(num_parts=2, part=i) for i in (0, 1)]
    inputs = {
        **run.inputs,
        **{
            name: [
                half.run(h, {"whole": [a]}, run.runtime) for a in run.inputs[name] for h in halves
            ]
            for name in ("renders", "scores")
        },
    }
    sharded = CONFIG.model_copy(update={"num_shards": 2})
    whole = evaluate.run(CONFIG, run.inputs, run.runtime)
    parts = evaluate.run(sharded, inputs, run.runtime)
    tables = [pq.read_table(a.file("table.parquet")) for a in (whole, parts)]
    assert tables[0].equals(tables[1])
    pictures = [a.file("report.html").read_text().count("data:image/png") for a in (whole, parts)]
    assert pictures[0] == pictures[1] > 0
