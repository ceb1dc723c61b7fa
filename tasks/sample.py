"""Sample candidate APIs from the SFT agent, one task a shard of prompts."""

from tasks._stage import stage_task

task = stage_task("sample")
