"""Everybody who answers a prompt with an API, behind one interface: agents and baselines.

A baseline sees the train split and the catalogue and nothing else:

* popular: the most used checkpoints of the train split, each as it is mostly called.
* random: a checkpoint of the catalogue, all equally likely, called as it mostly is (one that
  the train split never uses: with the parameters most used on its base model).
* nearest: the API of the training prompt with the highest TF-IDF cosine.
* sft, rrhf: an agent, decoding greedily.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffagent.agent.candidates import Answer, write_candidates
from diffagent.agent.format import response_text
from diffagent.agent.prompts import Pair, draw, read_split
from diffagent.agent.verify import Verdict, verify
from diffagent.artifacts import StageContext, StageResult, stage
from diffagent.dabench.catalogue import Catalogue, Entry
from diffagent.errors import ArtifactError, SchemaError
from schemas.api import T2IAPI
from schemas.config import SelectConfig

log = logging.getLogger(__name__)

LATENCY_PROMPTS = 32
"""Prompts that are asked one at a time to measure latency."""
RETRIES = 8
"""Answers that `select_one` asks for when the first one is no valid API."""


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        text: what was answered, verbatim.
        verdict: whether it is an API of the catalogue, and which.
        probability: of the answer, as the selector sees it; None when it has no notion of one.
        logprob: an agent's length-normalised log-probability of the text.
    """

    text: str
    verdict: Verdict
    probability: float | None = None
    logprob: float | None = None


class Selector(Protocol):
    """Answers prompts."""

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """Up to ``n`` different choices a prompt, best first; at least one."""
        ...


