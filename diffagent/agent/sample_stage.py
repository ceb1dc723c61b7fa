"""The stage ``sample``: candidates for RRHF, judged before they cost a render."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffagent.agent.candidates import Answer, write_candidates
from diffagent.agent.lm.format import response_text
from diffagent.agent.prompts import Pair, draw, read_split
from diffagent.agent.sample_config import SampleShard, SamplingConfig
from diffagent.agent.verify import verify
from diffagent.errors import ConfigError
from diffagent.store import StageContext, StageResult, stage
from diffagent.t2i.catalogue import Catalogue

if TYPE_CHECKING:
    from diffagent.agent.decoding.strategies import Decoding
    from diffagent.agent.lm.llm import Agent, Completion

log = logging.getLogger(__name__)


@stage("sample", version=4, config=SampleShard)
def sample(config: SampleShard, context: StageContext) -> StageResult:
    """One shard of the drawn train prompts -> candidates.parquet.

    For each prompt: its DABench API (source 'dabench'), then the distinct answers among
    ``num_candidates`` sampled ones (source 'sft'). Two answers are the same when they call the
    same API, however it is spelt; invalid ones when their texts are equal. A truncated answer is
    counted apart; it gets no reward.
    """
    from diffagent.agent.lm.llm import load_agent

    dabench = context.one("dabench").path
    agent = load_agent(context.one("agent").path, context.runtime.device)
    # Prompts of like length share a batch; the answers do not depend on that.
    drawn = draw(read_split(dabench, "train"), config.num_prompts, config.seed)
    pairs = sorted(drawn[config.shard :: config.num_shards], key=lambda pair: len(pair.prompt))
    engine = VLLM(agent, context.one("agent").path) if config.engine == "vllm" else agent
    completions = engine.generate(
        [pair.prompt for pair in pairs],
        max_new_tokens=config.max_new_tokens,
        decoding=decoding(config),
        batch_size=config.batch_size,
        constrained=config.decoding == "constrained",
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


class VLLM:
    """vLLM behind the agent's interface, for sampling on a GPU.

    Batches are vLLM's own, and it encodes the prompt of several candidates once. What it samples
    depends on (seed, prompt, candidate), but its numbers are not those of transformers.

    Never run by its authors, who had no GPU: the tests check the calls that it makes.

    Args:
        agent: gives tokenizer and template.
        directory: the agent's directory, which vLLM loads the weights from.
    """

    def __init__(self, agent: Agent, directory: Path) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                "sampling.engine is 'vllm', which is not installed; pip install "
                "'diffagent[vllm]' on a machine with a GPU, or set engine: transformers"
            ) from error
        self.agent, self.params = agent, vllm.SamplingParams
        self.model = vllm.LLM(str(directory), enable_prefix_caching=True, trust_remote_code=False)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None,
        decoding: Decoding,
        batch_size: int,
        constrained: bool = False,
    ) -> list[list[Completion]]:
        """Sampled answers; ``batch_size`` is left to vLLM.

        Raises:
            ConfigError: ``decoding`` is none that vLLM has, or is to be constrained.
        """
        from diffagent.agent.decoding.strategies import TopP

        if constrained or not isinstance(decoding, TopP):
            raise ConfigError(f"vLLM samples (TopP) unconstrained and does not do {decoding!r}")
        encoded = self.agent.encode(prompts, max_new_tokens)
        rooms = self.agent.rooms(encoded, max_new_tokens)
        params = [
            self.params(
                n=decoding.num_candidates,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                max_tokens=room,
                seed=_seed(decoding.seed, prompt),
                stop_token_ids=[self.agent.tokenizer.eos_token_id],
                detokenize=False,
            )
            for prompt, room in zip(prompts, rooms, strict=True)
        ]
        asked = [{"prompt_token_ids": ids} for ids in encoded]
        outputs = self.model.generate(asked, params, use_tqdm=False)
        return [
            [self.agent.completion(list(answer.token_ids)) for answer in output.outputs]
            for output in outputs
        ]


def _seed(seed: int, prompt: str) -> int:
    digest = hashlib.sha256(f"{seed}/{prompt}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:4], "big")


def decoding(config: SamplingConfig) -> Decoding:
    """How the candidates of a prompt are made different from one another."""
    from diffagent.agent.decoding.strategies import DiverseBeams, TopP

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
    texts = [("dabench", response_text(pair.api), True)]
    texts += [("sft", completion.text, completion.ended) for completion in completions]
    for source, text, ended in texts:
        verdict = verify(text, catalogue, ended=ended)
        key = verdict.api.to_json() if verdict.api else text
        if key not in seen:
            seen.add(key)
            result.append(Answer(pair, source, next(numbers[source]), text, verdict))
    return result
