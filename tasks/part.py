"""Take one part of a selector's answers."""

from tasks._stage import stage_task

task = stage_task("part")
