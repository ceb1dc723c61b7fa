"""Write DABench's parquet shards, mapping dictionaries and card."""

from tasks._stage import stage_task

task = stage_task("shard")
