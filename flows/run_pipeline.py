"""The flow ``run-pipeline``: the four groups of the plan one after the other."""

from __future__ import annotations

from typing import Any

import typer
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows._compose import configure, locate
from flows._runs import pipeline_flow
from flows.group_flows import build_dabench, evaluate_agent, train_rrhf, train_sft
from tasks._report import link_result

#: Nodes of the results of a run: dataset, agent, report.
RESULTS = ("shard", "rrhf", "evaluate")


@pipeline_flow("run-pipeline", "Run the whole plan, from a crawl to an evaluated agent.")
def run_pipeline(
    config: str = "configs/sandbox.yaml",
    overrides: dict[str, Any] | None = None,
    refresh: bool = False,
) -> State[None]:
    """Run the four flows one after the other; stages in the store are not run again.

    Args:
        config: YAML file of a run; 'diffagent config' prints its settings.
        overrides: dotted keys to values, such as {"runtime.store": "store"}.
        refresh: crawl again; if the site has not changed, all other stages are Cached.
    """
    build_dabench(config, overrides, refresh)
    train_sft(config, overrides)
    train_rrhf(config, overrides)
    evaluate_agent(config, overrides)
    results = locate(configure(config, overrides), RESULTS)
    link_result(results["evaluate"], "report.html", "Report with pictures", key="pipeline-report")
    link_result(results["shard"], "README.md", "Data card", key="pipeline-dataset")
    return Completed(message=f"The agent is in {results['rrhf'].location}.")


def main(config: str, store: str | None = None) -> None:
    """Run the whole pipeline and print where its results are.

    Args:
        config: YAML file of a run.
        store: store to use instead of that of the configuration.
    """
    overrides = {"runtime.store": store} if store else {}
    run_pipeline(config, overrides)
    settings = configure(config, overrides)
    results = locate(settings, RESULTS)
    typer.echo(
        f"\nDataset  {results['shard'].location}\n"
        f"Agent    {results['rrhf'].location}\n"
        f"Report   {results['evaluate'].file('report.html')}\n"
        "\nThe runs, stage by stage: make serve-dashboard, then http://127.0.0.1:4200\n"
        f'Try the agent: diffagent select "a red star" --agent {results["rrhf"].location}'
    )


if __name__ == "__main__":
    typer.run(main)
