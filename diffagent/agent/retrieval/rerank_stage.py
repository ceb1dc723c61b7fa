"""The stage ``rerank``: weighs a fitted selector, which proposes, and an agent, which chooses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from diffagent.agent.lm.llm import load_agent
from diffagent.agent.retrieval.fit_stage import fitted_selector
from diffagent.agent.retrieval.ranked import Ranked
from diffagent.agent.retrieval.rerank_config import RerankConfig
from diffagent.agent.retrieval.reranked import Reranked, fit_reranked
from diffagent.agent.retrieval.training_calls import read_rows
from diffagent.errors import ArtifactError
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact, StageContext, StageResult, stage
from diffagent.t2i.catalogue import Catalogue

if TYPE_CHECKING:
    from diffagent.agent.lm.llm import Quantization

_FILE = "reranker.json"


@stage("rerank", version=2, config=RerankConfig)
def fit_reranker(config: RerankConfig, context: StageContext) -> StageResult:
    """Fit the weights of retrieval and agent on validation prompts; writes reranker.json."""
    dabench = context.one("dabench")
    rows = read_rows(dabench.path).filter(split="validation")
    rows = rows.sample(min(config.num_prompts, rows.height), seed=config.seed, shuffle=True)
    reranked, used = fit_reranked(
        _retrieval(config, dabench, context.runtime),
        load_agent(context.one("agent").path, context.runtime.device, generates=False),
        rows["prompt"].to_list(),
        [orjson.loads(api)["model"] for api in rows["api"]],
        config.candidates,
    )
    weights = dict(zip(("retrieval", "agent"), reranked.weights, strict=True))
    (context.out / _FILE).write_bytes(orjson.dumps(weights, option=orjson.OPT_INDENT_2))
    return StageResult(rows={"validation": rows.height, "used": used}, metrics=weights)


def reranked_selector(
    config: RerankConfig,
    dabench: Artifact,
    agent: Artifact,
    runtime: RuntimeConfig,
    quantization: Quantization = "none",
) -> Reranked:
    """Returns an agent that chooses among the proposals of a selector fitted on a DABench.

    Raises:
        ArtifactError: the agent was trained on another catalogue.
    """
    judge = load_agent(agent.local(), runtime.device, quantization, generates=False)
    if judge.catalogue.entries != Catalogue.load(dabench.local()).entries:
        raise ArtifactError(
            f"the agent in {agent.location!r} was trained on another catalogue than that of "
            f"{dabench.location!r}; give the DABench that it was trained on"
        )
    fitted = fit_reranker.run(config, {"dabench": [dabench], "agent": [agent]}, runtime)
    facts = orjson.loads(Path(fitted.local(), _FILE).read_bytes())
    retrieval = _retrieval(config, dabench, runtime)
    return Reranked(retrieval, judge, (facts["retrieval"], facts["agent"]), config.candidates)


def _retrieval(config: RerankConfig, dabench: Artifact, runtime: RuntimeConfig) -> Ranked:
    return fitted_selector(config.retrieval, dabench, runtime, config.encoder, config.seed)
