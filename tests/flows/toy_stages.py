"""Stages of a few lines: numbers in files. ``source`` reads the file named by TOY_SOURCE."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from diffagent.artifacts import StageContext, StageResult, stage
from diffagent.errors import ServerError, TrainingError
from schemas.manifest import Funnel, FunnelStep


class Number(BaseModel):
    model_config = ConfigDict(frozen=True)
    value: int


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


@stage("toy-total", version=1, config=Number)
def total(config: Number, context: StageContext) -> StageResult:
    return _write(context, sum(_read(context)))
