"""The stage ``rrhf``: ranking, collating, the trainer, and a toy world where it pays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import BaseModel
from transformers import TrainingArguments

from diffagent.agent.candidates import Answer, write_candidates
from diffagent.agent.lm.format import Example, response_text
from diffagent.agent.lm.llm import Agent, load_agent
from diffagent.agent.prompts import Pair, read_split
from diffagent.agent.verify import verify
from diffagent.errors import ArtifactError, TrainingError
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import SCORES
from diffagent.store import Artifact, StageContext, StageResult, stage
from diffagent.train import fit
from diffagent.train.collate import RankedPrompt, RRHFCollator
from diffagent.train.losses import INVALID_REWARD
from diffagent.train.passes import response_logps
from diffagent.train.rrhf import (
    RankedPrompts,
    RRHFTrainer,
    encode_ranked,
    rank,
)
from diffagent.train.rrhf_config import RRHFConfig
from diffagent.train.rrhf_stage import train_rrhf
from tests.agent.agent_world import make_catalogue
from tests.conftest import AgentRun
from tests.train.test_sft import Killed, kill_at, state

CATALOGUE = make_catalogue()
FAVOURITE = "Crayon Dream"


class ToyConfig(BaseModel):
    """How many prompts have candidates."""

    prompts: int = 64


def answers(pair: Pair) -> list[Answer]:
    """The DABench API, the same with the favourite model and another one, and junk."""
    texts = [("dabench", response_text(pair.api))]
    for model in (FAVOURITE, "Toybox Mix"):
        if model != pair.api.model:
            other = pair.api.model_copy(update={"model": model, "version": "v1.0"})
            texts.append(("sft", response_text(other)))
    texts.append(("sft", '{"model":"Nobody'))
    return [
        Answer(pair, source, number, text, verify(text, CATALOGUE))
        for number, (source, text) in enumerate(texts)
    ]


@stage("sample", version=1, config=ToyConfig)
def toy_candidates(config: ToyConfig, context: StageContext) -> StageResult:
    pairs = read_split(context.one("dabench").path, "train")[: config.prompts]
    rows = [answer.row(None) for pair in pairs for answer in answers(pair)]
    write_candidates(rows, context.out)
    return StageResult()


@stage("score", version=1, config=ToyConfig)
def toy_scores(config: ToyConfig, context: StageContext) -> StageResult:
    """The favourite model is worth 1, everything else valid 0; two seeds a candidate."""
    rows = []
    for row in pl.read_parquet(context.one("candidates").file("candidates.parquet")).to_dicts():
        valid = row["status"] == "valid"
        reward = float(valid and json.loads(row["text"])["model"] == FAVOURITE)
        rows += [
            {name: row.get(name) for name in SCORES.names}
            | {"seed": seed, "unified": reward if valid else -10.0}
            | {"status": "ok" if valid else "invalid"}
            for seed in range(2)
        ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCORES), context.out / "scores.parquet")
    return StageResult()


def toy_inputs(agent_run: AgentRun, prompts: int) -> dict[str, list[Artifact]]:
    config, runtime, dabench = ToyConfig(prompts=prompts), agent_run.runtime, [agent_run.dabench]
    candidates = toy_candidates.run(config, {"dabench": dabench}, runtime)
    scores = toy_scores.run(config, {"candidates": [candidates]}, runtime)
    return {
        "dabench": dabench,
        "agent": [agent_run.agent],
        "candidates": [candidates],
        "scores": [scores],
    }


def favourite_share(agent: Agent, prompts: list[str]) -> tuple[float, float]:
    """Share of greedy answers that name the favourite model, and share that is valid."""
    texts = [found[0].text for found in agent.generate(prompts, max_new_tokens=96)]
    calls = [verdict.api for text in texts if (verdict := verify(text, CATALOGUE)).api]
    return sum(c.model == FAVOURITE for c in calls if c) / len(texts), len(calls) / len(texts)


TINY = RRHFConfig(
    max_steps=6, per_device_train_batch_size=2, learning_rate=1e-3, save_steps=2, max_length=192
)


def test_rrhf_raises_the_reward_of_what_is_chosen(agent_run: AgentRun) -> None:
    config = TINY.model_copy(
        update={"max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 2e-3}
    )
    aligned = train_rrhf.run(config, toy_inputs(agent_run, 64), agent_run.runtime)
    prompts = [pair.prompt for pair in read_split(agent_run.dabench.path, "test")]
    before, _ = favourite_share(load_agent(agent_run.agent.path, "cpu"), prompts)
    after, valid = favourite_share(load_agent(aligned.path, "cpu"), prompts)
    assert before < 0.3
    assert after > 0.8
    assert valid > 0.9
    metrics = aligned.manifest.metrics
    assert metrics["candidates"] == sum(len(answers(p)) for p in _train(agent_run, 64))
    assert metrics["invalid"] == 64
    info = json.loads((aligned.path / "agent.json").read_text())
    assert info["trained_by"] == ["sft", "rrhf"]
    old, new = state(agent_run.agent), state(aligned)
    assert [name for name in old if torch.equal(old[name], new[name])] == []


def _train(agent_run: AgentRun, count: int) -> list[Pair]:
    return read_split(agent_run.dabench.path, "train")[:count]


def test_a_killed_run_continues_as_if_undisturbed(
    agent_run: AgentRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = toy_inputs(agent_run, 8)

    def run(store: str) -> Artifact:
        runtime = RuntimeConfig(store=str(tmp_path / store), device="cpu")
        return train_rrhf.run(TINY, inputs, runtime)

    undisturbed = run("undisturbed")
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run("killed")
    resumed = run("killed")
    assert resumed.manifest.metrics["resumed_at_step"] == 4
    assert resumed.content_digest == undisturbed.content_digest


def example(*response: int, prompt: int = 2) -> Example:
    return Example([1] * prompt + list(response), [-100] * prompt + list(response))


def test_the_collator_keeps_rows_rewards_and_masks_together() -> None:
    prompts = [
        RankedPrompt((example(5, 6, 7), example(8, prompt=1)), (0.5, INVALID_REWARD)),
        RankedPrompt((example(9),), (2.0,)),
    ]
    batch = RRHFCollator(pad_token_id=0, packed=False)(prompts)
    assert batch["input_ids"].tolist() == [[1, 1, 5, 6, 7], [1, 8, 0, 0, 0], [1, 1, 9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch["labels"][1].tolist() == [-100, 8, -100, -100, -100]
    assert batch["rewards"].tolist() == [[0.5, INVALID_REWARD], [2.0, 0.0]]
    assert batch["mask"].tolist() == [[True, True], [True, False]]


def encoded(agent_run: AgentRun, agent: Agent, count: int) -> list[RankedPrompt]:
    inputs = toy_inputs(agent_run, count)
    ranked = rank(inputs["candidates"], inputs["scores"])
    return encode_ranked(agent.tokenizer, ranked, 192, agent.info.prompt_template)[0]


@pytest.mark.parametrize("loss", ["rrhf", "dpo", "simpo", "gspo"])
def test_every_loss_trains_on_the_same_ranked_data(
    agent_run: AgentRun, tmp_path: Path, loss: str
) -> None:
    """After some steps the favourite model's answer is ahead of the others by more."""
    agent = load_agent(agent_run.agent.path, "cpu")
    prompts = encoded(agent_run, agent, 12)
    config = RRHFConfig.model_validate(
        {"loss": loss, "pairs": "mean", "sft_weight": 0, "learning_rate": 2e-4, "max_steps": 12}
    )
    device = torch.device("cpu")
    trainer = RRHFTrainer(
        agent.model,
        TrainingArguments(**fit.training_arguments(config, tmp_path, device)),
        config,
        RankedPrompts(prompts),
        agent.tokenizer,
    )
    assert trainer.packed
    compared = loss in ("dpo", "gspo")
    assert all(bool(p.reference_logps) == compared for p in trainer.train_dataset.prompts)

    def lead() -> float:
        with torch.no_grad():
            batch = RRHFCollator(agent.tokenizer.pad_token_id)(prompts)
            logps, lengths = response_logps(agent.model.eval(), batch)
        mean = logps / lengths.clamp(min=1)
        best = batch["rewards"].masked_fill(~batch["mask"], INVALID_REWARD).argmax(1, keepdim=True)
        others = batch["mask"].scatter(1, best, False)
        return float((mean.gather(1, best) - mean)[others].mean())

    before = lead()
    fit.fit(trainer)
    assert lead() > before + 0.01


