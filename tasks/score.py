"""Score the pictures of one shard."""

from tasks._stage import stage_task

task = stage_task("score")
