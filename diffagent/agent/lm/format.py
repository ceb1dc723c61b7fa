"""What the agent reads and what it writes, as text and as tokens.

The prompt is put into ``PROMPT_TEMPLATE``; the response is the compact JSON of the API followed
by the end-of-sequence token. Both are tokenised on their own and then joined, so that training
and generation see the same tokens before the first one of the response.

A long prompt loses its end. ``prompt_room`` sets where, in training and in generation alike: the
cut does not depend on the response, unless a response of training would not fit otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffagent.errors import ConfigError

if TYPE_CHECKING:
    from diffagent.schemas.api import T2IAPI

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


def prompt_room(max_length: int) -> int:
    """Tokens that a prompt in its template may take: half, so that a response has room."""
    return max_length // 2


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
    head, tail = bos + encode_text(tokenizer, before), encode_text(tokenizer, after)
    room = max_length - len(head) - len(tail)
    if room < 1:
        raise ConfigError(f"max_length leaves no room for a prompt ({room} tokens); raise it")
    ids = encode_text(tokenizer, prompt)
    return head + ids[:room] + tail, max(0, len(ids) - room)


def encode_example(
    tokenizer: Any, prompt: str, response: str, max_length: int, template: str = PROMPT_TEMPLATE
) -> Example | None:
    """Tokens and labels of (prompt, response): `encode_responses` of one."""
    return encode_responses(tokenizer, prompt, [response], max_length, template)[0]


def encode_responses(
    tokenizer: Any,
    prompt: str,
    responses: Sequence[str],
    max_length: int,
    template: str = PROMPT_TEMPLATE,
) -> list[Example | None]:
    """Tokens and labels of each (prompt, response), at most ``max_length`` of them.

    A response is never cut: half an API teaches nothing. The prompt gives way, and is the same
    before all responses: it takes ``prompt_room`` or what the longest response leaves.

    Returns:
        None for a response that leaves no room for a single token of the prompt; callers count it.
    """
    eos: int = tokenizer.eos_token_id
    answers = [[*encode_text(tokenizer, response), eos] for response in responses]
    least = len(encode_prompt(tokenizer, "", max_length, template)[0]) + 1
    longest = max((len(a) for a in answers if len(a) + least <= max_length), default=None)
    if longest is None:
        return [None] * len(answers)
    room = max(least, min(prompt_room(max_length), max_length - longest))
    question, cut = encode_prompt(tokenizer, prompt, room, template)
    return [
        Example(question + answer, [IGNORED] * len(question) + answer, cut)
        if len(answer) <= longest
        else None
        for answer in answers
    ]


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> list[list[int]]:
    """Rows of one length, filled with ``value`` on the right or on the left."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without special ones; those spelt out in it are ordinary text."""
    text = text.encode(errors="replace").decode()  # lone surrogates are no text for tokenizers
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return ids
