"""Functions that the flows share: run the nodes of a group as tasks."""

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
    """Return the configuration of a flow's parameters, with a store that other processes find."""
    settings = load_config(config, dict(overrides or {}))
    runtime = settings.runtime
    if runtime.tasks.runner == "threads" or runtime.remote:
        return settings
    absolute = runtime.model_copy(update={"store": str(Path(runtime.store).resolve())})
    return settings.model_copy(update={"runtime": absolute})


def run_group(config: RunConfig, group: Group, *, refresh: bool = False) -> dict[str, Artifact]:
    """Run every node of ``group`` as a task; the store must have its inputs of other groups.

    Raises:
        ArtifactError: another group has to run first, or tasks failed (all are named).
    """
    nodes = pipeline.plan(config)
    group_nodes = {key: node for key, node in nodes.items() if node.group == group}
    nodes = pipeline.upstream(nodes, group_nodes)  # other stages would import torch
    existing = find_cached(nodes, config)
    done = {key: existing[key] for key in _inputs_of(nodes, group_nodes, existing)}
    spread = config.runtime.tasks.runner != "threads" and any(
        node.spread for node in group_nodes.values()
    )
    with _task_runner(config.runtime, len(group_nodes), spread=spread) as runner:
        futures: dict[str, PrefectFuture[Artifact]] = {}
        for key in sorted(group_nodes, key=lambda k: _depth(group_nodes, k)):
            node = group_nodes[key]
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
    results = {key: future.result() for key, future in futures.items()}
    report_stages(group, {key: (states[key], results[key]) for key in group_nodes})
    return done | results


def run_one(config: RunConfig, key: str) -> Artifact:
    """Run the node ``key`` as a task of the current flow.

    Raises:
        ArtifactError: the store lacks an input of the node.
    """
    nodes = pipeline.plan(config)
    inputs = pipeline.node_inputs(nodes[key], pipeline.find_inputs(nodes, [key], config))
    return task_of(key)(key=key, config=config, inputs=inputs)


def _task_runner(runtime: RuntimeConfig, nodes: int, *, spread: bool) -> TaskRunner[Any]:
    """Return the task runner of a group: threads, which may wait for Prefect workers, or Ray."""
    if not spread or runtime.tasks.runner == "workers":
        return ThreadPoolTaskRunner[Artifact](
            max_workers=nodes if spread else runtime.tasks.workers
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise ConfigError(
            "runtime.tasks.runner 'ray' needs the extra: pip install 'diffagent[ray]'"
        ) from None
    runner: TaskRunner[Any] = RayTaskRunner()
    return runner


def _resources(node: Node, runtime: RuntimeConfig) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Ray reserves GPUs for a node."""
    if runtime.tasks.runner != "ray" or node.queue != "gpu" or not runtime.tasks.ray_gpus:
        return contextlib.nullcontext()
    from prefect_ray.context import remote_options

    options: contextlib.AbstractContextManager[Any] = remote_options(
        num_gpus=runtime.tasks.ray_gpus
    )
    return options


def _inputs_of(
    nodes: Mapping[str, Node], group_nodes: Mapping[str, Node], existing: Mapping[str, Artifact]
) -> set[str]:
    """Return the keys of other groups that a group reads.

    Raises:
        ArtifactError: the store lacks one of them.
    """
    parents = {parent for node in group_nodes.values() for parent in node.parents}
    inputs = parents - group_nodes.keys()
    for key in inputs - existing.keys():
        raise ArtifactError(
            f"{key!r} is not in the store for this configuration; run the deployment "
            f"{nodes[key].group!r} with the same configuration first"
        )
    return inputs


def _depth(nodes: Mapping[str, Node], key: str) -> int:
    """Return the longest path to a node: all shards of a stage have the same."""
    return 1 + max((_depth(nodes, p) for p in nodes[key].parents if p in nodes), default=0)


def _wait(group: Group, futures: Mapping[str, PrefectFuture[Artifact]]) -> dict[str, str]:
    """Wait for all tasks with a progress artifact; return the names of their states.

    Raises:
        ArtifactError: tasks failed (all are named).
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
    """Return the artifacts of the nodes ``keys`` that the store has; run nothing."""
    keys = tuple(keys)
    existing = find_cached(pipeline.upstream(pipeline.plan(config), keys), config)
    return {key: existing[key] for key in keys if key in existing}
