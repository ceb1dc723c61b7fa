"""Code that the flows share: run the nodes of a group as tasks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from diffagent import pipeline
from diffagent.errors import ArtifactError, ConfigError
from diffagent.pipeline import Group, Node, find_cached
from diffagent.run_config import RunConfig, load_config
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact
from tasks._report import report_stages
from tasks.stages import task_of


def configure(config: str, overrides: Mapping[str, Any] | None) -> RunConfig:
    """The run's configuration from the flow's parameters; other processes find its store."""
    settings = load_config(config, dict(overrides or {}))
    runtime = settings.runtime
    if runtime.tasks.runner == "threads" or runtime.remote:
        return settings
    absolute = runtime.model_copy(update={"store": str(Path(runtime.store).resolve())})
    return settings.model_copy(update={"runtime": absolute})


def run_group(config: RunConfig, group: Group, *, refresh: bool = False) -> dict[str, Artifact]:
    """Run every node of ``group`` as a task; what it needs of other groups must be there.

    Raises:
        ArtifactError: another group has to run first, or tasks failed (all are named).
    """
    nodes = pipeline.plan(config)
    mine = {key: node for key, node in nodes.items() if node.group == group}
    nodes = pipeline.upstream(nodes, mine)  # to look for more would import what it takes to train
    found = find_cached(nodes, config)
    done = {key: found[key] for key in _needed(nodes, mine, found)}
    spread = config.runtime.tasks.runner != "threads" and any(node.spread for node in mine.values())
    with _runner(config.runtime, len(mine), spread=spread) as runner:
        futures: dict[str, PrefectFuture[Artifact]] = {}
        for key in sorted(mine, key=lambda k: _depth(mine, k)):
            node = mine[key]
            parameters = {
                "key": key,
                "config": config,
                "inputs": {
                    name: [done.get(parent) or futures[parent] for parent in parents]
                    for name, parents in node.inputs.items()
                },
                "refresh": refresh and key == "crawl",
            }
            step = task_of(key).with_options(
                tags=[node.queue], refresh_cache=refresh and key == "crawl"
            )
            with _resources(node, config.runtime):
                futures[key] = runner.submit(step, parameters=parameters)
        states = _wait(group, futures)
    made = {key: future.result() for key, future in futures.items()}
    report_stages(group, {key: (states[key], made[key]) for key in mine})
    return done | made


def run_one(config: RunConfig, key: str) -> Artifact:
    """Run the node ``key`` as a task of the current flow; what it reads must be in the store.

    Raises:
        ArtifactError: something that it reads is not in the store.
    """
    nodes = pipeline.plan(config)
    inputs = pipeline.node_inputs(nodes[key], pipeline.find_inputs(nodes, [key], config))
    return task_of(key)(key=key, config=config, inputs=inputs)


def _runner(runtime: RuntimeConfig, nodes: int, *, spread: bool) -> TaskRunner[Any]:
    """What runs the tasks of a group: threads, which may wait for Prefect workers, or Ray."""
    if not spread or runtime.tasks.runner == "workers":
        return ThreadPoolTaskRunner[Artifact](
            max_workers=nodes if spread else runtime.tasks.workers
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise ConfigError(
            "runtime.tasks.runner: ray needs the extra: pip install 'diffagent[ray]'"
        ) from None
    runner: TaskRunner[Any] = RayTaskRunner()
    return runner


def _resources(node: Node, runtime: RuntimeConfig) -> contextlib.AbstractContextManager[Any]:
    """What Ray reserves for a node."""
    if runtime.tasks.runner != "ray" or node.queue != "gpu" or not runtime.tasks.ray_gpus:
        return contextlib.nullcontext()
    from prefect_ray.context import remote_options

    options: contextlib.AbstractContextManager[Any] = remote_options(
        num_gpus=runtime.tasks.ray_gpus
    )
    return options


def _needed(
    nodes: Mapping[str, Node], mine: Mapping[str, Node], found: Mapping[str, Artifact]
) -> set[str]:
    """Keys of other groups that this one reads; all of them have to be there."""
    needed = {parent for node in mine.values() for parent in node.parents} - mine.keys()
    for key in needed - found.keys():
        raise ArtifactError(
            f"{key!r} is not in the store for this configuration; run the deployment "
            f"{nodes[key].group!r} with the same configuration first"
        )
    return needed


def _depth(nodes: Mapping[str, Node], key: str) -> int:
    """Longest way from the group's start: shards of one stage run before the next stage."""
    return 1 + max((_depth(nodes, p) for p in nodes[key].parents if p in nodes), default=0)


def _wait(group: Group, futures: Mapping[str, PrefectFuture[Artifact]]) -> dict[str, str]:
    """Wait for all tasks with a progress artifact; returns the names of their states.

    Raises:
        ArtifactError: tasks failed; each is named.
    """
    progress = cast(UUID, create_progress_artifact(0.0, key=f"{group}-progress", description=group))
    names = {future.task_run_id: key for key, future in futures.items()}
    log = get_run_logger()
    failed: dict[str, str] = {}
    states: dict[str, str] = {}
    for count, future in enumerate(as_completed(list(futures.values())), start=1):
        future.wait()  # the state is final only after this
        state = future.state
        key = names[future.task_run_id]
        states[key] = state.name or state.type.value
        log.info("%s: %s (%d of %d)", key, state.name, count, len(futures))
        if not state.is_completed():
            failed[key] = state.message or state.type.value
        update_progress_artifact(
            progress, 100 * count / len(futures), f"{count} of {len(futures)} stages done"
        )
    if failed:
        raise ArtifactError(
            f"{group}: {len(failed)} of {len(futures)} tasks failed:\n"
            + "\n".join(f"  {key}: {message}" for key, message in failed.items())
        )
    return states


def locate(config: RunConfig, keys: Iterable[str]) -> dict[str, Artifact]:
    """Those of the artefacts ``keys`` that are on disk, whole; nothing is run."""
    keys = tuple(keys)
    found = find_cached(pipeline.upstream(pipeline.plan(config), keys), config)
    return {key: found[key] for key in keys if key in found}
