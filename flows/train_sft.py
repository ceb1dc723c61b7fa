"""Supervised fine-tuning on DABench."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows._compose import configure, run_group
from flows._runs import pipeline_flow


@pipeline_flow("train-sft")
def train_sft(
    config: str = "configs/sandbox.yaml", overrides: dict[str, Any] | None = None
) -> State[None]:
    """Supervised fine-tuning on DABench.

    Args:
        config: YAML file of ``diffagent.run_config.RunConfig``.
        overrides: dotted keys to values, such as {"runtime.store": "store"}.
    """
    settings = configure(config, overrides)
    agent = run_group(settings, "train-sft")["sft"]
    return Completed(message=f"The agent is in {agent.location}.")
