"""Human ratings as ranked responses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffagent.agent.lm.llm import load_agent
from diffagent.errors import SchemaError
from diffagent.train.ratings import read_ratings, response
from diffagent.train.ratings_config import RatingsConfig
from diffagent.train.ratings_stage import import_ratings
from diffagent.train.rrhf import rank
from diffagent.train.rrhf_config import RRHFConfig
from diffagent.train.rrhf_stage import train_rrhf
from tests.conftest import AgentRun

MODELS = ("Alpha", "Beta", "Gamma")
SUBJECTS = ("a fox", "a red barn", "two chairs", "a cup of tea", "the sea", "an old map")


def write(path: Path) -> RatingsConfig:
    """Beta is rated best, Gamma worst; one tie."""
    ratings = {"Alpha": [3, 3, 3], "Beta": [5, 4, 5], "Gamma": [1, 2, 1]}
    rows = {f"{i:05}": {"prompt": s, "models": dict(ratings)} for i, s in enumerate(SUBJECTS)}
    rows["00000"]["models"] = ratings | {"Alpha": [5, 5, 4]}
    path.write_text(json.dumps(rows))
    return RatingsConfig(path=str(path))


def test_ratings_are_ranked_candidates(agent_run: AgentRun, tmp_path: Path) -> None:
    artifact = import_ratings.run(write(tmp_path / "ratings.json"), {}, agent_run.runtime)
    ranked = rank([artifact], [artifact])
    assert ranked["prompt"].to_list()[:6] == ["a fox"] * 3 + ["a red barn"] * 3
    assert ranked["text"].to_list()[:3] == [response(model) for model in MODELS]
    assert ranked["text"][0] == '{"model":"Alpha"}'
    rewards = ranked["reward"].to_list()
    assert rewards[:3] == pytest.approx([14 / 3, 14 / 3, 4 / 3])
    assert rewards[3:6] == pytest.approx([3, 14 / 3, 4 / 3])


def test_an_agent_learns_what_people_prefer(agent_run: AgentRun, tmp_path: Path) -> None:
    artifact = import_ratings.run(write(tmp_path / "ratings.json"), {}, agent_run.runtime)
    inputs = {
        "dabench": [agent_run.dabench],
        "agent": [agent_run.agent],
        "candidates": [artifact],
        "scores": [artifact],
    }
    config = RRHFConfig(max_steps=30, learning_rate=2e-3, per_device_train_batch_size=6)
    aligned = train_rrhf.run(config, inputs, agent_run.runtime)
    agent = load_agent(aligned.path, "cpu")
    unseen = "a small house"
    logps = agent.logprobs([unseen] * 3, [response(model) for model in MODELS])
    means = torch.tensor([found.mean for found in logps if found])
    assert means.argsort(descending=True).tolist() == [1, 0, 2]


@pytest.mark.parametrize("text", ["", "[]", '{"1": {"prompt": "a"}}', "{}", "nothing.json"])
def test_what_is_no_ratings_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ratings.json"
    if text != "nothing.json":
        path.write_text(text)
    with pytest.raises(SchemaError, match=r"ratings\.json"):
        read_ratings(path)
