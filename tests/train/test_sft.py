"""The stage ``sft``: what it writes, that it learns, that it survives a kill."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
)

from diffagent.agent.lm.format import Example
from diffagent.agent.lm.llm import load_agent
from diffagent.errors import TrainingError
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact
from diffagent.train import fit, sft
from diffagent.train.sft_config import SFTConfig
from diffagent.train.sft_stage import train_sft
from diffagent.train.tiny_llama import build_tokenizer
from tests.agent.agent_world import make_world
from tests.conftest import AgentRun

TINY = SFTConfig(
    hidden_size=32,
    num_hidden_layers=1,
    vocab_size=400,
    max_steps=6,
    learning_rate=5e-3,
    per_device_train_batch_size=4,
    save_steps=2,
)


def train(config: SFTConfig, store: Path) -> Artifact:
    runtime = RuntimeConfig(store=str(store), device="cpu")
    return train_sft.run(config, {"dabench": [make_world(store, train=24, test=4)]}, runtime)


def state(artifact: Artifact) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_agent(artifact.path, "cpu").model.state_dict()
    return weights


class Killed(BaseException):
    """The process ends here."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next training die when it begins optimizer step ``step`` (from 0)."""
    original = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


def test_an_agent_directory_is_whole_and_names_no_place(agent_run: AgentRun) -> None:
    path = agent_run.agent.path
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files == {
        "README.md",
        "agent.json",
        "calls.parquet",
        "catalogue.parquet",
        "config.json",
        "generation_config.json",
        "loss.png",
        "manifest.json",
        "mapping/samplers.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.jsonl",
    }
    for name in files - {"manifest.json"}:
        if name.endswith((".parquet", ".safetensors", ".png")):
            continue
        assert str(path.parents[1]) not in (path / name).read_text(encoding="utf-8")
    info = json.loads((path / "agent.json").read_text())
    assert (info["base_model"], info["trained_by"]) == ("tiny-llama", ["sft"])
    assert re.fullmatch(r".*\{prompt\}.*", info["prompt_template"], re.DOTALL)
    metrics = agent_run.agent.manifest.metrics
    assert metrics["last_loss"] < metrics["first_loss"] / 5
    assert metrics["responses_too_long"] == metrics["prompts_cut"] == 0


