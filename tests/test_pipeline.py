"""The plan: wiring, order, sub-plans, and the runner over stages that need no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from diffagent import pipeline
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.errors import ConfigError
from diffagent.run_config import RunConfig
from diffagent.store import StageContext, StageResult, stage

REWARDS = {"scorers": [{"name": "clip", "model": "tiny"}], "unify": "chatgen"}


def make_config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"rewards": REWARDS, **sections})


def test_parents_come_before_children_and_exist() -> None:
    nodes = pipeline.plan(make_config(sampling={"num_shards": 3}))
    seen: set[str] = set()
    for key, node in nodes.items():
        assert node.key == key
        assert seen.issuperset(node.parents), key
        seen.add(key)
    assert {node.group for node in nodes.values()} == set(pipeline.GROUPS)


def test_rrhf_reads_the_shards_in_order_and_evaluate_the_selectors() -> None:
    nodes = pipeline.plan(make_config(sampling={"num_shards": 11}))
    assert nodes["rrhf"].inputs["scores"] == tuple(f"score-{i}" for i in range(11))
    order = make_config().evaluation.selectors
    for name, prefix in (("candidates", "select"), ("renders", "render"), ("scores", "score")):
        assert nodes["evaluate"].inputs[name] == tuple(f"{prefix}-{s}" for s in order)


def test_held_out_judges_see_evaluated_selectors_alone_and_no_training_reads_them() -> None:
    judges = {"judges": [{"name": "pick_score", "model": "somewhere"}]}
    nodes = pipeline.plan(make_config(judges=judges))
    asked = [key for key in nodes if key.startswith("judge-")]
    assert asked == [f"judge-{name}" for name in make_config().evaluation.selectors]
    assert nodes["evaluate"].inputs["judgements"] == tuple(asked)
    readers = {key for key, node in nodes.items() if {*asked} & {*node.parents}}
    assert readers == {"evaluate"}
    assert not {*asked} & {*pipeline.upstream(nodes, ["rrhf"])}
    plain = pipeline.plan(make_config())
    assert not any(key.startswith("judge-") for key in plain)
    assert "judgements" not in plain["evaluate"].inputs


@pytest.mark.parametrize("name", ["pick_score", "aesthetic"])
def test_a_judge_cannot_be_a_reward_and_a_reward_no_judge(name: str) -> None:
    with pytest.raises(ValidationError, match="scorers"):
        make_config(rewards={"scorers": [{"name": name, "model": "m"}], "unify": "chatgen"})
    with pytest.raises(ValidationError, match="judges"):
        make_config(judges={"judges": [{"name": "clip", "model": "m"}]})


def test_an_evaluation_in_shards() -> None:
    evaluation = {"selectors": ["random", "rrhf"], "num_shards": 2}
    nodes = pipeline.plan(make_config(evaluation=evaluation))
    names = ("random-0", "random-1", "rrhf-0", "rrhf-1")
    assert nodes["evaluate"].inputs["candidates"] == ("select-random", "select-rrhf")
    for name, prefix in (("renders", "render"), ("scores", "score")):
        assert nodes["evaluate"].inputs[name] == tuple(f"{prefix}-{n}" for n in names)
    assert nodes["part-rrhf-1"].inputs["candidates"] == ("select-rrhf",)
    assert nodes["render-rrhf-1"].inputs["candidates"] == ("part-rrhf-1",)
    assert pipeline.targets(nodes, "render-rrhf") == ("render-rrhf-0", "render-rrhf-1")


def test_every_selector_answers_the_same_prompts_with_its_own_agent() -> None:
    evaluation = {"selectors": ["random", "rrhf"], "num_prompts": 7, "seed": 5}
    nodes = pipeline.plan(make_config(evaluation=evaluation))
    configs = [nodes[f"select-{s}"].config.model_dump() for s in ("random", "rrhf")]
    assert [config.pop("selector") for config in configs] == ["random", "rrhf"]
    assert configs[0] == configs[1] and configs[0]["num_prompts"] == 7
    assert nodes["select-rrhf"].inputs["agent"] == ("rrhf",)
    assert "agent" not in nodes["select-random"].inputs


def test_targets_and_upstream() -> None:
    nodes = pipeline.plan(make_config(sampling={"num_shards": 2}))
    assert pipeline.targets(nodes, "render") == ("render-0", "render-1")
    assert pipeline.targets(nodes, "select-nearest") == ("select-nearest",)
    assert list(pipeline.upstream(nodes, ["shard"])) == ["crawl", "filter", "shard"]
    assert "sft" not in pipeline.upstream(nodes, ["score-popular"])
    assert "rrhf" not in pipeline.upstream(nodes, ["select-sft"])
    assert pipeline.upstream(nodes, nodes) == nodes
    with pytest.raises(ConfigError, match=r"'rendr'.*render-popular"):
        pipeline.targets(nodes, "rendr")


# The three light stages of the data set, small enough to run here.
site = {"text": "one"}
calls: list[str] = []


@stage("crawl", version=1, config=CrawlConfig)
def crawl(config: CrawlConfig, context: StageContext) -> StageResult:
    calls.append(f"crawl {context.site_url}")
    (context.out / "page").write_text(site["text"])
    return StageResult()


@stage("filter", version=1, config=FilterConfig)
def filter_records(config: FilterConfig, context: StageContext) -> StageResult:
    calls.append("filter")
    text = context.one("snapshot").file("page").read_text()
    (context.out / "kept").write_text(text.upper())
    return StageResult()


@stage("shard", version=1, config=DABenchConfig)
def build_dabench(config: DABenchConfig, context: StageContext) -> StageResult:
    calls.append("shard")
    text = context.one("filtered").file("kept").read_text()
    (context.out / "pairs").write_text(json.dumps([text, config.seed]))
    return StageResult()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    stages = {"crawl": crawl, "filter": filter_records, "shard": build_dabench}
    monkeypatch.setattr(pipeline, "load_stage", lambda node: stages[node.key])
    calls.clear()
    site["text"] = "one"
    return make_config(runtime={"store": str(tmp_path)})


def test_run_builds_once(small: RunConfig) -> None:
    hits: list[tuple[str, bool]] = []
    done = pipeline.run(small, "shard", on_done=lambda n, a, hit: hits.append((n.key, hit)))
    assert calls == ["crawl https://civitai.com", "filter", "shard"]
    assert done["shard"].file("pairs").read_text() == '["ONE", 0]'
    assert hits == [("crawl", False), ("filter", False), ("shard", False)]
    calls.clear()
    assert pipeline.run(small, "shard") == done
    assert calls == []


def test_refresh_rebuilds_only_what_has_changed(small: RunConfig) -> None:
    first = pipeline.run(small, "shard")
    calls.clear()
    hits: list[bool] = []
    pipeline.run(small, "shard", refresh=True, on_done=lambda n, a, hit: hits.append(hit))
    assert calls == ["crawl https://civitai.com"]
    assert hits == [True, True, True]
    site["text"] = "two"
    calls.clear()
    second = pipeline.run(small, "shard", refresh=True)
    assert calls[1:] == ["filter", "shard"]
    assert second["shard"].file("pairs").read_text() == '["TWO", 0]'
    assert first["shard"].path != second["shard"].path


def test_a_changed_section_rebuilds_from_there(small: RunConfig) -> None:
    pipeline.run(small, "shard")
    calls.clear()
    changed = small.model_copy(update={"dabench": DABenchConfig(seed=3)})
    pipeline.run(changed, "shard")
    assert calls == ["shard"]


def test_the_configuration_of_a_stage_is_in_the_folder_of_the_stage() -> None:
    judges = {"judges": [{"name": "pick_score", "model": "tiny"}]}
    for node in pipeline.plan(make_config(judges=judges, evaluation={"num_shards": 2})).values():
        stage, package = pipeline.load_stage(node), node.entry.rpartition(".")[0]
        assert type(node.config).__module__ == f"{package}.{stage.name}_config"


def test_the_architecture_page_names_every_stage() -> None:
    page = (Path(__file__).parents[1] / "docs" / "explanation" / "architecture.md").read_text(
        encoding="utf-8"
    )
    for node in pipeline.plan(make_config()).values():
        assert f"`{node.entry}`" in page
