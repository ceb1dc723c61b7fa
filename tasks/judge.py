"""Ask the held-out judges about the pictures of one selector."""

from tasks._stage import stage_task

task = stage_task("judge")
