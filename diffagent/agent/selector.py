"""What answers prompts with APIs: the interface of agents and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from diffagent.agent.verify import Verdict
from diffagent.errors import SchemaError
from schemas.api import T2IAPI


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


def valid_apis(selector: Selector, prompt: str, n: int = 1) -> list[T2IAPI]:
    """Up to ``n`` APIs for a prompt, likeliest first, air and description filled in.

    Raises:
        SchemaError: none of the answers of an unconstrained agent is a valid API; the message
            says what is wrong with the first.
    """
    (choices,) = selector.select([prompt], n)
    valid = [choice.verdict.api for choice in choices if choice.verdict.api is not None]
    if not valid:
        first = choices[0].verdict
        raise SchemaError(
            f"the agent has no valid API for {prompt!r:.80}: {first.reason}: {first.detail}; "
            "constrain it, train it longer, or ask otherwise",
            field=first.detail.partition(":")[0],
        )
    return valid
