"""The whole DAG: from a crawl to an evaluated agent."""

from __future__ import annotations

from typing import Any

import typer
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows._compose import configure, locate
from flows.build_dabench import build_dabench
from flows.evaluate_agent import evaluate_agent
from flows.train_rrhf import train_rrhf
from flows.train_sft import train_sft


@flow(name="run-pipeline", persist_result=False)
def run_pipeline(
    config: str = "configs/sandbox.yaml",
    overrides: dict[str, Any] | None = None,
    refresh: bool = False,
) -> State[None]:
    """Run the four flows one after the other, each from cache where it can.

    Args:
        config: YAML file of ``schemas.config.PipelineConfig``.
        overrides: dotted keys to values, such as {"runtime.store": "store"}.
        refresh: crawl again; when the site has nothing new, all else is Cached.
    """
    build_dabench(config, overrides, refresh)
    train_sft(config, overrides)
    train_rrhf(config, overrides)
    evaluate_agent(config, overrides)
    return Completed(message="Every stage is done.")


def main(config: str, store: str | None = None) -> None:
    """Run the whole pipeline (``store``: instead of the config's) and say where its results are."""
    overrides = {"runtime.store": store} if store else {}
    run_pipeline(config, overrides)
    settings = configure(config, overrides)
    found = locate(settings, ("shard", "rrhf", "evaluate"))
    typer.echo(
        f"\nDataset  {found['shard'].location}\n"
        f"Agent    {found['rrhf'].location}\n"
        f"Report   {found['evaluate'].file('report.html')}\n"
        "\nThe runs, stage by stage: make serve-dashboard, then http://127.0.0.1:4200\n"
        f'Ask the agent: diffagent select "a red star" --agent {found["rrhf"].location}'
    )


if __name__ == "__main__":
    typer.run(main)
