"""Stages on Prefect workers: each is a run of the deployment ``run-stage``, watched till it ends.

A worker that dies says nothing, and its run would be Running for ever. So a stage on a worker
raises a count in the labels of its run (``heartbeat``); where the count stands still the run is
lost, is marked Crashed, and the task that waits for it is retried: another worker resumes what a
shared store has of the stage, or makes it anew. Nothing else is lost.
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
from diffagent.schemas.config import PipelineConfig
from diffagent.store import Artifact, Inputs

log = logging.getLogger(__name__)

#: Name of the deployment that workers serve (prefect.yaml).
DEPLOYMENT = "run-stage/run-stage"
_BEAT = "diffagent.beat"
#: A worker takes its time to start a process; after so many times ``lost_after_seconds`` it died.
_START = 5


@contextlib.contextmanager
def heartbeat(flow_run_id: UUID, lost_after_seconds: float) -> Iterator[None]:
    """Show that this process lives, six times in ``lost_after_seconds``, as long as the block."""
    over = threading.Event()

    def beat() -> None:
        count = 0
        with get_client(sync_client=True) as client:
            while not over.is_set():
                count += 1
                try:
                    client.update_flow_run_labels(flow_run_id, {_BEAT: count})
                except Exception as error:  # a server that is away for a moment stops no stage
                    log.warning("cannot tell that this stage is alive: %s", error)
                over.wait(lost_after_seconds / 6)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def end_of(client: SyncPrefectClient, run: FlowRun, lost_after_seconds: float) -> State[Any] | None:
    """Wait for the next heartbeat of ``run``, or its end.

    Args:
        client: of the server that has the run.
        run: a run that shows its ``heartbeat`` while it lives.
        lost_after_seconds: silence that means that its process has died; then it is marked Crashed.

    Returns:
        Its final state; None while it lives.
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
    return Crashed(message=f"nothing was heard of its worker for {seconds:.0f} s")


def run_on_worker(node: Node, config: PipelineConfig, inputs: Inputs) -> Artifact:
    """Have a worker run ``node``, and wait for it; what the store has is not run again.

    Raises:
        ArtifactError: the worker was lost (another try may succeed), or the stage failed there.
    """
    stage = load_stage(node)
    if found := stage.cached(node.config, inputs, config.runtime):
        return found
    local = config.runtime.model_copy(update={"runner": "threads"})
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
        state = _watch(client, run, config.runtime.lost_after_seconds)
    if not state.is_completed():
        failure = ArtifactError(f"on a worker: {state.message or state.name}")
        failure.retryable = state.is_crashed()
        raise failure
    if found := stage.cached(node.config, inputs, config.runtime):
        return found
    raise ArtifactError(
        f"a worker made {node.key!r}, but {config.runtime.store!r} does not have it; runtime.store "
        "has to be a URI, or a directory that flows and workers share by the same path"
    )


def _watch(client: SyncPrefectClient, run: FlowRun, lost_after_seconds: float) -> State[Any]:
    """Wait for the end of a flow run, or for silence of the process that runs it."""
    seen, since, told = None, time.monotonic(), False
    while True:
        try:
            run = client.read_flow_run(run.id)
        except httpx.HTTPError as error:  # a server that is away for a moment loses no stage
            log.warning("cannot ask what became of %s: %s", run.name, error)
            since = time.monotonic()
        state = run.state
        if state is None or state.is_final():
            return state or Crashed(message=f"the run {run.name!r} has no state")
        if (state.type, run.labels.get(_BEAT)) != seen:
            seen, since = (state.type, run.labels.get(_BEAT)), time.monotonic()
        quiet = time.monotonic() - since
        if state.is_scheduled():
            if quiet > lost_after_seconds and not told:
                log.warning(
                    "%s: no worker takes it; start one (docs/how-to/use-several-machines.md)",
                    run.name,
                )
                told = True
        elif quiet > lost_after_seconds * (_START if state.is_pending() else 1):
            lost = _lost(quiet)
            client.set_flow_run_state(run.id, lost, force=True)
            return lost
        time.sleep(min(5.0, lost_after_seconds / 10))