class Usage:
    """How the train split calls the catalogue's checkpoints."""

    def __init__(self, pairs: Iterable[Pair], catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._calls: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self._params: dict[str, Counter[str]] = defaultdict(Counter)
        for pair in pairs:
            text = response_text(pair.api)
            self._calls[pair.api.model, pair.api.version][text] += 1
            plain = pair.api.params.model_copy(update={"seed": None}).model_dump_json()
            self._params[pair.api.base_model][plain] += 1

    @cached_property
    def ranking(self) -> list[tuple[str, float]]:
        """(most frequent call, share of the pairs) of each checkpoint, most used first."""
        total = sum(calls.total() for calls in self._calls.values())
        ranked = sorted(self._calls.items(), key=lambda item: (-item[1].total(), item[0]))
        return [(_mode(calls), calls.total() / total) for _, calls in ranked]

    def call(self, entry: Entry) -> str:
        """How a checkpoint is mostly called; parameters of its base model if it never is."""
        if calls := self._calls.get((entry.model, entry.version)):
            return _mode(calls)
        params = self._params.get(entry.base_model) or sum(self._params.values(), Counter())
        api = T2IAPI.model_validate(
            {
                "model": entry.model,
                "version": entry.version,
                "base_model": entry.base_model,
                "params": json.loads(_mode(params)),
            }
        )
        return response_text(api)


@dataclass(frozen=True)
class Popular:
    """The same answer to everybody; probabilities are shares of the train split."""

    usage: Usage

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`."""
        choices = [
            Choice(text, verify(text, self.usage.catalogue), share)
            for text, share in self.usage.ranking[:n]
        ]
        return [choices for _ in prompts]


@dataclass(frozen=True)
class Random:
    """A uniform draw that depends on (seed, prompt) alone."""

    usage: Usage
    seed: int = 0

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`."""
        return [self._draw(prompt, n) for prompt in prompts]

    def _draw(self, prompt: str, n: int) -> list[Choice]:
        entries = self.usage.catalogue.checkpoints
        digest = hashlib.sha256(f"{self.seed}/{prompt}".encode(errors="replace")).digest()
        drawn = random.Random(digest).sample(entries, min(n, len(entries)))
        texts = [self.usage.call(entry) for entry in drawn]
        catalogue = self.usage.catalogue
        return [Choice(text, verify(text, catalogue), 1 / len(entries)) for text in texts]


class Nearest:
    """Copies the API of the most similar training prompt: TF-IDF of words and word pairs.

    Equal similarities: the training prompt with the lowest id. A prompt without a known word
    gets the first training prompt's API. Cosines are no probabilities, so there is none.
    """

    def __init__(self, pairs: Sequence[Pair], catalogue: Catalogue) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.catalogue = catalogue
        self._texts = [response_text(pair.api) for pair in pairs]
        # Single characters count as words: "3d" and "a" are, and so are most CJK prompts' parts.
        self._vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+", dtype=np.float32
        )
        self._train = self._vectorizer.fit_transform([pair.prompt for pair in pairs]).T.tocsr()

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`."""
        queries = self._vectorizer.transform(prompts)
        return [self._nearest(queries[i], n) for i in range(len(prompts))]

    def _nearest(self, query: Any, n: int) -> list[Choice]:
        similarity = (query @ self._train).toarray()[0]
        texts: dict[str, None] = {}
        for row in np.argsort(-similarity, kind="stable"):
            texts.setdefault(self._texts[row])
            if len(texts) == n:
                break
        return [Choice(text, verify(text, self.catalogue)) for text in texts]


class LLM:
    """An agent. One answer is greedy; more come from diverse beams, likeliest first."""

    def __init__(self, agent: Any, max_new_tokens: int = 256) -> None:
        self.agent = agent
        self.max_new_tokens = max_new_tokens

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`. ``probability`` is that of the whole text, stop included."""
        from diffagent.agent.decoding import DiverseBeams

        completions = self.agent.generate(
            prompts, max_new_tokens=self.max_new_tokens, decoding=DiverseBeams(n) if n > 1 else None
        )
        answers = [
            (i, text)
            for i, found in enumerate(completions)
            for text in dict.fromkeys(completion.text for completion in found)
        ]
        logprobs = self.agent.logprobs([prompts[i] for i, _ in answers], [t for _, t in answers])
        choices: list[list[Choice]] = [[] for _ in prompts]
        for (i, text), logprob in zip(answers, logprobs, strict=True):
            verdict = verify(text, self.agent.catalogue)
            if logprob is None:
                choices[i].append(Choice(text, verdict))
            else:
                probability = float(np.exp(logprob.total))
                choices[i].append(Choice(text, verdict, probability, logprob.mean))
        return [sorted(found, key=lambda choice: -(choice.probability or 0)) for found in choices]


def select_one(prompt: str, agent_dir: str | Path, device: str = "auto") -> T2IAPI:
    """The API that an agent answers to one prompt, air and description filled in.

    The greedy answer when it is valid. Otherwise the likeliest valid one of `RETRIES` diverse
    answers, with a warning in the log: no other selector and no default steps in.

    Raises:
        SchemaError: none of the answers is a valid API; the message says what is wrong with the
            greedy one.
        ArtifactError: the directory holds no agent.
    """
    from diffagent.agent.llm import load_agent

    selector = LLM(load_agent(agent_dir, device))
    first = selector.select([prompt])[0][0].verdict
    if first.api is not None:
        return first.api
    log.warning("the greedy answer is invalid (%s: %s)", first.reason, first.detail)
    for choice in selector.select([prompt], RETRIES)[0]:
        if choice.verdict.api is not None:
            return choice.verdict.api
    raise SchemaError(
        f"the agent has no valid API for {prompt!r:.80}: {first.reason}: {first.detail}; "
        f"{RETRIES} more answers were invalid too; train the agent longer, or ask otherwise",
        field=first.detail.partition(":")[0],
    )


@stage("select", version=1, config=SelectConfig)
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
        ArtifactError: 'sft' or 'rrhf' without an agent.
    """
    dabench = context.one("dabench").path
    if config.selector in ("sft", "rrhf"):
        from diffagent.agent.llm import load_agent

        agent = load_agent(context.one("agent").path, context.runtime.device)
        return LLM(agent, config.max_new_tokens)
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


def _mode(counts: Counter[str]) -> str:
    """The most frequent text; of equally frequent ones the first in order."""
    return min(counts, key=lambda text: (-counts[text], text))
