"""Crawl the site into a raw snapshot."""

from tasks._stage import stage_task

task = stage_task("crawl")
