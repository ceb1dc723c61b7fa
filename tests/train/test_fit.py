"""A run of training: its measurements, checkpoints, logs and reports, and its device."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from diffagent.agent.lm.format import response_text
from diffagent.agent.lm.llm import load_agent
from diffagent.agent.prompts import draw, read_split
from diffagent.errors import ConfigError, TrainingError
from diffagent.run_config import load_config
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact
from diffagent.train import fit, sft
from diffagent.train.losses import INVALID_REWARD
from diffagent.train.rrhf import RankedPrompts, RRHFTrainer, hold_out, rank
from diffagent.train.rrhf_config import RRHFConfig
from diffagent.train.rrhf_stage import train_rrhf
from diffagent.train.sft_config import SFTConfig
from diffagent.train.sft_stage import train_sft
from tests.agent.agent_world import make_world
from tests.conftest import AgentRun
from tests.train.test_rrhf import TINY as TINY_RRHF
from tests.train.test_rrhf import encoded, toy_inputs
from tests.train.test_sft import TINY, Killed, kill_at, state


def world(store: Path) -> Artifact:
    return make_world(store, train=24, test=4, validation=6)


def train(config: SFTConfig, store: Path, **runtime: Any) -> Artifact:
    settings = RuntimeConfig(store=str(store), device="cpu", **runtime)
    return train_sft.run(config, {"dabench": [world(store)]}, settings)


def rows(artifact: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in artifact.file("training_log.jsonl").open()]


#: It overfits: the lowest loss on validation is not the last.
OVERFIT = TINY.model_copy(
    update={
        "eval_steps": 15,
        "max_steps": 70,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
    }
)
MEASURED = [15, 30, 45, 60, 70]


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return train(OVERFIT, tmp_path_factory.mktemp("best"))


def test_the_checkpoint_with_the_lowest_validation_loss_is_kept(best: Artifact) -> None:
    losses = {int(row["step"]): row["eval_loss"] for row in rows(best) if "eval_loss" in row}
    assert list(losses) == MEASURED  # the last step is measured too
    kept = min(losses, key=lambda step: losses[step])
    assert kept < 70
    metrics = best.manifest.metrics
    assert (metrics["kept_step"], metrics["steps"]) == (kept, 70)
    assert metrics["best_eval_loss"] == losses[kept] < metrics["eval_loss"] == losses[70]
    agent = load_agent(best.path, "cpu")
    dabench = world(best.path.parents[1]).path
    pairs = draw(read_split(dabench, "validation"), OVERFIT.eval_prompts, OVERFIT.seed)
    found = agent.logprobs([p.prompt for p in pairs], [response_text(p.api) for p in pairs])
    by_batch = [found[:4], found[4:]]  # as transformers has it: means of batches, by their rows
    means = [-sum(f.total for f in b if f) / sum(f.tokens for f in b if f) for b in by_batch]
    assert (4 * means[0] + 2 * means[1]) / 6 == pytest.approx(losses[kept], rel=1e-4)
    assert not (best.path / "checkpoints").exists()


def test_evaluation_changes_no_weight_unless_the_best_is_wanted(best: Artifact) -> None:
    store = best.path.parents[1]
    measured = train(OVERFIT.model_copy(update={"load_best_model_at_end": False}), store)
    plain = train(OVERFIT.model_copy(update={"eval_steps": 0}), store)
    assert measured.manifest.metrics["kept_step"] == 70
    last, unmeasured, chosen = state(measured), state(plain), state(best)
    assert all(torch.equal(last[name], unmeasured[name]) for name in last)
    assert any(not torch.equal(last[name], chosen[name]) for name in last)


@pytest.mark.parametrize("step", [40, 65])
def test_a_killed_run_keeps_the_same_best_and_the_same_log(
    best: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also when the store was moved in between: the best checkpoint is found where it is now."""
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(OVERFIT, tmp_path / "killed")
    (tmp_path / "killed").rename(tmp_path / "moved")
    resumed = train(OVERFIT, tmp_path / "moved")
    assert resumed.manifest.metrics["resumed_at_step"] == step // 15 * 15
    assert resumed.content_digest == best.content_digest


