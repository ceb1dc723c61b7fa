"""Compare the agent with its baselines on held-out prompts."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed

from diffagent.evaluation.summary import read_metrics, summary_markdown, tables
from flows._compose import configure, run_group
from flows._runs import pipeline_flow
from tasks._report import report_evaluation


@pipeline_flow("evaluate-agent")
def evaluate_agent(
    config: str = "configs/sandbox.yaml", overrides: dict[str, Any] | None = None
) -> State[None]:
    """Compare the agent with its baselines on held-out prompts.

    Args:
        config: YAML file of ``diffagent.run_config.RunConfig``.
        overrides: dotted keys to values, such as {"runtime.store": "store"}.
    """
    settings = configure(config, overrides)
    report = run_group(settings, "evaluate-agent")["evaluate"]
    metrics = read_metrics(report)
    report_evaluation(report, summary_markdown(metrics), tables(metrics))
    return Completed(message=f"The report is {report.file('report.html')}.")
