"""The order of work: each checkpoint is loaded once, each LoRA set laid over it once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from diffagent.render.recipe import Recipe


@dataclass(frozen=True)
class Group:
    """Recipes that share the checkpoint and the sets of files laid over it, in rendering order."""

    checkpoint: str
    loras: tuple[str, ...]
    embeddings: tuple[str, ...]
    recipes: tuple[Recipe, ...]


def plan(recipes: Iterable[Recipe]) -> Iterator[Group]:
    """Group recipes by checkpoint, LoRA and embedding files, then order by size and sampler.

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
    for models, group in groupby(ordered, key=lambda item: _models(item[1])):
        yield Group(*models, tuple(recipe for _, recipe in group))


def _models(recipe: Recipe) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    embeddings = sorted({item.sha256 for item in recipe.embeddings})
    return recipe.checkpoint, tuple(lora.sha256 for lora in recipe.loras), tuple(embeddings)
