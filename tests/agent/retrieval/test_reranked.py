"""Candidates by retrieval, choice by the agent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffagent.agent.decoding.grammar import name_text
from diffagent.agent.decoding.trie import encode_texts
from diffagent.agent.lm.llm import Agent, load_agent
from diffagent.agent.opening import open_selector
from diffagent.agent.retrieval.rerank_config import RerankConfig
from diffagent.agent.retrieval.rerank_stage import fit_reranker, reranked_selector
from diffagent.agent.retrieval.reranked import Reranked, name_logprobs
from diffagent.agent.selector import Choice
from diffagent.errors import ArtifactError, ConfigError
from tests.agent.agent_world import NAMES, make_world
from tests.conftest import AgentRun

PROMPTS = ["a red star on white, flat design", "pencil sketch of a blue ring", "", "\x00 日本"]
CONFIG = RerankConfig(retrieval="neighbours", candidates=5)


@pytest.fixture(scope="module")
def reranked(agent_run: AgentRun) -> Reranked:
    return reranked_selector(CONFIG, agent_run.dabench, agent_run.agent, agent_run.runtime)


def one_by_one(agent: Agent, prompt: str, names: list[tuple[str, str]]) -> list[float]:
    """Whole sequences through the model, what the names share subtracted."""
    ids = encode_texts(agent.tokenizer, [name_text(*name) for name in names])
    shared = next(i for i in range(99) if len({row[i] for row in ids}) > 1)
    [before] = agent.encode([prompt], 64)
    sums = []
    for row in ids:
        with torch.inference_mode():
            logprobs = agent.model(torch.tensor([before + row])).logits[0].log_softmax(-1)
        places = range(len(before) + shared, len(before) + len(row))
        sums.append(sum(float(logprobs[i - 1, row[i - len(before)]]) for i in places))
    return sums


def test_names_are_as_likely_as_one_by_one(agent_run: AgentRun) -> None:
    agent = load_agent(agent_run.agent.path, "cpu")
    every = [(name, "v1.0") for name in NAMES.values()]
    asked = [every, every[:2], every[2:], [*every, ("Flatland", "v2.0")]]
    found = name_logprobs(agent, PROMPTS, asked)
    for prompt, own, said in zip(PROMPTS, asked, found, strict=True):
        # What is left out at the start differs with the names of the batch, by one constant each.
        alone = np.array(one_by_one(agent, prompt, own))
        np.testing.assert_allclose(said - np.max(said), alone - alone.max(), atol=1e-4)
    [[single]] = name_logprobs(agent, PROMPTS[:1], [every[:1]])
    assert single <= 0


def names(choices: list[Choice]) -> list[str]:
    return [choice.verdict.api.model for choice in choices if choice.verdict.api]


def test_the_weights_decide_who_chooses(reranked: Reranked) -> None:
    retrieved = reranked.retrieval.select(PROMPTS, 5)
    as_retrieved = replace(reranked, weights=(1.0, 0.0)).select(PROMPTS, 5)
    assert [names(found) for found in as_retrieved] == [names(found) for found in retrieved]
    for before, after in zip(retrieved, as_retrieved, strict=True):
        np.testing.assert_allclose(
            [c.probability or 0 for c in after], [c.probability or 0 for c in before], rtol=1e-5
        )
    by_agent = replace(reranked, weights=(0.0, 1.0)).select(PROMPTS, 5)
    for prompt, own, found in zip(PROMPTS, retrieved, by_agent, strict=True):
        asked = [(name, "v1.0") for name in names(own)]
        [said] = name_logprobs(reranked.agent, [prompt], [asked])
        order = sorted(range(len(asked)), key=lambda i: -said[i])
        assert names(found) == [asked[i][0] for i in order]


def test_choices_are_valid_and_share_what_retrieval_gave_them(reranked: Reranked) -> None:
    for n in (1, 5, 8):
        for prompt, found in zip(PROMPTS, reranked.select(PROMPTS, n), strict=True):
            assert len(set(names(found))) == n
            chances = [choice.probability or 0 for choice in found]
            assert chances == sorted(chances, reverse=True)
            [proposed] = reranked.retrieval.select([prompt], max(n, 5))
            whole = sum(choice.probability or 0 for choice in proposed)
            assert sum(chances) <= whole + 1e-6
            if n >= 5:
                assert sum(chances) == pytest.approx(whole)


def test_weights_are_fitted_once_and_give_both_a_say(
    agent_run: AgentRun, reranked: Reranked
) -> None:
    inputs = {"dabench": [agent_run.dabench], "agent": [agent_run.agent]}
    manifest = fit_reranker.run(CONFIG, inputs, agent_run.runtime).manifest
    assert manifest.rows["validation"] == 40
    assert 20 < manifest.rows["used"] <= 40
    assert reranked.weights == (manifest.metrics["retrieval"], manifest.metrics["agent"])
    assert reranked.weights[1] > 0
    again = open_selector(
        agent_run.agent.path, agent_run.dabench.path, "neighbours",
        encoder="", store=agent_run.runtime.store, device="cpu",
    )  # fmt: skip
    assert isinstance(again, Reranked)
    assert again.candidates == 20
    with pytest.raises(ConfigError, match="leave out --dabench"):
        open_selector(
            agent_run.agent.path, agent_run.dabench.path, "neighbours",
            encoder="", store=agent_run.runtime.store, device="cpu", constrained=False,
        )  # fmt: skip


def test_an_agent_of_another_catalogue_is_refused(agent_run: AgentRun, tmp_path: Path) -> None:
    dabench = make_world(tmp_path, train=30, validation=10)
    other = load_agent(agent_run.agent.path, "cpu").catalogue.entries[1:]
    import pyarrow.parquet as pq

    from diffagent.t2i.catalogue import Catalogue

    pq.write_table(Catalogue(other).to_table(), dabench.path / "catalogue.parquet")
    with pytest.raises(ArtifactError, match="another catalogue"):
        reranked_selector(CONFIG, dabench, agent_run.agent, agent_run.runtime)