def test_prompts_a_step_and_accumulation_give_the_same_update(
    agent_run: AgentRun, tmp_path: Path
) -> None:
    weights = []
    for batch_size in (4, 1):
        agent = load_agent(agent_run.agent.path, "cpu")
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        ranked = RankedPrompts(encoded(agent_run, agent, 4))
        before = {k: v.clone() for k, v in agent.model.state_dict().items()}
        RRHFTrainer(agent.model, args, RRHFConfig(), ranked, agent.tokenizer).train()
        weights.append({k: v - before[k] for k, v in agent.model.state_dict().items()})
    for name, update in weights[0].items():
        assert torch.allclose(update, weights[1][name], atol=2e-5, rtol=1e-3), name
    assert any(update.abs().max() > 1e-3 for update in weights[0].values())


@stage("two-answers", version=1, config=ToyConfig)
def two_answers(config: ToyConfig, context: StageContext) -> StageResult:
    pairs = read_split(context.one("dabench").path, "train")[: config.prompts]
    write_candidates([a.row(None) for pair in pairs for a in answers(pair)[:2]], context.out)
    return StageResult()


class Table(BaseModel):
    """Rows of a scores table."""

    rows: list[dict[str, Any]]


@stage("score", version=1, config=Table)
def given_scores(config: Table, context: StageContext) -> StageResult:
    table = pa.Table.from_pylist(config.rows, schema=SCORES)
    pq.write_table(table, context.out / "scores.parquet")
    return StageResult()


