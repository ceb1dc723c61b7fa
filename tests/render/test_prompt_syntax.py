"""Prompt editing, alternation, AND and weights as the WebUI reads them, in linear time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.errors import RenderError
from diffagent.render import prompt_syntax
from diffagent.render.diffusers.prompt_encoder import MAX_CHARACTERS, check_prompt
from diffagent.render.prompt_syntax import compose, drawn_as_text, parse, schedule


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        # The examples in the WebUI's modules/prompt_parser.py, at 10 steps.
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", [(n, "(b:1.1)" if n % 2 == 0 else "a") for n in range(1, 11)]),
        ("[fe|]male", [(n, "male" if n % 2 == 0 else "female") for n in range(1, 11)]),
        ("[fe|||]male", [(n, "female" if n % 4 == 1 else "male") for n in range(1, 11)]),
        # Read by its grammar in lark.
        ("[a:b:0.5]", [(5, "a"), (10, "b")]),
        ("[a::5]", [(5, "a"), (10, "")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:99]", [(10, "a")]),
        ("[a:b:-1]", [(10, "b")]),
        ("[a:b:1e1]", [(10, "a")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a:[b:c:2]:d:3]", [(2, "[a:b:d:3]"), (10, "[a:c:d:3]")]),
        ("[[a|b]:c:1]", [(1, "a"), *[(n, "c") for n in range(2, 11)]]),
        (r"\[a:b:3\]", [(10, r"\[a:b:3\]")]),
        # A bar outside of an alternation, or a lone backslash: the WebUI takes all for text.
        ("a|b [c:d:3]", [(10, "a|b [c:d:3]")]),
        ("(a|b) [c:d:3]", [(10, "(a|b) [c:d:3]")]),
        ("a [{b|d{:.5] c", [(10, "a [{b|d{:.5] c")]),
        ("[a:b:3] \\", [(10, "[a:b:3] \\")]),
    ],
)
def test_schedules(prompt: str, texts: list[tuple[int, str]]) -> None:
    assert schedule(prompt, 10) == texts


def test_the_example_of_the_webui() -> None:
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
        "[ in foreground::0.6][: in background:0.25] [shoddy:masterful:0.5]"
    )
    start = "fantasy landscape with a "
    assert schedule(prompt, 100) == [
        (25, f"{start}mountain and an oak in foreground shoddy"),
        (50, f"{start}lake and an oak in foreground in background shoddy"),
        (60, f"{start}lake and an oak in foreground in background masterful"),
        (75, f"{start}lake and an oak in background masterful"),
        (100, f"{start}lake and a christmas tree in background masterful"),
    ]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a house at 12:30", [("a house at 12:30", 1)]),
        ("a cat AND a dog", [("a cat ", 1), (" a dog", 1)]),
        ("a cat :1.2 AND a dog : 0.5", [("a cat", 1.2), (" a dog", 0.5)]),
        ("a AND b:-.5 AND c:2.", [("a ", 1), (" b", -0.5), (" c", 2)]),
        ("SAND AND BRANDY", [("SAND ", 1), (" BRANDY", 1)]),
        ("(a:1.3) AND [b:c:0.5]", [("(a:1.3) ", 1), (" [b:c:0.5]", 1)]),
        ("AND", [("", 1), ("", 1)]),
    ],
)
def test_composition(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert compose(prompt) == parts


@given(st.text(alphabet="ab [](:|).5\\AND1", max_size=40), st.integers(1, 12))
@settings(deadline=None, max_examples=300)
def test_any_text_has_a_schedule(prompt: str, steps: int) -> None:
    texts = schedule(prompt, steps)
    assert [end for end, _ in texts] == sorted({end for end, _ in texts})
    assert texts[-1][0] == steps
    if "[" not in prompt:
        assert texts == [(steps, prompt)]
    assert "".join(text for text, _ in compose(prompt)) or not prompt.replace("AND", "").strip(
        ": .15"
    )


def test_brackets_need_not_nest() -> None:
    """(a [b) c]: each kind of bracket counts on its own, as in the WebUI."""
    (window,) = parse("(a [b) c] d")
    assert window == [("a ", 1.1), ("b", pytest.approx(1)), (" c", 1 / 1.1), (" d", 1.0)]


def test_what_extensions_replace_is_named() -> None:
    assert list(drawn_as_text("a __colour__ {red|blue} <lora:ink:0,6> thing")) == [
        "wildcards like __colour__ are drawn as text",
        "choices like {red|blue} are drawn as text",
        "networks like <lora:ink:0,6> are drawn as text",
    ]
    assert list(drawn_as_text("a cat, (embedding:easy_v2:1.2)")) == [
        "ComfyUI's embeddings like embedding:easy_v2 are drawn as text",
    ]
    assert not list(drawn_as_text("a snake_case__name {x} <3 a|b embedding"))


HOSTILE: dict[str, Callable[[int], str]] = {
    "open parentheses": lambda n: "(" * n,
    "open brackets": lambda n: "[" * n,
    "pairs in pairs": lambda n: "[" * n + "]" * n,
    "both kinds": lambda n: "[(" * n + ")]" * n,
    "not nested": lambda n: "(a [b " * n + ") c] " * n,
    "weights": lambda n: "(a:1.1) [b] " * n,
    "digits": lambda n: ":" + "1" * n,
    "colons": lambda n: ": " * n,
    "edits": lambda n: "[a:b:3]" * n,
    "edits in edits": lambda n: "[a:" * n + ":3]" * n,
    "alternations": lambda n: "[a|(" * n + ")]" * n,
    "unfinished edits": lambda n: "[a:b:3" * n,
    "breaks": lambda n: "BREAK " * n,
    "ANDs": lambda n: "a AND " * n,
    "spaces": lambda n: "[a:" + " " * n + "x]",
    "underscores": lambda n: "__" * n,
    "choices": lambda n: "{a" * n + "|",
    "words": lambda n: "a red circle, " * n,
}


def calls_and_lines(function: Callable[[], Any]) -> int:
    """Lines of the parser's modules that a call runs."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != prompt_syntax.__file__:
            return None
        count += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(previous)
    return count


