"""Baselines, the agent behind the same interface, and the stage ``select``."""

from __future__ import annotations

from collections import Counter

import polars as pl
import pytest

from diffagent.agent.baselines import Nearest, Popular, Random, Usage
from diffagent.agent.llm_selector import LLM
from diffagent.agent.lm.format import response_text
from diffagent.agent.prompts import Pair
from diffagent.agent.select_config import SelectConfig
from diffagent.agent.select_stage import select
from diffagent.agent.selector import Selector, valid_apis
from diffagent.errors import ArtifactError, SchemaError
from diffagent.schemas.api import T2IAPI, Params, parse_api
from diffagent.store import Artifact
from tests.agent.agent_world import make_catalogue
from tests.conftest import AgentRun

CATALOGUE = make_catalogue()


def api(model: str, steps: int = 20, base_model: str = "SD 1.5") -> T2IAPI:
    params = Params(sampler="DDIM", steps=steps, cfg_scale=7, width=64, height=64)
    return T2IAPI(model=model, version="v1.0", base_model=base_model, params=params)


TRAIN = [
    Pair(1, "a red star at night", api("Inkline", 20)),
    Pair(2, "pencil sketch of a blue ring", api("Graphite", 30)),
    Pair(3, "a green heart, line art", api("Inkline", 25)),
    Pair(4, "a pink moon, line art", api("Inkline", 25)),
    Pair(5, "a pink 3d moon", api("Graphite", 20)),
]


def test_popular_is_the_most_used_checkpoint_as_it_is_mostly_called() -> None:
    [choices, others] = Popular(Usage(TRAIN, CATALOGUE)).select(["x", "y"], n=3)
    assert [choice.text for choice in choices] == [
        response_text(api("Inkline", 25)),
        response_text(api("Graphite", 20)),  # 20 and 30 steps are equally frequent
    ]
    assert [choice.probability for choice in choices] == [0.6, 0.4]
    assert choices == others
    assert choices[0].verdict.api is not None


def test_random_is_uniform_valid_and_depends_on_seed_and_prompt_alone() -> None:
    selector = Random(Usage(TRAIN, CATALOGUE))
    prompts = [f"prompt {i}" for i in range(600)]
    choices = [found[0] for found in selector.select(prompts)]
    assert all(choice.verdict.status == "valid" for choice in choices)
    counts = Counter((c.verdict.api.model, c.verdict.api.version) for c in choices if c.verdict.api)
    assert set(counts) == {(e.model, e.version) for e in CATALOGUE.checkpoints}
    assert max(counts.values()) < 2 * min(counts.values())
    assert selector.select(prompts[7:8])[0] == [choices[7]]
    other = Random(Usage(TRAIN, CATALOGUE), seed=1).select(prompts)
    assert [found[0].text for found in other] != [choice.text for choice in choices]
    assert len({choice.text for choice in selector.select(["x"], n=5)[0]}) == 5


def test_an_unused_checkpoint_gets_the_parameters_of_its_base_model() -> None:
    usage = Usage([*TRAIN, Pair(6, "wide", api("Wide Base", 99, "SDXL 1.0"))], CATALOGUE)
    entry = CATALOGUE.checkpoint("Flatland", "v2.0")
    assert entry is not None
    call = parse_api(usage.call(entry))
    assert (call.model, call.version, call.params.steps) == ("Flatland", "v2.0", 20)
    wide = CATALOGUE.checkpoint("Wide Base", "v1.0")
    assert wide is not None
    assert parse_api(usage.call(wide)).params.steps == 99


def test_nearest_copies_the_most_similar_prompts_api() -> None:
    selector = Nearest(TRAIN, CATALOGUE)
    found = selector.select(
        ["blue ring, PENCIL sketch", "3d", "unseen words only", "line art"], n=2
    )
    firsts = [choices[0].text for choices in found]
    assert firsts[0] == TRAIN[1].api.to_json()
    assert firsts[1] == TRAIN[4].api.to_json()
    assert firsts[2] == TRAIN[0].api.to_json()  # nothing is similar: the lowest id
    assert all(len({choice.text for choice in choices}) == 2 for choices in found)


def choose(agent_run: AgentRun, name: Selector, **settings: int) -> Artifact:
    inputs = {"dabench": [agent_run.dabench]}
    if name in ("sft", "reranked"):
        inputs["agent"] = [agent_run.agent]
    config = SelectConfig(selector=name, num_prompts=6, max_new_tokens=96, **settings)
    return select.run(config, inputs, agent_run.runtime)


@pytest.mark.parametrize("name", ["popular", "random", "nearest", "sft", "reranked"])
def test_the_stage_writes_one_valid_answer_a_prompt(agent_run: AgentRun, name: Selector) -> None:
    artifact = choose(agent_run, name)
    rows = pl.read_parquet(artifact.file("candidates.parquet"))
    assert len(rows) == rows["prompt_id"].n_unique() == 6
    assert set(rows["source"]) == {name}
    assert set(rows["status"]) == {"valid"}
    assert artifact.manifest.metrics["outcomes"] == {"valid": 6}
    latency = artifact.manifest.metrics["latency_seconds"]
    assert 0 < latency["p50"] <= latency["p95"]


def test_all_selectors_answer_the_same_prompts(agent_run: AgentRun) -> None:
    asked = [
        pl.read_parquet(choose(agent_run, name).file("candidates.parquet"))["prompt"].to_list()
        for name in ("popular", "nearest")
    ]
    assert asked[0] == asked[1]


def test_an_agent_gives_probabilities_best_first(agent_run: AgentRun) -> None:
    from diffagent.agent.lm.llm import load_agent

    agent = load_agent(agent_run.agent.path, "cpu")
    selector = LLM(agent, max_new_tokens=96, constrained=False)
    [choices] = selector.select(["a red star, flat design"], n=4)
    probabilities = [choice.probability or 0 for choice in choices]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1
    assert len({choice.text for choice in choices}) == len(choices) > 1


def test_an_agent_answers_or_says_why_not(
    agent_run: AgentRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffagent.agent.lm.llm import load_agent

    agent = load_agent(agent_run.agent.path, "cpu")
    calls = valid_apis(LLM(agent), "a red star, flat design", 3)
    assert len({(call.model, call.version) for call in calls}) == 3
    assert all(call.air is not None for call in calls)
    free = valid_apis(LLM(agent, negative_prompts="free"), "a red star, flat design")
    assert free[0].model == calls[0].model
    monkeypatch.setattr("diffagent.agent.verify.parse_api", lambda text: api("Nobody's Mix"))
    with pytest.raises(SchemaError, match=r"unknown_model: model: \"Nobody's Mix\""):
        valid_apis(LLM(agent, constrained=False), "a red star")


def test_a_trained_agent_answers_alike_in_int8_and_constrained(agent_run: AgentRun) -> None:
    from diffagent.agent.lm.llm import load_agent

    prompts = ["a red star on white, flat design", "pencil sketch of a blue ring"]
    agent = load_agent(agent_run.agent.path, "cpu")
    greedy = [found[0].text for found in agent.generate(prompts)]
    assert [found[0].text for found in agent.generate(prompts, constrained=True)] == greedy
    small = load_agent(agent_run.agent.path, "cpu", "int8")
    assert all(c[0].verdict.api for c in LLM(small).select(prompts))


def test_an_agent_selector_needs_an_agent(agent_run: AgentRun) -> None:
    config = SelectConfig(selector="sft", num_prompts=1)
    with pytest.raises(ArtifactError, match="'agent'"):
        select.run(config, {"dabench": [agent_run.dabench]}, agent_run.runtime)
