"""One flow for each group of the plan; prefect.yaml names them as entrypoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from diffagent.evaluation.summary import read_metrics, summary_markdown, tables
from diffagent.pipeline import Group
from diffagent.store import Artifact
from flows._compose import configure, locate, run_group
from flows._runs import pipeline_flow
from tasks._report import link_result, report_evaluation


@pipeline_flow("build-dabench", "Crawl the site, filter, and write DABench.")
def build_dabench(
    config: str = "configs/sandbox.yaml",
    overrides: dict[str, Any] | None = None,
    refresh: bool = False,
) -> State[None]:
    """Crawl the site, filter, and write DABench.

    Args:
        config: YAML file of a run; 'diffagent config' prints its settings.
        overrides: dotted keys to values, such as {"runtime.store": "store"}.
        refresh: crawl again; when the site has nothing new, no later stage runs.
    """
    settings = configure(config, overrides)
    existing = locate(settings, ["shard"]).get("shard")
    dabench = run_group(settings, "build-dabench", refresh=refresh)["shard"]
    link_result(dabench, "README.md", "Data card", key="dabench-card")
    if existing and existing.content_digest == dabench.content_digest:
        return Completed(message=f"Nothing new: {dabench.location} stays.")
    return Completed(message=f"DABench is in {dabench.location}.")


def _group_flow(
    group: Group, last: str, description: str, describe: Callable[[Artifact], str]
) -> Flow[..., State[None]]:
    """Make the flow of a group.

    Args:
        group: a group of ``diffagent.pipeline.plan``.
        last: key of the node whose artifact is the result.
        description: of the flow and its deployment, one sentence.
        describe: returns the message of a completed run.
    """

    @pipeline_flow(group, description)
    def run(
        config: str = "configs/sandbox.yaml", overrides: dict[str, Any] | None = None
    ) -> State[None]:
        """Run the stages of one group.

        Args:
            config: YAML file of a run; 'diffagent config' prints its settings.
            overrides: dotted keys to values, such as {"runtime.store": "store"}.
        """
        return Completed(message=describe(run_group(configure(config, overrides), group)[last]))

    return run


def _describe_agent(agent: Artifact) -> str:
    return f"The agent is in {agent.location}."


def _report(evaluation: Artifact) -> str:
    metrics = read_metrics(evaluation)
    report_evaluation(evaluation, summary_markdown(metrics), tables(metrics))
    return f"The report is {evaluation.file('report.html')}."


train_sft = _group_flow(
    "train-sft", "sft", "Fine-tune the language model on DABench.", _describe_agent
)
train_rrhf = _group_flow(
    "train-rrhf", "rrhf", "Sample, render, score, and align the agent.", _describe_agent
)
evaluate_agent = _group_flow(
    "evaluate-agent",
    "evaluate",
    "Compare the agent with its baselines on held-out prompts.",
    _report,
)
