"""What answers prompts with APIs: the interface of agents and baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from diffagent.agent.verify import Verdict
from diffagent.errors import SchemaError
from diffagent.schemas.api import T2IAPI

if TYPE_CHECKING:
    from diffagent.t2i.catalogue import Catalogue


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

    @property
    def catalogue(self) -> Catalogue:
        """The models that answers may name."""
        ...

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """Up to ``n`` different choices a prompt, best first; at least one."""
        ...


def call_line(prompt: str, api: T2IAPI, catalogue: Catalogue) -> str:
    """Write an API call as one line of JSON that `diffagent render` draws without the catalogue.

    Returns:
        The keys of `T2IAPI.to_json`, with ``prompt`` before them and ``hashes`` after them: the
        SHA256 of the files, by 'model', 'lora:NAME' and 'embed:NAME' as the WebUI names them.
    """
    named = {"model": catalogue.entry(api.model, api.version)}
    named |= {f"lora:{use.model}": catalogue.entry(use.model, use.version) for use in api.loras}
    named |= {
        f"embed:{use.model}": catalogue.entry(use.model, use.version) for use in api.embeddings
    }
    hashes = {key: entry.sha256 for key, entry in named.items() if entry and entry.sha256}
    line = {"prompt": prompt, **json.loads(api.to_json()), "hashes": hashes}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


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
