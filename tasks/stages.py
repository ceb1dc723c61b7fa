"""The Prefect tasks: one for each stage of the plan, made when a flow first runs it."""

from __future__ import annotations

import functools

from prefect import Task

from diffagent.store import Artifact
from tasks._stage import stage_task


def task_of(key: str) -> Task[..., Artifact]:
    """Return the task of a node, e.g. of 'render-3': that of all shards of its stage."""
    return _task(key.split("-", maxsplit=1)[0])


_task = functools.cache(stage_task)
