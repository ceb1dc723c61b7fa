"""What the agent reads and what it writes, as text and as tokens.

The prompt is put into ``PROMPT_TEMPLATE``; the response is the compact JSON of the API followed
by the end-of-sequence token. Both are tokenised on their own and then joined, so that training
and generation see the same tokens before the first one of the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffagent.errors import ConfigError

if TYPE_CHECKING:
    from schemas.api import T2IAPI

#: Stored in agent.json: an agent is asked in the words that it was trained with.
PROMPT_TEMPLATE = "Prompt: {prompt}\nAPI: "

IGNORED = -100
"""Label of a token that takes no part in the loss, as torch and transformers have it."""


@dataclass(frozen=True)
class Example:
    """A prompt and a response as tokens.

    Attributes:
        input_ids: (bos) template and prompt, response, eos.
        labels: ``input_ids`` of response and eos, ``IGNORED`` before them.
        prompt_tokens_cut: tokens of the user's prompt that did not fit.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_tokens_cut: int = 0


def response_text(api: T2IAPI) -> str:
    """What an agent has to write to call ``api``."""
    return api.response().to_json()


def encode_prompt(
    tokenizer: Any, prompt: str, max_length: int, template: str = PROMPT_TEMPLATE
) -> tuple[list[int], int]:
    """Tokens of the prompt in its template, and how many tokens of the prompt were cut.

    A prompt that is too long loses its end; the template stays whole. Special tokens spelt out
    in a prompt ('</s>') are ordinary text.

    Raises:
        ConfigError: not even the template fits into ``max_length``.
    """
    before, _, after = template.partition("{prompt}")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    head, tail = bos + _ids(tokenizer, before), _ids(tokenizer, after)
    room = max_length - len(head) - len(tail)
    if room < 1:
        raise ConfigError(f"max_length leaves no room for a prompt ({room} tokens); raise it")
    ids = _ids(tokenizer, prompt)
    return head + ids[:room] + tail, max(0, len(ids) - room)


def encode_example(
    tokenizer: Any, prompt: str, response: str, max_length: int, template: str = PROMPT_TEMPLATE
) -> Example | None:
    """Tokens and labels of (prompt, response), at most ``max_length`` of them.

    The response is never cut: half an API teaches nothing. The prompt gives way.

    Returns:
        None when the response leaves no room for a single token of the prompt; callers count it.
    """
    answer = [*_ids(tokenizer, response), tokenizer.eos_token_id]
    try:
        question, cut = encode_prompt(tokenizer, prompt, max_length - len(answer), template)
    except ConfigError:
        return None
    return Example(question + answer, [IGNORED] * len(question) + answer, cut)


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> list[list[int]]:
    """Rows of one length, filled with ``value`` on the right or on the left."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    text = text.encode(errors="replace").decode()  # lone surrogates are no text for tokenizers
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return ids
