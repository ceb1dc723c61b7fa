"""The WebUI's prompt syntax, and what the text encoders make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.errors import RenderError
from diffagent.render.diffusers.prompt_encoder import PromptEncoder
from diffagent.render.prompt_syntax import parse
from tests.render import tiny_sd


@pytest.mark.parametrize(
    ("prompt", "windows"),
    [
        ("a red ball", [[("a red ball", 1)]]),
        ("", [[("", 1)]]),
        ("a (red) ball", [[("a ", 1), ("red", 1.1), (" ball", 1)]]),
        ("a ((red)) ball", [[("a ", 1), ("red", 1.21), (" ball", 1)]]),
        ("a (red:1.5) ball", [[("a ", 1), ("red", 1.5), (" ball", 1)]]),
        ("a (red: .5 )", [[("a ", 1), ("red", 0.5)]]),
        ("a [red] ball", [[("a ", 1), ("red", 1 / 1.1), (" ball", 1)]]),
        ("(a [red] ball:2)", [[("a ", 2), ("red", 2 / 1.1), (" ball", 2)]]),
        (r"a \(red\) ball\\", [[("a (red) ball\\", 1)]]),
        ("a (red ball", [[("a ", 1), ("red ball", 1.1)]]),
        ("a red) ball] 3:2)", [[("a red) ball] 3:2)", 1)]]),
        ("time 12:30, ratio :1.5", [[("time 12:30, ratio :1.5", 1)]]),
        ("a BREAK b", [[("a ", 1)], [("b", 1)]]),
        ("(a BREAK b:1.2)", [[("a ", 1.2)], [("b", 1.2)]]),
        ("BREAKFAST Beer", [[("BREAKFAST Beer", 1)]]),
        ("() [ ]", [[("", 1)]]),
    ],
)
def test_syntax(prompt: str, windows: list[list[tuple[str, float]]]) -> None:
    parsed = parse(prompt)
    assert [[text for text, _ in window] for window in parsed] == [
        [text for text, _ in window] for window in windows
    ]
    for window, expected in zip(parsed, windows, strict=True):
        assert [weight for _, weight in window] == pytest.approx([w for _, w in expected])


@settings(deadline=None)
@given(st.text(alphabet="ab ()[]:1.2\\BREAK,", max_size=60))
def test_any_text_is_a_prompt(prompt: str) -> None:
    windows = parse(prompt)
    assert all(window and all(weight > 0 for _, weight in window) for window in windows) or (
        ":" in prompt  # a weight of 0 was asked for
    )
    if not set("()[]\\:") & set(prompt) and "BREAK" not in prompt:
        assert windows == [[(prompt if prompt.strip() else "", 1.0)]]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_sd.build(tmp_path_factory.mktemp("config"))


def hidden(pipeline: Any, text: str, layer: int = -1) -> torch.Tensor:
    """What transformers' text encoder says, with the prompt cut or padded to 77 tokens."""
    tokens = pipeline.tokenizer(
        text, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    output = pipeline.text_encoder(tokens, output_hidden_states=True)
    norm = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder).final_layer_norm
    states: torch.Tensor = norm(output.hidden_states[layer])
    return states


@torch.inference_mode()
def test_a_plain_prompt_is_what_transformers_says(pipeline: Any) -> None:
    encoder = PromptEncoder(pipeline, "sd1")
    for clip_skip in (1, 2):
        context = encoder.encode("a red circle", clip_skip).context
        assert torch.equal(context, hidden(pipeline, "a red circle", -clip_skip))
    with pytest.raises(RenderError, match="2 layers") as refused:
        encoder.encode("a red circle", 3)
    assert refused.value.reason == "clip-skip"
    # Stable Diffusion 2 has its own layer, whatever is asked for.
    plain = PromptEncoder(pipeline, "sd2").encode("a red circle", 12).context
    assert torch.equal(plain, hidden(pipeline, "a red circle"))


@torch.inference_mode()
def test_weights_move_along_the_line_from_the_empty_prompt(pipeline: Any) -> None:
    encoder = PromptEncoder(pipeline, "sd1")
    plain, empty = hidden(pipeline, "a red circle"), hidden(pipeline, "")
    strong = encoder.encode("a (red:1.5) circle", 1).context
    moved = (strong != plain).any(-1)[0].nonzero().flatten().tolist()
    assert len(moved) == 1  # the token that is weighted
    expected = empty + 1.5 * (plain - empty)
    torch.testing.assert_close(strong[0, moved], expected[0, moved])
    weak = encoder.encode("a [red] circle", 1).context
    without = (weak - plain).abs().max()
    assert 0 < without < (hidden(pipeline, "a circle") - plain).abs().max() * 2


@torch.inference_mode()
def test_long_prompts_and_breaks_take_windows(pipeline: Any) -> None:
    encoder = PromptEncoder(pipeline, "sd1")
    parts = encoder.encode("a red circle BREAK a blue square", 1).context
    joined = torch.cat([hidden(pipeline, "a red circle"), hidden(pipeline, "a blue square")], 1)
    assert torch.equal(parts, joined)
    long = "red circle, " * 30  # 90 tokens: cut at the last comma that fits
    context = encoder.encode(long, 1).context
    assert context.shape[1] == 154
    torch.testing.assert_close(context[:, :70], hidden(pipeline, "red circle, " * 25)[:, :70])

    positive, negative = encoder.pair(long, "", 1)
    assert positive.context.shape == negative.context.shape
    assert torch.equal(negative.context, hidden(pipeline, "").repeat(1, 2, 1))
