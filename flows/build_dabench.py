"""Crawl, filter and write DABench."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows._compose import configure, locate, run_group
from flows._runs import pipeline_flow
from tasks._report import link_result


@pipeline_flow("build-dabench")
def build_dabench(
    config: str = "configs/sandbox.yaml",
    overrides: dict[str, Any] | None = None,
    refresh: bool = False,
) -> State[None]:
    """Crawl, filter and write DABench.

    Args:
        config: YAML file of ``diffagent.run_config.RunConfig``.
        overrides: dotted keys to values, such as {"runtime.store": "store"}.
        refresh: crawl again; when the site has nothing new, nothing else is done.
    """
    settings = configure(config, overrides)
    known = locate(settings, ["shard"]).get("shard")
    dabench = run_group(settings, "build-dabench", refresh=refresh)["shard"]
    link_result(dabench, "README.md", "Data card", key="dabench-card")
    if known and known.content_digest == dabench.content_digest:
        return Completed(message=f"Nothing new: {dabench.location} stays.")
    return Completed(message=f"DABench is in {dabench.location}.")
