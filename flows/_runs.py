"""How runs of the flows are named, tagged and kept from running twice at once.

Prefect's own concurrency limit of a deployment would do the last with two faults: the run that it
cancels does not say what is in its way, and the slot of a run whose machine died is free again only
when a lease of five minutes, which its client does not let one shorten, is over. So a run looks
itself for earlier runs of its deployment. One that shows a heartbeat (``tasks._workers``) goes
first; one that shows none for ``runtime.tasks.lost_after_seconds`` is marked Crashed.
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

    Its runs are named by what they do, tagged with their configuration, and of one deployment only
    one runs at a time.
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
                if current.deployment_id is None:  # by hand, or a part of another flow
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
    """Name of the current run: configuration, what is special, and when: 'sandbox refresh ...'."""
    started = flow_run.scheduled_start_time
    return " ".join([*_tags(), f"{started:%Y-%m-%d %H:%M}"])


def _tags() -> list[str]:
    """The configuration of the current run, and 'refresh' where it asks the site for news."""
    parameters = flow_run.parameters  # without what the flow's signature has by default
    config = [Path(parameters["config"]).stem] if "config" in parameters else []
    return config + ["refresh"] * bool(parameters.get("refresh"))


def _blocked(
    client: SyncPrefectClient, current: FlowRun, lost_after_seconds: float
) -> State[None] | None:
    """The end of this run when an earlier one of its deployment lives; None when it may go on."""
    log = get_run_logger()
    for other in _earlier_runs(client, current):
        since = f"{other.start_time:%Y-%m-%d %H:%M:%S} UTC"
        log.warning(
            "%r of this deployment has been running since %s; waiting up to %.0f s to see whether "
            "it still lives",
            *(other.name, since, lost_after_seconds),
        )
        end = end_of(client, other, lost_after_seconds)
        if end is None:
            return Cancelled(
                message=f"Not run: {other.name!r} of this deployment has been running since "
                f"{since}. Wait for its end, or stop it: prefect flow-run cancel {other.id}"
            )
        log.warning("%r is %s (%s); this run goes on", other.name, end.name, end.message)
    return None


def _earlier_runs(client: SyncPrefectClient, current: FlowRun) -> list[FlowRun]:
    """Runs of the deployment of ``current`` that are running and began before it."""
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