def test_every_step_is_logged_and_the_curve_drawn(best: Artifact) -> None:
    logged = rows(best)
    assert [row["step"] for row in logged] == list(range(1, 71))
    assert all(row.keys() <= {"step", *fit.LOGGED} for row in logged)  # no time, no speed
    assert {"loss", "grad_norm", "learning_rate", "mean_token_accuracy"} <= logged[0].keys()
    assert best.file("loss.png").read_bytes().startswith(b"\x89PNG")
    first, last = best.manifest.metrics["first_loss"], best.manifest.metrics["last_loss"]
    assert first == pytest.approx(sum(row["loss"] for row in logged[:20]) / 20)
    assert last == pytest.approx(sum(row["loss"] for row in logged[-20:]) / 20)


@pytest.mark.parametrize(
    ("scheduler", "rate"),
    [
        ("constant", lambda t: 1),
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
    ],
)
def test_the_learning_rate_follows_its_scheduler(tmp_path: Path, scheduler: str, rate: Any) -> None:
    settings = {"lr_scheduler_type": scheduler, "warmup_ratio": 0, "max_steps": 4}
    logged = rows(train(TINY.model_copy(update=settings), tmp_path))
    expected = [TINY.learning_rate * rate(t / 4) for t in range(4)]
    assert [row["learning_rate"] for row in logged] == pytest.approx(expected)


def test_lora_is_set_as_in_peft(agent_run: AgentRun, tmp_path: Path) -> None:
    base = {"model": str(agent_run.agent.path), "lora_rank": 2, "max_steps": 2}
    before = state(agent_run.agent)
    weights = []
    for options in ({}, {"lora_alpha": 64}, {"lora_dropout": 0.5}):
        targets = {**base, "lora_target_modules": ("q_proj", "v_proj"), **options}
        after = state(train(TINY.model_copy(update=targets), tmp_path))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {n for n in before if re.search(r"[qv]_proj\.weight$", n)}
        weights.append(torch.cat([after[n].flatten() - before[n].flatten() for n in sorted(moved)]))
    assert weights[1].norm() > 2 * weights[0].norm()
    assert not torch.equal(weights[2], weights[0])
    wrong = TINY.model_copy(update={**base, "lora_target_modules": ("c_attn",)})
    with pytest.raises(TrainingError, match=r"lora_target_modules.*c_attn"):
        train(wrong, tmp_path)


def test_settings_of_adapters_without_adapters_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rewards: {scorers: [{name: clip, model: tiny-clip}], unify: chatgen}\n")
    overrides = {"sft.lora_alpha": 16, "rrhf.lora_target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match=r"lora_alpha.*lora_rank") as refused:
        load_config(file, overrides)
    assert "lora_target_modules" in str(refused.value)
    config = load_config(file, {**overrides, "sft.lora_rank": 8, "rrhf.lora_rank": 8})
    assert config.rrhf.lora_target_modules == ("q_proj",)
    assert load_config(file, {"runtime.report_to": "tensorboard"}).runtime.report_to == (
        "tensorboard",
    )


def test_tensorboard_gets_each_step_and_the_agent_none_of_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TINY.model_copy(update={"eval_steps": 4})
    plain = train(config, tmp_path / "plain")
    reported = train(config, tmp_path / "reported", report_to=("tensorboard",))
    assert reported.content_digest == plain.content_digest
    assert reported.identity == plain.identity
    assert not (tmp_path / "plain" / "logs").exists()
    events = EventAccumulator(str(tmp_path / "reported" / "logs" / "sft" / reported.path.name))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in rows(plain)]
    assert [e.step for e in events.Scalars("eval/loss")] == [4, 6]


