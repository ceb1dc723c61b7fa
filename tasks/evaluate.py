"""Compare the selectors and write the report."""

from tasks._stage import stage_task

task = stage_task("evaluate")
