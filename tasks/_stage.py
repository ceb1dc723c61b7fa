"""Names, cache keys, retries and reports of all tasks.

A task runs a node of ``diffagent.pipeline.plan``. Its cache key contains the task's name and the
stage's identity, so that equal requests are Cached across runs and deployments. The artifact on
disk decides: a result of Prefect whose artifact is missing or damaged is removed first.
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
    """Cache policy by task name, store and identity; a damaged artifact is not a hit."""

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
        address = config.runtime.remote or str(Path(config.runtime.store).resolve())
        store = hashlib.sha256(address.encode()).hexdigest()[:8]
        identity = stage.identity(node.config, inputs["inputs"])
        key = f"{task_ctx.task.name}-{store}-{identity}"
        artifact = stage.cached(node.config, inputs["inputs"], config.runtime)
        results = task_ctx.result_store
        if results.exists(key) and (artifact is None or results.read(key).result != artifact):
            _remove_result(results.result_storage, key)
        return key


def _remove_result(storage: Any, key: str) -> None:
    """Remove a stored result of Prefect.

    Raises:
        TypeError: results are not stored on a local path.
    """
    if not isinstance(storage, LocalFileSystem) or storage.basepath is None:
        raise TypeError(
            f"cannot remove the stale result {key!r} from {type(storage).__name__}; "
            "keep Prefect's results on a local path (PREFECT_LOCAL_STORAGE_PATH)"
        )
    (Path(storage.basepath).expanduser() / key).unlink(missing_ok=True)


def retryable(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Return whether to retry a task: its error states whether a retry may succeed."""
    error = state.result(raise_on_failure=False)
    return bool(getattr(error, "retryable", False))


class DashboardProgress:
    """Progress artifact of a stage, created at the first report.

    A server that cannot be reached is logged and does not stop the stage.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact: UUID | None = None
        self._percent = 0.0

    def __call__(self, fraction: float | None, text: str) -> None:
        """Show ``fraction`` (None: unchanged) and ``text``."""
        if fraction is not None:
            self._percent = 100 * fraction
        try:
            if self._artifact is None:
                artifact = create_progress_artifact(
                    self._percent, key=f"{self._key}-progress", description=text
                )
                self._artifact = cast(UUID, artifact)
            else:
                update_progress_artifact(self._artifact, self._percent, text)
        except Exception as error:
            log.warning("cannot show the progress of %s: %s", self._key, error)


def stage_task(name: str) -> Task[..., Artifact]:
    """Make the Prefect task of a stage of the plan, which runs all its shards."""

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