def score(prompt_id: int, source: str, number: int, *unified: float | None) -> list[dict[str, Any]]:
    base = dict.fromkeys(SCORES.names) | {"prompt_id": prompt_id, "source": source}
    return [
        base
        | {"candidate": number, "seed": seed, "unified": value}
        | {"status": "failed" if value is None else "ok"}
        for seed, value in enumerate(unified)
    ]


def test_rewards_are_means_over_rendered_seeds_and_failures_are_left_out(
    agent_run: AgentRun,
) -> None:
    first, second, third = (pair.id for pair in _train(agent_run, 3))
    candidates = two_answers.run(
        ToyConfig(prompts=3), {"dabench": [agent_run.dabench]}, agent_run.runtime
    )
    rows = [
        *score(first, "dabench", 0, 1.0, 3.0),
        *score(first, "sft", 1, None, 0.5),
        *score(second, "dabench", 0, 4.0, 4.0),
        *score(second, "sft", 1, None, None),
        *score(third, "dabench", 0, None, None),
        *score(third, "sft", 1, None, None),
    ]
    scores = given_scores.run(Table(rows=rows), {}, agent_run.runtime)
    ranked = rank([candidates], [scores])
    assert ranked["reward"].to_list() == [2.0, 0.5, 4.0, None, None, None]

    agent = load_agent(agent_run.agent.path, "cpu")
    template = agent.info.prompt_template
    prompts, counts = encode_ranked(agent.tokenizer, ranked, 192, template)
    assert [prompt.rewards for prompt in prompts] == [(2.0, 0.5), (4.0,)]
    assert (counts["render_failed"], counts["prompts_dropped"], counts["pairs"]) == (3, 1, 1)
    with pytest.raises(TrainingError, match="no prompt has a valid"):
        encode_ranked(agent.tokenizer, ranked, 33, template)

    strangers = given_scores.run(Table(rows=rows[2:]), {}, agent_run.runtime)
    with pytest.raises(ArtifactError, match="1 candidates have no score"):
        rank([candidates], [strangers])
