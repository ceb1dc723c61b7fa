"""Ask one selector for an API for every held-out prompt."""

from tasks._stage import stage_task

task = stage_task("select")