@pytest.mark.parametrize("kind", HOSTILE)
def test_work_grows_with_the_length_alone(kind: str) -> None:
    """Twice the prompt is twice the lines that run, and no text is copied once a bracket."""

    def work(n: int) -> int:
        prompt = HOSTILE[kind](n)

        def read() -> None:
            parse(prompt)
            schedule(prompt, 2)
            compose(prompt)
            list(drawn_as_text(prompt))

        return calls_and_lines(read)

    small, large = work(200), work(800)
    assert large <= 4.5 * small + 50


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_huge_prompt_is_read_and_refused(kind: str) -> None:
    """No regular expression goes back, no slice is copied again: these would not end today."""
    prompt = HOSTILE[kind](30_000)[:100_000]
    parse(prompt)
    assert schedule(prompt, 1)[-1][0] == 1
    compose(prompt)
    with pytest.raises(RenderError, match="characters, more than") as refused:
        check_prompt(prompt, 20)
    assert refused.value.reason == "prompt-too-long"


def test_prompts_that_would_take_minutes_are_refused() -> None:
    for prompt, reason in (
        (" AND ".join("abcdefghijklmnopqrst"), "20 parts between AND"),
        ("[a] b " * 1_600, "weakened words"),
        ("".join(f"[a:b:{n}]" for n in range(1, 151)) + "y" * 4_000, "so many texts"),
    ):
        assert len(prompt) <= MAX_CHARACTERS
        with pytest.raises(RenderError, match=reason) as refused:
            check_prompt(prompt, 150)
        assert refused.value.reason == "prompt-too-long"
    check_prompt("a red circle, (blue:0.8), [c:d:0.5] " * 40, 150)