def test_a_receiver_that_is_not_installed_is_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.report_to: (wandb|mlflow) is not installed"):
        train(TINY, tmp_path, report_to=("wandb", "mlflow"))


def test_ranked_prompts_are_held_out_and_measured(agent_run: AgentRun, tmp_path: Path) -> None:
    inputs = toy_inputs(agent_run, 12)
    config = TINY_RRHF.model_copy(update={"eval_steps": 2, "max_steps": 5, "eval_fraction": 0.2})
    kept, held = hold_out(rank(inputs["candidates"], inputs["scores"]), config)
    assert (kept["prompt_id"].n_unique(), held["prompt_id"].n_unique()) == (9, 3)
    assert not set(kept["prompt_id"]) & set(held["prompt_id"])
    assert hold_out(kept, TINY_RRHF)[1].is_empty()
    with pytest.raises(TrainingError, match="eval_steps"):
        hold_out(held.filter(prompt_id=held["prompt_id"][0]), config)
    runtime = RuntimeConfig(store=str(tmp_path), device="cpu")
    for loss in ("rrhf", "dpo"):
        aligned = train_rrhf.run(config.model_copy(update={"loss": loss}), inputs, runtime)
        logged = rows(aligned)
        assert [row["step"] for row in logged if "eval_loss" in row] == [2, 4, 5]
        assert all({"rank_loss", "sft_loss"} <= row.keys() for row in logged)
        metrics = aligned.manifest.metrics
        assert (aligned.manifest.rows["prompts"], metrics["eval_prompts"]) == (9, 3)
        assert metrics["best_eval_loss"] == min(r["eval_loss"] for r in logged if "eval_loss" in r)


def arguments(out: Path, **options: Any) -> TrainingArguments:
    plain = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    own = {"output_dir": str(out), "remove_unused_columns": False, "max_grad_norm": 0}
    return TrainingArguments(**{**plain, **own, **options})


def test_a_short_last_window_counts_every_prompt_once(agent_run: AgentRun, tmp_path: Path) -> None:
    """Seven prompts in batches of two and windows of three: 6 prompts, then 1 (2, 2, 2 | 1).

    The update of each window is that of its prompts in one batch.
    """
    prompts = encoded(agent_run, load_agent(agent_run.agent.path, "cpu"), 5)
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 1}
    weights = []
    for batch, windows in ((5, 1), (2, 3)):  # 5, or 2 + 2 + 1
        agent = load_agent(agent_run.agent.path, "cpu")
        before = {k: v.clone() for k, v in agent.model.state_dict().items()}
        args = arguments(
            tmp_path,
            **sgd,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=windows,
            logging_steps=1,
        )
        trainer = RRHFTrainer(
            agent.model, args, RRHFConfig(), RankedPrompts(prompts), agent.tokenizer
        )
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["loss"] == pytest.approx(logged["rank_loss"] + logged["sft_loss"], rel=1e-4)
        weights.append({k: v - before[k] for k, v in agent.model.state_dict().items()})
    for name, update in weights[0].items():
        assert torch.allclose(update, weights[1][name], atol=2e-5, rtol=1e-3), name
    assert max(update.abs().max() for update in weights[0].values()) > 1e-3


def test_a_machine_with_several_gpus_trains_on_one(agent_run: AgentRun, tmp_path: Path) -> None:
    """Without `place` transformers would wrap the model in DataParallel."""
    agent = load_agent(agent_run.agent.path, "cpu")
    prompts = encoded(agent_run, agent, 2)
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2)
    args._n_gpu = 2  # as transformers counts them where there are two
    trainer = RRHFTrainer(agent.model, args, RRHFConfig(), RankedPrompts(prompts), agent.tokenizer)
    trainer.train()
    assert trainer.packed
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 2