def test_every_trainable_parameter_changes_and_training_is_deterministic(tmp_path: Path) -> None:
    trained = train(TINY, tmp_path / "a")
    dabench = make_world(tmp_path / "a", train=24, test=4)
    pairs = [
        (pair.prompt, sft.response_text(pair.api)) for pair in sft.read_split(dabench.path, "train")
    ]
    start, _ = sft.load_base(TINY, pairs, torch.float32)
    after = state(trained)
    for name, before in start.state_dict().items():
        assert not torch.equal(before, after[name]), name
    assert train(TINY, tmp_path / "b").content_digest == trained.content_digest
    other = train(TINY.model_copy(update={"seed": 1}), tmp_path / "a")
    assert other.content_digest != trained.content_digest


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_run_continues_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    undisturbed = train(TINY, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(TINY, tmp_path / "killed")
    [partial] = (tmp_path / "killed" / "sft").glob(".*.partial")
    # A kill while checkpoint 99 was being written.
    broken = partial / "checkpoints" / "checkpoint-99"
    broken.mkdir(parents=True)
    (broken / "trainer_state.json").write_text('{"global_st')
    resumed = train(TINY, tmp_path / "killed")
    assert resumed.content_digest == undisturbed.content_digest
    assert resumed.manifest.metrics.get("resumed_at_step", 0) == step // 2 * 2


@pytest.mark.parametrize("batching", ["by_length", "packed"])
def test_a_run_killed_in_its_second_epoch_continues_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    rows = {"by_length": 8, "packed": 2}[batching]
    config = TINY.model_copy(
        update={"batching": batching, "max_steps": 7, "per_device_train_batch_size": rows}
    )
    undisturbed = train(config, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        kill_at(patch, 5)  # an epoch has three steps, or four
        with pytest.raises(Killed):
            train(config, tmp_path / "killed")
    resumed = train(config, tmp_path / "killed")
    assert resumed.manifest.metrics["resumed_at_step"] == 4
    assert resumed.content_digest == undisturbed.content_digest
    assert undisturbed.content_digest != train(TINY, tmp_path / "plain").content_digest


def tiny_trainer(config: SFTConfig, model: Any, out: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A trainer over nine examples, and the batch that holds all of them."""
    lengths = [5, 9, 12, 7, 20, 6, 11, 8, 15]
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in lengths:
        ids = torch.randint(3, 300, (n,), generator=generator).tolist()
        examples.append(Example(ids, [-100] * 3 + ids[3:]))
    tokenizer = build_tokenizer(["a b c"], 300)
    trainer = sft.build_trainer(
        config, model, tokenizer, examples, out=out, device=torch.device("cpu")
    )
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    return trainer, trainer.data_collator(rows)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_only_the_layers_asked_for_make_their_activations_again(
    tmp_path: Path, share: float
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_attention_heads=4, **sizes))
    config = TINY.model_copy(update={"gradient_checkpointing": share, "max_steps": 1})
    trainer, _ = tiny_trainer(config, model, tmp_path)
    trainer.train()
    again = [m.gradient_checkpointing for m in model.modules() if hasattr(m, "mlp")]
    assert again == [share > 0, share == 1]


@pytest.mark.parametrize(("bf16", "products"), [(None, torch.float32), (True, torch.bfloat16)])
def test_bf16_is_of_products_and_not_of_weights(
    tmp_path: Path, bf16: bool | None, products: torch.dtype
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_attention_heads=4, **sizes))
    seen = set()
    product = model.model.layers[0].mlp.down_proj
    product.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    trainer, _ = tiny_trainer(
        TINY.model_copy(update={"bf16": bf16, "max_steps": 1}), model, tmp_path
    )
    seen.clear()
    trainer.train()
    assert seen == {products}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(
    tmp_path: Path, architecture: str
) -> None:
    results = []
    for batching in ("random", "packed"):
        torch.manual_seed(0)
        model: Any
        if architecture == "llama":
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_attention_heads=4, **sizes))
        else:
            model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4))
        model.eval()
        config = TINY.model_copy(update={"batching": batching, "max_length": 32})
        trainer, batch = tiny_trainer(config, model, tmp_path)
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((loss.item(), len(trainer.train_dataset), gradients))
    (padded, nine, expected), (packed, three, ours) = results
    assert (nine, three) == (9, 3)
    assert packed == pytest.approx(padded, rel=1e-6)
    for name, gradient in expected.items():
        assert torch.allclose(ours[name], gradient, atol=1e-6), name


def test_a_model_that_mixes_packed_examples_is_batched_by_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2))
    config = TINY.model_copy(update={"batching": "packed"})
    trainer, batch = tiny_trainer(config, model, tmp_path)
    assert "MambaForCausalLM cannot read packed rows" in caplog.text
    assert trainer.args.train_sampling_strategy == "group_by_length"
    assert batch["input_ids"].shape == (9, 20)


def test_batches_by_length_waste_little() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(1, 200) for _ in range(2048)]
    sampler = sft.EpochLengthSampler(8, lengths, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(2048))
    sampler.set_epoch(1)
    assert list(sampler) != order
    sampler.set_epoch(0)
    assert list(sampler) == order

    def padded(indices: list[int]) -> int:
        batches = [indices[i : i + 8] for i in range(0, 2048, 8)]
        return sum(8 * max(lengths[i] for i in batch) for batch in batches)

    assert padded(order) < 1.1 * sum(lengths) < 0.7 * padded(list(range(2048)))


def test_a_run_killed_after_its_last_step_trains_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(TINY, tmp_path / "undisturbed")

    def die(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_agent", die)
        with pytest.raises(Killed):
            train(TINY, tmp_path / "killed")
    resumed = train(TINY, tmp_path / "killed")
    assert resumed.manifest.metrics["resumed_at_step"] == TINY.max_steps
    assert resumed.content_digest == undisturbed.content_digest


def test_lora_is_merged_into_a_plain_model(agent_run: AgentRun, tmp_path: Path) -> None:
    base = agent_run.agent.path
    config = TINY.model_copy(update={"model": str(base), "lora_rank": 2, "max_steps": 3})
    trained = train(config, tmp_path)
    before, after = state(agent_run.agent), state(trained)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if re.search(r"(_proj)\.weight$", name)}
    info = json.loads((trained.path / "agent.json").read_text())
    assert info["base_model"] == base.name  # a path would name this machine


def test_a_model_that_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"sft\.model: cannot load 'no/such-model'"):
        train(TINY.model_copy(update={"model": "no/such-model"}), tmp_path)


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    metrics = train(TINY.model_copy(update={"max_length": 110}), tmp_path).manifest.metrics
    assert metrics["longest_example"] <= 110
    assert metrics["prompts_cut"] + metrics["responses_too_long"] > 0
    with pytest.raises(TrainingError, match="no response fits into max_length 32"):
        train(TINY.model_copy(update={"max_length": 32}), tmp_path)


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    class State:
        global_step, max_steps = 7, 9

    with pytest.raises(TrainingError, match="diverged; lower learning_rate"):
        fit._LogCallback().on_log(None, State(), None, {"loss": float("nan")})
