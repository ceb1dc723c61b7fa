"""The stage ``sample``: shards, duplicates, verdicts, determinism."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from diffagent.agent.decoding.strategies import Decoding, DiverseBeams, TopP
from diffagent.agent.lm.format import encode_prompt, response_text
from diffagent.agent.lm.llm import Agent, Completion, load_agent
from diffagent.agent.prompts import Pair, draw, read_split
from diffagent.agent.sample_config import SampleShard, SamplingConfig
from diffagent.agent.sample_stage import VLLM, distinct, sample
from diffagent.errors import ArtifactError, ConfigError
from diffagent.schemas.api import parse_api
from diffagent.schemas.tables import CANDIDATES
from diffagent.store import Artifact
from tests.agent.agent_world import make_catalogue, make_rows, make_world
from tests.conftest import AgentRun

SETTINGS = {"num_prompts": 7, "num_shards": 2, "num_candidates": 3, "max_new_tokens": 96}


def run(agent_run: AgentRun, shard: int, **changes: object) -> Artifact:
    config = SampleShard.model_validate({**SETTINGS, **changes, "shard": shard})
    inputs = {"dabench": [agent_run.dabench], "agent": [agent_run.agent]}
    return sample.run(config, inputs, agent_run.runtime)


@pytest.fixture(scope="module")
def shards(agent_run: AgentRun) -> list[Artifact]:
    return [run(agent_run, shard) for shard in range(2)]


def table(artifact: Artifact) -> pl.DataFrame:
    return pl.read_parquet(artifact.file("candidates.parquet"))


def test_shards_share_out_the_drawn_prompts(agent_run: AgentRun, shards: list[Artifact]) -> None:
    ids = [set(table(artifact)["prompt_id"]) for artifact in shards]
    assert [len(part) for part in ids] == [4, 3]
    drawn = draw(read_split(agent_run.dabench.path, "train"), 7, seed=0)
    assert ids[0] | ids[1] == {pair.id for pair in drawn}


def test_rows_have_the_schema_the_order_and_no_duplicates(shards: list[Artifact]) -> None:
    for artifact in shards:
        assert pq.read_schema(artifact.file("candidates.parquet")).equals(CANDIDATES)
        rows = table(artifact)
        assert rows.equals(rows.sort("prompt_id", "source", "candidate"))
        assert rows.select("prompt_id", "text").is_unique().all()
        assert rows["logprob"].is_not_null().all()
        assert (rows["logprob"] < 0).all()
        metrics = artifact.manifest.metrics
        assert metrics["sampled"] == 3 * metrics["prompts"]
        assert metrics["sampled"] - metrics["duplicates"] + metrics["prompts"] == len(rows)


def test_every_prompt_has_its_dabench_api(agent_run: AgentRun, shards: list[Artifact]) -> None:
    pairs = {pair.id: pair for pair in read_split(agent_run.dabench.path, "train")}
    own = table(shards[0]).filter(pl.col("source") == "dabench")
    assert own["prompt_id"].to_list() == sorted(set(table(shards[0])["prompt_id"]))
    assert set(own["status"]) == {"valid"}
    for ident, text, api in own.select("prompt_id", "text", "api").iter_rows():
        assert text == response_text(pairs[ident].api)
        assert parse_api(api).response().to_json() == text
        assert parse_api(api).air is not None


def test_the_same_request_gives_the_same_bytes(agent_run: AgentRun, shards: list[Artifact]) -> None:
    # Another batch composition: the draws of a prompt do not depend on it.
    again = run(agent_run, 0, batch_size=3)
    assert again.path != shards[0].path
    assert table(again).drop("logprob").equals(table(shards[0]).drop("logprob"))
    assert run(agent_run, 0, seed=1).content_digest != shards[0].content_digest


def test_diverse_beams_are_an_option(agent_run: AgentRun) -> None:
    artifact = run(agent_run, 1, num_beam_groups=3)
    assert table(artifact).filter(pl.col("source") == "sft")["prompt_id"].n_unique() > 0


def test_answers_that_are_cut_are_counted_apart(agent_run: AgentRun) -> None:
    artifact = run(agent_run, 1, max_new_tokens=20)
    outcomes = artifact.manifest.metrics["outcomes"]
    assert set(outcomes) == {"truncated", "valid"}  # those of the dataset are whole
    rows = table(artifact).filter(source="sft")
    assert set(rows["reason"]) == {"truncated"} and rows["api"].null_count() == rows.height
    room = run(agent_run, 1, max_new_tokens=None).manifest.metrics["outcomes"]
    assert "truncated" not in room


def test_constrained_candidates_are_all_valid(agent_run: AgentRun) -> None:
    changes = {"temperature": 3.0, "top_p": 1.0, "max_new_tokens": 256}
    found = {
        decoding: set(table(run(agent_run, 1, decoding=decoding, **changes))["status"])
        for decoding in ("constrained", "unconstrained")
    }
    assert found["constrained"] == {"valid"} < found["unconstrained"]


@pytest.mark.parametrize("decoding", [TopP(3, 1.5, 0.95, seed=1), DiverseBeams(3, 1.0)])
def test_a_prompt_is_read_once_for_all_its_candidates(
    agent_run: AgentRun, monkeypatch: pytest.MonkeyPatch, decoding: Decoding
) -> None:
    agent = load_agent(agent_run.agent.path, "cpu")
    prompts = ["a red star", "a pixel art drawing of two blue circles on a green field", "x"]
    embed, sizes = agent.model.get_input_embeddings(), []
    hook = embed.register_forward_hook(lambda module, inputs, out: sizes.append(inputs[0].shape))
    once = agent.generate(prompts, decoding=decoding, max_new_tokens=96)
    hook.remove()
    assert [tuple(size) for size in sizes[1:]] == [(9, 1)] * (len(sizes) - 1)
    assert sizes[0][0] == 3
    monkeypatch.setattr(Agent, "_read_once", lambda *args: None)
    assert agent.generate(prompts, decoding=decoding, max_new_tokens=96) == once


def test_vllm_is_asked_for_what_the_agent_would_do(
    agent_run: AgentRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in for vLLM that notes its calls: no GPU is needed, and nothing is proved."""
    agent = load_agent(agent_run.agent.path, "cpu")
    eos, calls = agent.tokenizer.eos_token_id, []
    answer = [*agent.tokenizer('{"model":"x"}')["input_ids"], eos]

    class LLM:
        def __init__(self, model: str, **options: object) -> None:
            calls.append((model, options))

        def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            calls.append((prompts, params))
            found = [SimpleNamespace(token_ids=answer), SimpleNamespace(token_ids=answer[:-1])]
            return [SimpleNamespace(outputs=found) for _ in prompts]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    engine = VLLM(agent, agent_run.agent.path)
    settings = {"max_new_tokens": 9, "batch_size": 1}
    found = engine.generate(["a star", "a box"], decoding=TopP(2, 0.8, 0.9, 3), **settings)
    assert found == [[Completion('{"model":"x"}', True), Completion('{"model":"x"}', False)]] * 2
    options = {"enable_prefix_caching": True, "trust_remote_code": False}
    assert calls[0] == (str(agent_run.agent.path), options)
    prompts, params = calls[1]
    template = agent.info.prompt_template
    for prompt, given in zip(["a star", "a box"], prompts, strict=True):
        assert given == {
            "prompt_token_ids": encode_prompt(agent.tokenizer, prompt, 99, template)[0]
        }
    assert params[0] | {"seed": 0} == {
        "n": 2,
        "temperature": 0.8,
        "top_p": 0.9,
        "max_tokens": 9,
        "seed": 0,
        "stop_token_ids": [eos],
        "detokenize": False,
    }
    assert params[0]["seed"] != params[1]["seed"]
    with pytest.raises(ConfigError, match="does not do DiverseBeams"):
        engine.generate(["a star"], decoding=DiverseBeams(2), **settings)
    with pytest.raises(ValidationError, match="no diverse beam search"):
        SamplingConfig(engine="vllm", num_candidates=4, num_beam_groups=4)


