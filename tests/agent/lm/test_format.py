"""Prompts and responses as tokens."""

from __future__ import annotations

from typing import Any

import pytest

from diffagent.agent.lm.format import (
    IGNORED,
    encode_example,
    encode_prompt,
    encode_responses,
    pad,
    prompt_room,
    response_text,
)
from diffagent.errors import ConfigError
from diffagent.schemas.api import parse_api
from diffagent.train.tiny_llama import build_tokenizer
from tests.agent.agent_world import make_rows

ROWS = make_rows(40, seed=3)
RESPONSES = [response_text(parse_api(str(row["api"]))) for row in ROWS]
PROMPTS = [str(row["prompt"]) for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer([*PROMPTS, *RESPONSES], 700)


def test_the_response_leaves_out_what_the_agent_cannot_know() -> None:
    api = parse_api(str(ROWS[0]["api"]))
    assert api.params.seed is not None
    assert "seed" not in RESPONSES[0]
    assert parse_api(RESPONSES[0]) == api.response()


def test_labels_cover_the_response_and_the_eos_and_nothing_else(tokenizer: Any) -> None:
    example = encode_example(tokenizer, PROMPTS[0], RESPONSES[0], 512)
    assert example is not None
    answer = [label for label in example.labels if label != IGNORED]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == RESPONSES[0]
    start = len(example.labels) - len(answer)
    assert example.input_ids[start:] == answer
    assert example.labels[:start] == [IGNORED] * start
    # What generation starts from is what training saw before the first token of the response.
    assert example.input_ids[:start] == encode_prompt(tokenizer, PROMPTS[0], 512)[0]


@pytest.mark.parametrize("max_length", [90, 200])  # the response needs more than half, or less
def test_a_long_prompt_is_cut_and_counted_and_the_response_is_not(
    tokenizer: Any, max_length: int
) -> None:
    long = " ".join(PROMPTS)
    whole = encode_example(tokenizer, long, RESPONSES[0], 10_000)
    cut = encode_example(tokenizer, long, RESPONSES[0], max_length)
    assert whole is not None
    assert cut is not None
    answer = sum(label != IGNORED for label in cut.labels)
    assert len(cut.input_ids) - answer == min(prompt_room(max_length), max_length - answer)
    assert whole.prompt_tokens_cut == 0
    assert cut.prompt_tokens_cut == len(whole.input_ids) - len(cut.input_ids)
    assert [x for x in cut.labels if x != IGNORED] == [x for x in whole.labels if x != IGNORED]
    assert tokenizer.decode(cut.input_ids).count("\nAPI: ") == 1


def test_all_responses_follow_one_cut_of_the_prompt(tokenizer: Any) -> None:
    """All candidates of a prompt are conditioned on the same cut of it."""
    long, short = " ".join(PROMPTS), RESPONSES[0]
    texts = [short, short + short, short * 3, short * 99]
    examples = encode_responses(tokenizer, long, texts, 300)
    assert examples[3] is None  # and does not count
    questions = [
        [i for i, label in zip(e.input_ids, e.labels, strict=True) if label == IGNORED]
        for e in examples[:3]
        if e
    ]
    assert questions[0] == questions[1] == questions[2]
    assert len(examples[2].input_ids) == 300 if examples[2] else False
    alone = encode_responses(tokenizer, long, [short], 300)[0]
    assert alone is not None
    assert alone.labels.count(IGNORED) == prompt_room(300) > len(questions[0])
    assert encode_prompt(tokenizer, long, prompt_room(300))[0] == alone.input_ids[:150]


def test_a_response_that_does_not_fit_is_refused(tokenizer: Any) -> None:
    assert encode_example(tokenizer, PROMPTS[0], RESPONSES[0] * 9, 64) is None
    with pytest.raises(ConfigError, match="max_length"):
        encode_prompt(tokenizer, PROMPTS[0], 3)


def test_special_tokens_in_a_prompt_are_text(tokenizer: Any) -> None:
    ids, _ = encode_prompt(tokenizer, "a red </s> star <s><pad>", 512)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.pad_token_id not in ids
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "é 日本語 😀 \x00\x1f\u202e",
        " , . ' s n't",
        '{"model":"A] (b)"},"x',
        "1234.50",
        "\t\n  x  ",
    ],
)
def test_the_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_digits_stand_alone(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert not [t for t in tokens if sum(c.isdigit() for c in t) > 1 and not t.startswith("<")]


def test_the_tokenizer_does_not_depend_on_the_order_of_texts(tokenizer: Any) -> None:
    again = build_tokenizer(reversed([*PROMPTS, *RESPONSES]), 700)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_padding_goes_to_the_side_that_is_asked_for() -> None:
    assert pad([[1], [2, 3]], 0) == [[1, 0], [2, 3]]
    assert pad([[1], [2, 3]], 0, left=True) == [[0, 1], [2, 3]]
