"""What several test modules train once and share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from diffagent import compat
from diffagent.artifacts import Artifact
from schemas.config import RuntimeConfig, SFTConfig
from tests.unit.agent_world import make_world

compat.install()  # some test modules import transformers before anything of diffagent


@dataclass(frozen=True)
class AgentRun:
    """A small DABench and an agent that learnt to answer it."""

    runtime: RuntimeConfig
    config: SFTConfig
    dabench: Artifact
    agent: Artifact


@pytest.fixture(scope="session")
def agent_run(tmp_path_factory: pytest.TempPathFactory) -> AgentRun:
    """An agent of 0.1 M parameters after seconds of training: it writes valid APIs."""
    import torch

    from diffagent.train.stages import train_sft

    torch.set_num_threads(1)
    store = Path(tmp_path_factory.mktemp("agent"))
    runtime = RuntimeConfig(store=str(store), device="cpu")
    dabench = make_world(store, train=400, test=24, validation=40)
    config = SFTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        vocab_size=600,
        max_steps=100,
        learning_rate=8e-3,
        per_device_train_batch_size=8,
        max_length=192,
    )
    return AgentRun(
        runtime, config, dabench, train_sft.run(config, {"dabench": [dabench]}, runtime)
    )