@pytest.mark.parametrize(("name", "index"), [("cuda:1", 1), ("cuda", 0)])
def test_training_happens_on_the_device_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, index: int
) -> None:
    """Simulated, for want of GPUs: what is set where, not what is computed."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: current.__setitem__(0, d.index))
    try:
        args = arguments(tmp_path)
        args._n_gpu = 2
        fit.place(args, torch.device(name))
        expected = torch.device("cuda", index)
        assert (args.device, current[0], args.n_gpu) == (expected, index, 1)
        assert PartialState().device == expected
    finally:
        PartialState._reset_state()


def test_a_processs_own_device_stays_with_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", 4)
    fit.place(args, torch.device("cuda:3"))
    assert args.device == torch.device("cpu")


def snippets(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_card_is_true(
    best: Artifact, agent_run: AgentRun, capsys: pytest.CaptureFixture[str]
) -> None:
    card = best.file("README.md").read_text()
    metrics = best.manifest.metrics
    assert f"| best_eval_loss | {metrics['best_eval_loss']:.4f} |" in card
    assert f"those of step {metrics['kept_step']}" in card
    assert "| learning_rate | 0.02 |" in card
    assert "![loss by step](loss.png)" in card
    assert agent_run.dabench.content_digest not in card
    assert best.manifest.inputs["dabench"][0].content_digest in card
    assert str(best.path.parents[1]) not in card
    [code] = snippets(agent_run.agent.file("README.md").read_text(), "python")
    exec(code.replace('"DIR"', repr(str(agent_run.agent.path))), {})
    assert capsys.readouterr().out.startswith("model=")
    [command] = snippets(card, "sh")
    from typer.testing import CliRunner

    from diffagent.cli.main import app

    words = ["select", "a lighthouse", "--agent", str(agent_run.agent.path)]
    assert command.startswith('diffagent select "') and "--agent DIR" in command
    assert json.loads(CliRunner().invoke(app, words).stdout)["type"] == "Checkpoint"


def test_a_card_names_the_model_on_the_hub_and_no_path(agent_run: AgentRun, tmp_path: Path) -> None:
    import yaml

    from diffagent.agent.lm.llm import AgentInfo
    from diffagent.train.agent_card import TrainingFacts, write_card

    for base, expected in (
        (
            "meta-llama/Llama-2-7b-hf@main",
            {"license": "other", "base_model": "meta-llama/Llama-2-7b-hf"},
        ),
        ("tiny-llama", {"license": "apache-2.0"}),
        ('my "model": \n- x', {"license": "other"}),
    ):
        info = AgentInfo(base_model=base, trained_by=("sft",), max_length=512)
        config = SFTConfig(model=str(tmp_path))
        write_card(tmp_path, TrainingFacts("sft", info, config, agent_run.dabench, {}, []))
        card = (tmp_path / "README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert {k: front.get(k) for k in ("license", "base_model") if k in front} == expected
        assert str(tmp_path) not in card


def test_a_truncated_candidate_is_left_out_of_the_ranking(agent_run: AgentRun) -> None:
    from diffagent.train.rrhf import encode_ranked

    inputs = toy_inputs(agent_run, 3)
    ranked = rank(inputs["candidates"], inputs["scores"])
    junk = ranked.filter(reward=INVALID_REWARD)
    assert junk.height == 3
    assert not ranked["truncated"].any()
    import polars as pl

    cut = ranked.with_columns(
        truncated=pl.col("reward") == INVALID_REWARD,
        reward=pl.when(pl.col("reward") > INVALID_REWARD).then("reward"),
    )
    agent = load_agent(agent_run.agent.path, "cpu")
    _, counts = encode_ranked(agent.tokenizer, cut, 192, agent.info.prompt_template)
    assert (counts["truncated"], counts["invalid"], counts["render_failed"]) == (3, 0, 0)


def test_a_trainer_of_transformers_is_what_is_patched() -> None:
    """`kill_at` patches Trainer, and both trainers inherit from it."""
    assert issubclass(sft.ResponseTrainer, Trainer) and issubclass(RRHFTrainer, Trainer)