def test_without_vllm_the_message_names_the_extra(
    agent_run: AgentRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"diffagent\[vllm\]"):
        run(agent_run, 0, engine="vllm")


def test_equal_apis_are_one_candidate_however_they_are_spelt() -> None:
    row = make_rows(1, seed=9)[0]
    pair = Pair(1, "a star", parse_api(str(row["api"])))
    own = response_text(pair.api)
    other = own.replace('"clip_skip":1', '"clip_skip":2')
    texts = [own, own.replace(":", ": "), other, other + " ", "junk", "junk", "junk "]
    found = distinct(pair, [Completion(text, True) for text in texts], make_catalogue())
    assert [(a.source, a.candidate, a.text) for a in found] == [
        ("dabench", 0, own),
        ("sft", 0, other),
        ("sft", 1, "junk"),
        ("sft", 2, "junk "),
    ]


def test_drawing_more_prompts_keeps_the_others(agent_run: AgentRun) -> None:
    pairs = read_split(agent_run.dabench.path, "train")
    assert draw(pairs, 5, seed=2) == draw(pairs[::-1], 9, seed=2)[:5]
    assert draw(pairs, 5, seed=3) != draw(pairs, 5, seed=2)
    assert len(draw(pairs, 10**6, seed=0)) == len(pairs)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    dabench = make_world(tmp_path, train=4, test=2)
    with pytest.raises(ArtifactError, match="validation split"):
        read_split(dabench.path, "validation")
