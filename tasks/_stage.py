"""How every task is named, cached, retried and reported: in this one place.

A task wraps one node of ``diffagent.pipeline.plan``. Its cache key is the task's name and the
stage's identity, so that equal requests are Cached across runs, deployments and days; the
artefact on disk decides, and a record whose artefact is gone or changed is dropped first.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import Task, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.tasks import exponential_backoff

from diffagent import pipeline
from diffagent.pipeline import Node, load_stage, run_node
from diffagent.run_config import RunConfig
from diffagent.store import Artifact, Inputs
from tasks._report import report_artifact, report_refresh
from tasks._workers import run_on_worker

log = logging.getLogger(__name__)

# Prefect forwards the records of PREFECT_LOGGING_EXTRA_LOGGERS but does not set their level.
logging.getLogger("diffagent").setLevel(logging.INFO)


@dataclass
class ArtifactPolicy(CachePolicy):
    """Key = task name, store and stage identity; valid only while the artefact is whole."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str:
        config: RunConfig = inputs["config"]
        node = pipeline.plan(config)[inputs["key"]]
        stage = load_stage(node)
        place = config.runtime.remote or str(Path(config.runtime.store).resolve())
        store = hashlib.sha256(place.encode()).hexdigest()[:8]
        identity = stage.identity(node.config, inputs["inputs"])
        key = f"{task_ctx.task.name}-{store}-{identity}"
        artifact = stage.cached(node.config, inputs["inputs"], config.runtime)
        results = task_ctx.result_store
        if results.exists(key) and (artifact is None or results.read(key).result != artifact):
            _drop(results.result_storage, key)
        return key


def _drop(storage: Any, key: str) -> None:
    if not isinstance(storage, LocalFileSystem) or storage.basepath is None:
        raise TypeError(
            f"the record {key!r} is stale and cannot be removed from {type(storage).__name__}; "
            "keep Prefect's results on a local path (PREFECT_LOCAL_STORAGE_PATH)"
        )
    (Path(storage.basepath).expanduser() / key).unlink(missing_ok=True)


def retryable(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry only what may succeed when it is done again: errors say so themselves."""
    error = state.result(raise_on_failure=False)
    return bool(getattr(error, "retryable", False))


class DashboardProgress:
    """Shows what a stage tells of its progress as a progress artifact, made when it first does.

    A dashboard that cannot be reached is no reason to stop a crawl of days: it is logged.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None
        self._percent = 0.0

    def __call__(self, fraction: float | None, text: str) -> None:
        """Show ``fraction`` (None: as far as before) and ``text``."""
        if fraction is not None:
            self._percent = 100 * fraction
        try:
            if self._artifact is None:
                made = create_progress_artifact(
                    self._percent, key=f"{self._key}-progress", description=text
                )
                self._artifact = cast(UUID, made)
            else:
                update_progress_artifact(self._artifact, self._percent, text)
        except Exception as error:
            log.warning("progress of %s cannot be shown: %s", self._key, error)


def stage_task(name: str) -> Task[..., Artifact]:
    """The Prefect task of one stage of the plan (of all its shards and selectors)."""

    @task(
        name=name,
        task_run_name="{key}",
        cache_policy=ArtifactPolicy(),
        persist_result=True,
        cache_result_in_memory=False,
        result_serializer="json",
        retries=2,
        retry_delay_seconds=exponential_backoff(10),
        retry_jitter_factor=0.5,
        retry_condition_fn=retryable,
    )
    def run(
        key: str,
        config: RunConfig,
        inputs: Inputs,
        refresh: bool = False,
    ) -> Artifact:
        node: Node = pipeline.plan(config)[key]
        if node.spread and config.runtime.tasks.runner == "workers":
            return run_on_worker(node, config, inputs)
        began = datetime.now(UTC)
        artifact = run_node(
            node,
            inputs,
            config.runtime,
            site_url=config.crawl.site,
            refresh=refresh,
            progress=DashboardProgress(key),
        )
        manifest = artifact.manifest
        stays = manifest.created_at < began
        if refresh and (stays or "changes" in manifest.metrics):
            report_refresh(key, artifact, stays=stays)
        else:
            report_artifact(key, artifact)
        return artifact

    return run
