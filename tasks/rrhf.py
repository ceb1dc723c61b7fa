"""Align the agent with the rewards (RRHF)."""

from tasks._stage import stage_task

task = stage_task("rrhf")
