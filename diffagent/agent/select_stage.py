"""The stage ``select``: every selector by name.

* popular: the most used checkpoints of the train split, each as it is mostly called.
* random: a checkpoint of the catalogue, all equally likely, called as it mostly is (one that
  the train split never uses: with the parameters most used on its base model).
* nearest: the API of the training prompt with the highest TF-IDF cosine.
* neighbours, bm25, embeddings, cards, card-embeddings, model-token, combined: fitted once and kept
  in the store, see `diffagent.agent.retrieval.fitting`.
* sft, rrhf: an agent, decoding greedily, constrained to valid APIs or not.
* reranked: an agent chooses among what ``combined`` proposes, see
`diffagent.agent.retrieval.reranked`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from diffagent.agent.baselines import Nearest, Popular, Random, Usage
from diffagent.agent.candidates import Answer, write_candidates
from diffagent.agent.prompts import draw, read_split
from diffagent.agent.retrieval.fit_stage import fitted_selector
from diffagent.agent.retrieval.fitting import FITTED
from diffagent.agent.retrieval.rerank_config import RerankConfig
from diffagent.agent.select_config import SelectConfig
from diffagent.agent.selector import Selector
from diffagent.errors import ArtifactError
from diffagent.store import StageContext, StageResult, stage
from diffagent.t2i.catalogue import Catalogue

log = logging.getLogger(__name__)

LATENCY_PROMPTS = 32
"""Prompts that are asked one at a time to measure latency."""


@stage("select", version=2, config=SelectConfig)
def select(config: SelectConfig, context: StageContext) -> StageResult:
    """A selector's answers to the drawn prompts of a split -> candidates.parquet."""
    dabench = context.one("dabench").path
    pairs = draw(read_split(dabench, config.split), config.num_prompts, config.seed)
    started = time.perf_counter()
    selector = build_selector(config, context)
    load_seconds = time.perf_counter() - started
    prompts = [pair.prompt for pair in pairs]
    answers = selector.select(prompts)
    rows = [
        Answer(pair, config.selector, 0, best.text, best.verdict).row(best.logprob)
        for pair, (best, *_) in zip(pairs, answers, strict=True)
    ]
    counts = write_candidates(rows, context.out)
    log.info("%s: %s", config.selector, counts)
    return StageResult(
        rows={"candidates": len(rows)},
        metrics={
            "outcomes": counts,
            "load_seconds": load_seconds,
            "latency_seconds": latency(selector, prompts[:LATENCY_PROMPTS]),
        },
    )


def build_selector(config: SelectConfig, context: StageContext) -> Selector:
    """The selector of that name, trained on the train split or loaded from input 'agent'.

    Raises:
        ArtifactError: 'sft', 'rrhf' or 'reranked' without an agent.
    """
    dabench = context.one("dabench").path
    if config.selector in ("sft", "rrhf"):
        from diffagent.agent.llm_selector import LLM
        from diffagent.agent.lm.llm import load_agent

        agent = load_agent(context.one("agent").path, context.runtime.device)
        return LLM(agent, config.max_new_tokens, constrained=config.decoding == "constrained")
    if config.selector == "reranked":
        from diffagent.agent.retrieval.rerank_stage import reranked_selector

        rerank = RerankConfig(encoder=config.encoder, seed=config.seed)
        return reranked_selector(
            rerank, context.one("dabench"), context.one("agent"), context.runtime
        )
    if config.selector in FITTED:
        return fitted_selector(
            config.selector, context.one("dabench"), context.runtime, config.encoder, config.seed
        )
    train, catalogue = read_split(dabench, "train"), Catalogue.load(dabench)
    if not catalogue.checkpoints:
        raise ArtifactError(f"the catalogue of {str(dabench)!r} has no checkpoint to select")
    if config.selector == "nearest":
        return Nearest(train, catalogue)
    usage = Usage(train, catalogue)
    return Popular(usage) if config.selector == "popular" else Random(usage, config.seed)


def latency(selector: Selector, prompts: Sequence[str]) -> dict[str, float]:
    """Seconds that one prompt takes when it is asked alone: mean, p50 and p95."""
    seconds = []
    for prompt in prompts:
        started = time.perf_counter()
        selector.select([prompt])
        seconds.append(time.perf_counter() - started)
    p50, p95 = np.percentile(seconds, [50, 95]).tolist()
    return {"mean": sum(seconds) / len(seconds), "p50": p50, "p95": p95}
