"""Sample, render, score, then align the agent."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows._compose import configure, run_group


@flow(name="train-rrhf", persist_result=False)
def train_rrhf(
    config: str = "configs/sandbox.yaml", overrides: dict[str, Any] | None = None
) -> State[None]:
    """Sample, render, score, then align the agent.

    Args:
        config: YAML file of ``schemas.config.PipelineConfig``.
        overrides: dotted keys to values, such as {"runtime.store": "store"}.
    """
    settings = configure(config, overrides)
    agent = run_group(settings, "train-rrhf")["rrhf"]
    return Completed(message=f"The agent is in {agent.location}.")
