"""The agent as a selector."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffagent.agent.selector import Choice
from diffagent.agent.verify import verify

if TYPE_CHECKING:
    from diffagent.agent.decoding.grammar import NegativePrompts
    from diffagent.agent.lm.llm import Agent
    from diffagent.t2i.catalogue import Catalogue

log = logging.getLogger(__name__)

BEAMS = 8
"""Names that are scored at least where several choices are asked for."""


class LLM:
    """An agent.

    Constrained, every choice is a valid API of another checkpoint, and ``probability`` is that
    of its model and version: p(x) / (sum of p over the names that were scored + p of the
    beginnings that were not followed), where p is what the language model gives the tokens of
    the name after those that all answers begin with, everything that is forced up to the next
    decision included. A beginning stands for all names under it, so the denominator covers the
    whole catalogue and shrinks only by what the model would spend outside of it: with more beams
    the probability rises to p(x) / p(any name of the catalogue). Parameters are greedy and take
    no part in it.

    A temperature T is applied to names, after the search: each p above becomes p^(1/T), and the
    choices stay the same. A beginning counts as a single name; the probability is exact once every
    name is scored.

    Unconstrained, one choice is greedy, more come from diverse beams, and ``probability`` is that
    of the whole text, stop included; what is no API is returned as it is.

    Args:
        agent: see `diffagent.agent.lm.llm.load_agent`.
        max_new_tokens: of an answer; None: the room that the agent's ``max_length`` leaves.
        constrained: whether invalid answers are impossible.
        beams: names that are scored; by default one for one choice (greedy), else `BEAMS` or as
            many as choices.
        temperature: of the probabilities of names; above 1 for an agent that is too sure.
        negative_prompts: see `diffagent.agent.decoding.grammar.Grammar`.
    """

    def __init__(
        self,
        agent: Agent,
        max_new_tokens: int | None = None,
        *,
        constrained: bool = True,
        beams: int | None = None,
        temperature: float = 1.0,
        negative_prompts: NegativePrompts = "known",
    ) -> None:
        self.agent = agent
        self.max_new_tokens = max_new_tokens
        self.constrained = constrained
        self.beams = beams
        self.temperature = temperature
        self.negative_prompts = negative_prompts

    @property
    def catalogue(self) -> Catalogue:
        """See `Selector`."""
        return self.agent.catalogue

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`."""
        if not self.constrained:
            return self._select_unconstrained(prompts, n)
        ranked = self.agent.rank(
            prompts,
            n,
            beams=self.beams or (1 if n == 1 else BEAMS),
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            negative_prompts=self.negative_prompts,
        )
        catalogue = self.agent.catalogue
        return [
            [Choice(row.text, verify(row.text, catalogue), row.probability) for row in rows]
            for rows in ranked
        ]

    def _select_unconstrained(self, prompts: Sequence[str], n: int) -> list[list[Choice]]:
        from diffagent.agent.decoding.strategies import DiverseBeams

        completions = self.agent.generate(
            prompts, max_new_tokens=self.max_new_tokens, decoding=DiverseBeams(n) if n > 1 else None
        )
        answers = [
            (i, text, ended)
            for i, written in enumerate(completions)
            for text, ended in {c.text: c.ended for c in written}.items()
        ]
        logprobs = self.agent.logprobs(
            [prompts[i] for i, _, _ in answers], [text for _, text, _ in answers]
        )
        choices: list[list[Choice]] = [[] for _ in prompts]
        for (i, text, ended), logprob in zip(answers, logprobs, strict=True):
            verdict = verify(text, self.agent.catalogue, ended=ended)
            if logprob is None:
                choices[i].append(Choice(text, verdict))
            else:
                probability = float(np.exp(logprob.total))
                choices[i].append(Choice(text, verdict, probability, logprob.mean))
        return [sorted(found, key=lambda choice: -(choice.probability or 0)) for found in choices]
