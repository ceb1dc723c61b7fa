"""Stages of a few lines: numbers in files. ``source`` reads the file named by TOY_SOURCE."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from diffagent import pipeline
from diffagent.errors import ServerError, TrainingError
from diffagent.pipeline import Node
from diffagent.run_config import RunConfig
from diffagent.schemas.manifest import Funnel, FunnelStep
from diffagent.store import StageContext, StageResult, stage


class Number(BaseModel):
    model_config = ConfigDict(frozen=True)
    value: int


def slow_plan(config: RunConfig) -> dict[str, Node]:
    """crawl -> {render-0 .. render-2} -> shard; the renders run anywhere, two at a time."""
    group, toys, shards = "build-dabench", "tests.flows.toy_stages", range(3)
    renders = [
        Node(
            f"render-{i}",
            f"{toys}:slow",
            Number(value=i),
            {"numbers": ("crawl",)},
            group,
            spread=True,
        )
        for i in shards
    ]
    parents = {"numbers": tuple(node.key for node in renders)}
    nodes = [
        Node("crawl", f"{toys}:source", Number(value=3), {}, group),
        *renders,
        Node("shard", f"{toys}:total", Number(value=0), parents, group),
    ]
    return {node.key: node for node in nodes}


def use_slow_plan() -> None:
    """For processes that no fixture reaches."""
    pipeline.plan = slow_plan


def _read(context: StageContext) -> list[int]:
    return [int(a.file("number").read_text()) for a in context.many("numbers")]


def _write(context: StageContext, number: int) -> StageResult:
    Path(context.out, "number").write_text(str(number))
    funnel = Funnel(
        unit="numbers", seen=3, kept=2, steps=(FunnelStep(filter="odd", reason="odd", dropped=1),)
    )
    return StageResult(rows={"numbers": 1}, funnels=(funnel,), metrics={"sum": number})


@stage("toy-source", version=1, config=Number)
def source(config: Number, context: StageContext) -> StageResult:
    if path := os.environ.get("TOY_SOURCE"):
        return _write(context, int(Path(path).read_text()))
    return _write(context, config.value)


@stage("toy-double", version=1, config=Number)
def double(config: Number, context: StageContext) -> StageResult:
    if (path := os.environ.get("TOY_FAULTS")) and config.value == 1:
        faults = Path(path).read_text().split()
        Path(path).write_text(" ".join(faults[1:]))
        if faults and faults[0] == "retryable":
            raise ServerError("toy: try again")
        if faults and faults[0] == "final":
            raise TrainingError("toy: never again")
    return _write(context, 2 * sum(_read(context)) + config.value)


@stage("toy-slow", version=1, config=Number)
def slow(config: Number, context: StageContext) -> StageResult:
    """Says in TOY_MEETING that and where it began, and waits for 'go'."""
    meeting = Path(os.environ["TOY_MEETING"])
    name = f"{config.value}.{os.getpid()}.{time.monotonic_ns()}"
    Path(meeting, f"{name}.started").touch()
    while not Path(meeting, "go").exists():
        time.sleep(0.05)
    Path(meeting, f"{name}.ended").touch()
    return _write(context, sum(_read(context)) + config.value)


@stage("toy-total", version=1, config=Number)
def total(config: Number, context: StageContext) -> StageResult:
    return _write(context, sum(_read(context)))
