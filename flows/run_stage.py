"""The flow ``run-stage``: one node of the plan, for flows with the runner ``workers``."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from diffagent.run_config import RunConfig
from flows._compose import run_one
from tasks._workers import heartbeat


@flow(name="run-stage", persist_result=False)
def run_stage(key: str, config: dict[str, Any]) -> State[None]:
    """Run one node of the plan; the store must have its inputs.

    Args:
        key: as in ``diffagent.pipeline.plan``, such as 'render-3'.
        config: settings of the run, as JSON values.
    """
    settings = RunConfig.model_validate(config)
    with heartbeat(flow_run.id, settings.runtime.tasks.lost_after_seconds):
        artifact = run_one(settings, key)
    return Completed(message=f"{key} is in {artifact.location}.")
