"""Filter models and generation records; parse and join them."""

from tasks._stage import stage_task

task = stage_task("filter")
