"""Notes on pictures that differ from their recipe's meaning.

Examples are a sampler's stand-in and prompt syntax that a backend takes for text. The note goes
into the picture's row and onto the contact sheet. docs/explanation/rendering.md has the
differences that all pictures of a backend share.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from diffagent.render.diffusers.solvers import DISTILLED
from diffagent.render.prompt_syntax import compose, drawn_as_text, schedule
from diffagent.render.recipe import Recipe
from diffagent.t2i.samplers import SAMPLERS

_BREAK = re.compile(r"\bBREAK\b")


def note_on(recipe: Recipe, backend: str) -> str:
    """Describe how the picture of a recipe differs from its meaning; empty when it does not.

    Args:
        recipe: of the picture.
        backend: 'diffusers', 'a1111' or 'comfyui'.
    """
    if backend == "diffusers":
        sentences = [*_on_sampler(recipe), *_on_prompts(recipe)]
    elif backend == "comfyui":
        sentences = [*_on_comfyui(recipe), *_on_prompts(recipe)]
    elif backend == "a1111":
        unless = "unless an extension of the server replaces them"
        sentences = [f"{sentence} {unless}" for sentence in _on_prompts(recipe)]
    else:
        sentences = []
    return "; ".join(dict.fromkeys(sentences))


def _on_sampler(recipe: Recipe) -> Iterator[str]:
    spec = SAMPLERS[recipe.sampler]
    if spec.note:
        yield f"{spec.solver}: {spec.note}"
    if spec.solver in {"LCM", "TCD"} and recipe.steps > DISTILLED:
        yield f"{spec.solver}: distilled for {DISTILLED} steps at most, others lie between them"


def _on_prompts(recipe: Recipe) -> Iterator[str]:
    for prompt in (recipe.prompt, recipe.negative_prompt):
        yield from drawn_as_text(prompt)


def _on_comfyui(recipe: Recipe) -> Iterator[str]:
    for prompt in (recipe.prompt, recipe.negative_prompt):
        if schedule(prompt, recipe.steps) != [(recipe.steps, prompt)]:
            yield "ComfyUI draws [from:to:when] and [a|b] as text"
        if _BREAK.search(prompt):
            yield "ComfyUI draws BREAK as text"
    if len(compose(recipe.prompt)) > 1:
        yield "ComfyUI draws AND as text"
