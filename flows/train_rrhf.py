"""Sample, render, score, then align the agent."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows._compose import configure, run_group
from flows._runs import pipeline_flow


@pipeline_flow("train-rrhf")
def train_rrhf(
    config: str = "configs/sandbox.yaml", overrides: dict[str, Any] | None = None
) -> State[None]:
    """Sample, render, score, then align the agent.

    Args:
        config: YAML file of ``diffagent.run_config.RunConfig``.
        overrides: dotted keys to values, such as {"runtime.store": "store"}.
    """
    settings = configure(config, overrides)
    agent = run_group(settings, "train-rrhf")["rrhf"]
    return Completed(message=f"The agent is in {agent.location}.")
