"""Stages on Prefect workers: each is a run of the deployment ``run-stage``, watched to its end.

A worker that dies reports nothing, and its run would stay Running. So a stage on a worker
increments a number in the labels of its run (``heartbeat``). When the number stops, the run is
marked Crashed and the task that waits for it is retried: another worker resumes the stage from a
shared store, or builds it again. No other stage is affected.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from diffagent.errors import ArtifactError
from diffagent.pipeline import Node, load_stage
from diffagent.run_config import RunConfig
from diffagent.store import Artifact, Inputs

log = logging.getLogger(__name__)

#: Name of the deployment that workers serve (prefect.yaml).
DEPLOYMENT = "run-stage/run-stage"
_BEAT = "diffagent.beat"
#: A pending run is lost after this many times ``lost_after_seconds``: starting a process is slow.
_PENDING_FACTOR = 5


@contextlib.contextmanager
def heartbeat(flow_run_id: UUID, lost_after_seconds: float) -> Iterator[None]:
    """Report that this process lives, six times per ``lost_after_seconds``, during the block."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        with get_client(sync_client=True) as client:
            while not ended.is_set():
                count += 1
                try:
                    client.update_flow_run_labels(flow_run_id, {_BEAT: count})
                except Exception as error:  # a server that is away does not stop the stage
                    log.warning("cannot report that this stage is alive: %s", error)
                ended.wait(lost_after_seconds / 6)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def end_of(client: SyncPrefectClient, run: FlowRun, lost_after_seconds: float) -> State[Any] | None:
    """Wait for the next heartbeat of ``run``, or its end.

    Args:
        client: client of the server that has the run.
        run: run that shows a ``heartbeat`` while it lives.
        lost_after_seconds: seconds without a heartbeat after which the run is marked Crashed.

    Returns:
        The final state of the run; None if it lives.
    """
    first, since = run.labels.get(_BEAT), time.monotonic()
    while time.monotonic() - since < lost_after_seconds:
        run = client.read_flow_run(run.id)
        if run.state and run.state.is_final():
            return run.state
        if run.labels.get(_BEAT) != first:
            return None
        time.sleep(min(1.0, lost_after_seconds / 10))
    lost = _lost(lost_after_seconds)
    client.set_flow_run_state(run.id, lost, force=True)
    return lost


def _lost(seconds: float) -> State[Any]:
    return Crashed(message=f"no heartbeat of its worker for {seconds:.0f} s")


def run_on_worker(node: Node, config: RunConfig, inputs: Inputs) -> Artifact:
    """Run ``node`` on a worker and wait for its end; an artifact in the store is not built again.

    Raises:
        ArtifactError: the worker was lost (a retry may succeed), or the stage failed there.
    """
    stage = load_stage(node)
    if artifact := stage.cached(node.config, inputs, config.runtime):
        return artifact
    tasks = config.runtime.tasks.model_copy(update={"runner": "threads"})
    local = config.runtime.model_copy(update={"tasks": tasks})
    try:
        run = cast(
            FlowRun,
            run_deployment(
                DEPLOYMENT,
                parameters={
                    "key": node.key,
                    "config": config.model_copy(update={"runtime": local}).model_dump(mode="json"),
                },
                timeout=0,
                flow_run_name=node.key,
                work_queue_name=node.queue,
            ),
        )
    except ObjectNotFound:
        raise ArtifactError(
            f"the server has no deployment {DEPLOYMENT!r}; run 'prefect deploy --all', and "
            f"'prefect worker start --pool diffagent --work-queue {node.queue}' on each machine"
        ) from None
    with get_client(sync_client=True) as client:
        state = _watch(client, run, config.runtime.tasks.lost_after_seconds)
    if not state.is_completed():
        failure = ArtifactError(f"on a worker: {state.message or state.name}")
        failure.retryable = state.is_crashed()
        raise failure
    if artifact := stage.cached(node.config, inputs, config.runtime):
        return artifact
    raise ArtifactError(
        f"a worker built {node.key!r}, but {config.runtime.store!r} does not have it; set "
        "runtime.store to a URI, or to a directory that flows and workers share by the same path"
    )


def _watch(client: SyncPrefectClient, run: FlowRun, lost_after_seconds: float) -> State[Any]:
    """Wait for the end of a flow run; mark it Crashed when its heartbeat stops."""
    seen, since, warned = None, time.monotonic(), False
    while True:
        try:
            run = client.read_flow_run(run.id)
        except httpx.HTTPError as error:  # a server that is away does not lose the stage
            log.warning("cannot read the state of %s: %s", run.name, error)
            since = time.monotonic()
        state = run.state
        if state is None or state.is_final():
            return state or Crashed(message=f"the run {run.name!r} has no state")
        if (state.type, run.labels.get(_BEAT)) != seen:
            seen, since = (state.type, run.labels.get(_BEAT)), time.monotonic()
        quiet = time.monotonic() - since
        if state.is_scheduled():
            if quiet > lost_after_seconds and not warned:
                log.warning(
                    "%s: no worker has taken it; start one (docs/how-to/use-several-machines.md)",
                    run.name,
                )
                warned = True
        elif quiet > lost_after_seconds * (_PENDING_FACTOR if state.is_pending() else 1):
            lost = _lost(quiet)
            client.set_flow_run_state(run.id, lost, force=True)
            return lost
        time.sleep(min(5.0, lost_after_seconds / 10))
