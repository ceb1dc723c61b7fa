"""Candidates by retrieval, choice by the agent.

A fitted selector proposes k models, each with a call; the agent says how likely it is to begin its
answer with each one's name. Both are weighed by a conditional logit on validation prompts:

    P(m) = (sum of P_r over the candidates) softmax_m(a log P_r(m) + b log p(m))

with P_r of the fitted selector and p of the language model, so that a model which retrieval leaves
out keeps what it had. Nothing is generated: k names are one pass after that over the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffagent.agent.decoding.grammar import name_text
from diffagent.agent.decoding.trie import encode_texts
from diffagent.agent.lm.key_values import KeyValues
from diffagent.agent.retrieval.mixture import fit_weights
from diffagent.agent.retrieval.ranked import Ranked
from diffagent.agent.selector import Choice
from diffagent.t2i.catalogue import Catalogue

if TYPE_CHECKING:
    from diffagent.agent.lm.llm import Agent
    from diffagent.agent.retrieval.terms import Floats

log = logging.getLogger(__name__)

_BATCH = 8  # prompts at a time: (8 x 20 names, 15 tokens, 50,000 words) logits are 500 MB
_EQUAL = (0.5, 0.5)  # the geometric mean


@dataclass(frozen=True)
class Reranked:
    """Different models, likeliest first; ``probability`` is that of the model.

    Attributes:
        retrieval: proposes, and chooses versions and parameters.
        agent: judges.
        weights: a and b.
        candidates: k.
    """

    retrieval: Ranked
    agent: Agent
    weights: tuple[float, float]
    candidates: int

    @property
    def catalogue(self) -> Catalogue:
        """See `Selector`."""
        return self.retrieval.catalogue

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`."""
        return [
            self._order(choices, features)[:n]
            for choices, features in proposals(
                self.retrieval, self.agent, prompts, max(self.candidates, n)
            )
        ]

    def only(self, names: Collection[tuple[str, str]]) -> Reranked:
        """The selector restricted to some (model, version); see `Ranked.only`."""
        return replace(self, retrieval=self.retrieval.only(names))

    def _order(self, choices: Sequence[Choice], features: Floats) -> list[Choice]:
        logits = features @ np.array(self.weights)
        shares = np.exp(logits - logits.max())
        shares *= np.exp(features[:, 0]).sum() / shares.sum()
        order = np.argsort(-shares, kind="stable").tolist()
        return [replace(choices[i], probability=float(shares[i])) for i in order]


def proposals(
    retrieval: Ranked, agent: Agent, prompts: Sequence[str], candidates: int
) -> list[tuple[list[Choice], Floats]]:
    """Of each prompt the choices of retrieval, and (choices, 2) both log-probabilities of each."""
    found = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        proposed = retrieval.select(batch, candidates)
        names = [[_name(choice) for choice in choices] for choices in proposed]
        for choices, said in zip(proposed, name_logprobs(agent, batch, names), strict=True):
            chances = [max(choice.probability or 0, 1e-30) for choice in choices]
            features = np.stack([np.log(chances), said], axis=1).astype(np.float32)
            found.append((choices, features))
    return found


def name_logprobs(
    agent: Agent, prompts: Sequence[str], names: Sequence[Sequence[tuple[str, str]]]
) -> list[list[float]]:
    """How likely the agent is to begin its answer to each prompt with each (model, version).

    Returns:
        Sums of the log-probabilities of the tokens after those that all the names begin with.
    """
    texts = [name_text(*name) for own in names for name in own]
    owners = [prompt for prompt, own in enumerate(names) for _ in own]
    ids = encode_texts(agent.tokenizer, texts)
    shortest = min(map(len, ids)) - 1
    common = next((i for i in range(shortest) if len({row[i] for row in ids}) > 1), shortest)
    keys = KeyValues(agent.model, agent.device)
    read = [[*prompt, *ids[0][:common]] for prompt in agent.encode(prompts, max(map(len, ids)))]
    first = keys.feed(read, [[len(row) - 1] for row in read])
    keys.select(owners)
    rests = [tokens[common:] for tokens in ids]
    after = [first[owner][:0] for owner in owners]
    if any(len(rest) > 1 for rest in rests):  # of the last token only the probability is wanted
        after = keys.feed([rest[:-1] for rest in rests], [range(len(rest) - 1) for rest in rests])
    said: list[list[float]] = [[] for _ in prompts]
    for owner, rest, logits in zip(owners, rests, after, strict=True):
        logprobs = torch.cat([first[owner], logits]).log_softmax(-1)
        chosen = torch.tensor(rest, device=logprobs.device)
        said[owner].append(float(logprobs.gather(1, chosen[:, None]).double().sum()))
    return said


def fit_reranked(
    retrieval: Ranked,
    agent: Agent,
    prompts: Sequence[str],
    chosen: Sequence[str],
    candidates: int,
) -> tuple[Reranked, int]:
    """Weights that make what was ``chosen`` for validation prompts likely.

    Returns:
        The selector, and how many prompts had what was chosen among the candidates: the others
        say nothing. Without any, both weigh the same.
    """
    rows = []
    for (choices, features), model in zip(
        proposals(retrieval, agent, prompts, candidates), chosen, strict=True
    ):
        truth = [i for i, choice in enumerate(choices) if _name(choice)[0] == model]
        if truth:  # it comes first
            rows.append(features[[*truth, *(i for i in range(len(choices)) if i not in truth)]])
    weights = np.array([_EQUAL])
    if rows:
        features = np.stack(rows)
        each_one = np.zeros(features.shape[:2])
        weights = fit_weights(features, each_one, np.ones((len(rows), 1)), weights)
    a, b = weights[0].tolist()
    log.info("weights of retrieval and agent: %.2f, %.2f (n = %d)", a, b, len(rows))
    return Reranked(retrieval, agent, (a, b), candidates), len(rows)


def _name(choice: Choice) -> tuple[str, str]:
    assert choice.verdict.api is not None, "what is fitted answers with valid calls alone"
    return choice.verdict.api.model, choice.verdict.api.version
