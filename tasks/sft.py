"""Supervised fine-tuning of the agent."""

from tasks._stage import stage_task

task = stage_task("sft")
