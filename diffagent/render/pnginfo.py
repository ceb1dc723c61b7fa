"""Pictures that say how they were made.

A PNG carries two texts: ``parameters``, the line format that AUTOMATIC1111 writes and Civitai
reads (infotext), and ``diffagent``, the recipe as JSON, which is exact. Equal recipes and equal
pixels give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from diffagent.artifacts import atomic_file
from diffagent.dabench.metadata import Generation, Reference, write_parameters
from diffagent.errors import RenderError
from diffagent.render.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image


def infotext(recipe: Recipe, names: Mapping[str, str]) -> str:
    """The recipe as AUTOMATIC1111 writes it.

    Args:
        recipe: how the picture was made.
        names: SHA256 of a model's file -> the name to show; its short hash when missing.

    Returns:
        Prompt with ``<lora:NAME:WEIGHT>``, negative prompt, and one line of parameters with
        AutoV2 hashes (the first ten digits of the SHA256), which Civitai resolves.
    """
    return write_parameters(
        Generation(
            prompt_raw=_with_embeddings(recipe.prompt, recipe, names, negative=False),
            negative_prompt_raw=_with_embeddings(
                recipe.negative_prompt, recipe, names, negative=True
            ),
            sampler_name=recipe.sampler,
            checkpoints=(_reference(recipe.checkpoint, names),),
            loras=tuple(
                _reference(use.sha256, names)._replace(weight=use.weight) for use in recipe.loras
            ),
            **recipe.model_dump(
                include={"steps", "cfg_scale", "width", "height", "clip_skip", "seed"}
            ),
        )
    )


def _with_embeddings(
    prompt: str, recipe: Recipe, names: Mapping[str, str], *, negative: bool
) -> str:
    """A prompt with the names of its embeddings in front, as one writes them in the WebUI."""
    words = []
    for item in recipe.embeddings:
        if item.negative == negative:
            name = names.get(item.sha256, item.sha256[:10])
            words.append(name if item.weight == 1 else f"({name}:{item.weight:g})")
    return ", ".join([*words, prompt] if prompt else words)


def _reference(sha256: str, names: Mapping[str, str]) -> Reference:
    return Reference(hash=sha256[:10], name=names.get(sha256, sha256[:10]))


def write_png(path: Path, image: Image, recipe: Recipe, names: Mapping[str, str]) -> None:
    """Write ``path`` at once or not at all.

    Texts outside Latin-1 become iTXt chunks, as AUTOMATIC1111 does it.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", infotext(recipe, names))
    info.add_text("diffagent", recipe.model_dump_json())
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=info, compress_level=6)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.getvalue())


def read_png(path: Path) -> tuple[Recipe, str]:
    """The recipe and the infotext of a picture that `write_png` wrote; its pixels are decoded.

    Raises:
        RenderError: the picture is damaged or carries no recipe.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            texts: Mapping[str, str] = image.text  # type: ignore[attr-defined]
            return Recipe.model_validate_json(texts["diffagent"]), texts["parameters"]
    except (OSError, SyntaxError, KeyError, AttributeError, ValidationError) as error:
        # Pillow reports a broken chunk as SyntaxError.
        raise RenderError(
            f"{path.name!r} is no picture of this program ({error}); delete it to render it again",
            reason="bad-picture",
        ) from error
