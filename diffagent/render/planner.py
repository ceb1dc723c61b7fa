"""The order of work: each checkpoint is loaded once, each LoRA set laid over it once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from diffagent.render.recipe import Recipe


@dataclass(frozen=True)
class Group:
    """Recipes that share the checkpoint and the set of LoRA files, in the order to render."""

    checkpoint: str
    loras: tuple[str, ...]
    recipes: tuple[Recipe, ...]


def plan(recipes: Iterable[Recipe]) -> Iterator[Group]:
    """Group recipes by checkpoint, LoRA files, then order by size and sampler.

    Duplicates are rendered once. The order depends on the set of recipes alone.
    """
    unique = {recipe.digest: recipe for recipe in recipes}
    ordered = sorted(
        unique.items(),
        key=lambda item: (
            *_models(item[1]),
            item[1].width,
            item[1].height,
            item[1].sampler,
            item[0],
        ),
    )
    for (checkpoint, loras), group in groupby(ordered, key=lambda item: _models(item[1])):
        yield Group(checkpoint, loras, tuple(recipe for _, recipe in group))


def _models(recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    return recipe.checkpoint, tuple(lora.sha256 for lora in recipe.loras)
