"""What answers prompts with APIs: the interface of agents and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from diffagent.agent.verify import Verdict


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
