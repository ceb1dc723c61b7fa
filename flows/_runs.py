"""Names and tags of flow runs, and the limit of one run of a deployment at a time.

Prefect's concurrency limit of a deployment has two faults: the run that it cancels does not state
which run was in its way, and the slot of a run whose machine died stays taken for a lease of five
minutes, which the client cannot shorten. So a run itself looks for earlier runs of its deployment.
An earlier run with a heartbeat (``tasks._workers``) takes precedence; one without a heartbeat for
``runtime.tasks.lost_after_seconds`` is marked Crashed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow, flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows._compose import configure
from tasks._workers import end_of, heartbeat

Body = Callable[..., State[None]]


def pipeline_flow(name: str, description: str) -> Callable[[Body], Flow[..., State[None]]]:
    """Make a flow of ``body(config, overrides, ...)``.

    Its runs are named and tagged with their configuration. One run of a deployment runs at a time.

    Args:
        name: of the flow.
        description: of the flow, one sentence.
    """

    def wrap(body: Body) -> Flow[..., State[None]]:
        @functools.wraps(body)
        def run(*args: Any, **options: Any) -> State[None]:
            call = inspect.signature(body).bind(*args, **options)
            call.apply_defaults()
            ident = UUID(flow_run.id)
            with get_client(sync_client=True) as client:
                current = client.read_flow_run(ident)
                client.update_flow_run(ident, tags={*current.tags, *_tags()})
                if current.deployment_id is None:  # without a deployment, or a part of another flow
                    return body(*call.args)
                settings = configure(call.arguments["config"], call.arguments["overrides"])
                lost_after = settings.runtime.tasks.lost_after_seconds
                with heartbeat(ident, lost_after):
                    blocked = _blocked(client, current, lost_after)
                    return blocked or body(*call.args)

        return flow(
            name=name, description=description, persist_result=False, flow_run_name=run_name
        )(run)

    return wrap


def run_name() -> str:
    """Return the name of the current run: configuration, tags and time, 'sandbox refresh ...'."""
    started = flow_run.scheduled_start_time
    return " ".join([*_tags(), f"{started:%Y-%m-%d %H:%M}"])


def _tags() -> list[str]:
    """Return the name of the current run's configuration, and 'refresh' if it crawls again."""
    parameters = flow_run.parameters  # without the defaults of the flow's signature
    config = [Path(parameters["config"]).stem] if "config" in parameters else []
    return config + ["refresh"] * bool(parameters.get("refresh"))


def _blocked(
    client: SyncPrefectClient, current: FlowRun, lost_after_seconds: float
) -> State[None] | None:
    """Return the final state of this run if an earlier run of its deployment lives, else None."""
    log = get_run_logger()
    for other in _earlier_runs(client, current):
        since = f"{other.start_time:%Y-%m-%d %H:%M:%S} UTC"
        log.warning(
            "%r of this deployment has been running since %s; waiting up to %.0f s for its "
            "heartbeat",
            *(other.name, since, lost_after_seconds),
        )
        end = end_of(client, other, lost_after_seconds)
        if end is None:
            return Cancelled(
                message=f"Not run: {other.name!r} of this deployment has been running since "
                f"{since}. Wait for its end, or stop it: prefect flow-run cancel {other.id}"
            )
        log.warning("%r is %s (%s); this run continues", other.name, end.name, end.message)
    return None


def _earlier_runs(client: SyncPrefectClient, current: FlowRun) -> list[FlowRun]:
    """Return the running runs of the deployment of ``current`` that began before it."""
    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[current.deployment_id]),
            state=FlowRunFilterState(
                type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
            ),
        )
    )
    order = {run.id: (run.start_time, str(run.id)) for run in runs if run.start_time}
    earlier = [run for run in runs if run.id in order and order[run.id] < order[current.id]]
    return sorted(earlier, key=lambda run: order[run.id])
