"""The agent as a selector."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffagent.agent.selector import Choice
from diffagent.agent.verify import verify
from diffagent.errors import SchemaError
from schemas.api import T2IAPI

log = logging.getLogger(__name__)

RETRIES = 8
"""Answers that `select_one` asks for when the first one is no valid API."""


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
