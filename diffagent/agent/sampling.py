"""The stage ``sample``: candidates for RRHF, judged before they cost a render."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from diffagent.agent.candidates import Answer, write_candidates
from diffagent.agent.decoding import Decoding, DiverseBeams, TopP
from diffagent.agent.format import response_text
from diffagent.agent.llm import Completion, load_agent
from diffagent.agent.prompts import Pair, draw, read_split
from diffagent.agent.verify import verify
from diffagent.artifacts import StageContext, StageResult, stage
from diffagent.dabench.catalogue import Catalogue
from schemas.config import SampleShard, SamplingConfig

log = logging.getLogger(__name__)


@stage("sample", version=1, config=SampleShard)
def sample(config: SampleShard, context: StageContext) -> StageResult:
    """One shard of the drawn train prompts -> candidates.parquet.

    For each prompt: its DABench API (source 'dabench'), then the distinct answers among
    ``num_candidates`` sampled ones (source 'sft'). Two answers are the same when they call the
    same API, however it is spelt; invalid ones when their texts are equal.
    """
    dabench = context.one("dabench").path
    agent = load_agent(context.one("agent").path, context.runtime.device)
    drawn = draw(read_split(dabench, "train"), config.num_prompts, config.seed)
    pairs = drawn[config.shard :: config.num_shards]
    completions = agent.generate(
        [pair.prompt for pair in pairs],
        max_new_tokens=config.max_new_tokens,
        decoding=decoding(config),
        batch_size=config.batch_size,
    )
    catalogue = Catalogue.load(dabench)
    answers = [
        answer
        for pair, sampled in zip(pairs, completions, strict=True)
        for answer in distinct(pair, sampled, catalogue)
    ]
    logprobs = agent.logprobs([a.pair.prompt for a in answers], [a.text for a in answers])
    rows = [a.row(p.mean if p else None) for a, p in zip(answers, logprobs, strict=True)]
    counts = write_candidates(rows, context.out)
    drawn_answers = sum(len(sampled) for sampled in completions)
    kept = sum(answer.source == "sft" for answer in answers)
    log.info("shard %d: %d prompts, %d candidates: %s", config.shard, len(pairs), len(rows), counts)
    return StageResult(
        rows={"candidates": len(rows)},
        metrics={
            "prompts": len(pairs),
            "sampled": drawn_answers,
            "duplicates": drawn_answers - kept,
            "outcomes": counts,
        },
    )


def decoding(config: SamplingConfig) -> Decoding:
    """How the candidates of a prompt are made different from one another."""
    if config.num_beam_groups:
        return DiverseBeams(
            config.num_candidates, config.diversity_penalty, temperature=config.temperature
        )
    return TopP(config.num_candidates, config.temperature, config.top_p, config.seed)


def distinct(pair: Pair, completions: Sequence[Completion], catalogue: Catalogue) -> list[Answer]:
    """The pair's DABench API, and each completion that none before it equals."""
    seen: set[str] = set()
    result = []
    numbers = {"dabench": itertools.count(), "sft": itertools.count()}
    texts = [("dabench", response_text(pair.api))]
    texts += [("sft", completion.text) for completion in completions]
    for source, text in texts:
        verdict = verify(text, catalogue)
        key = verdict.api.to_json() if verdict.api else text
        if key not in seen:
            seen.add(key)
            result.append(Answer(pair, source, next(numbers[source]), text, verdict))
    return result
