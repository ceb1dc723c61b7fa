"""Pictures that say how they were made.

A PNG carries two texts: ``parameters``, the line format that AUTOMATIC1111 writes and Civitai
reads (infotext), and ``diffagent``, the recipe as JSON, which is exact. Equal recipes and equal
pixels give equal bytes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from diffagent.artifacts import atomic_file
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
    tags = [f"<lora:{_tag(_name(use.sha256, names))}:{use.weight:g}>" for use in recipe.loras]
    hashes = {"model": recipe.checkpoint[:10]}
    hashes |= {f"lora:{_tag(_name(use.sha256, names))}": use.sha256[:10] for use in recipe.loras}
    fields = {
        "Steps": recipe.steps,
        "Sampler": recipe.sampler,
        "CFG scale": f"{recipe.cfg_scale:g}",
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.checkpoint[:10],
        "Model": _quoted(_name(recipe.checkpoint, names)),
        **({"Clip skip": recipe.clip_skip} if recipe.clip_skip > 1 else {}),
        "Hashes": json.dumps(hashes),
        "Version": "diffagent",
    }
    lines = [" ".join([recipe.prompt, *tags])]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items()))
    return "\n".join(lines)


def _name(sha256: str, names: Mapping[str, str]) -> str:
    return names.get(sha256, sha256[:10])


def _tag(name: str) -> str:
    """A name that can stand between the colons of ``<lora:NAME:WEIGHT>``."""
    return re.sub(r"[<>:\s]+", "_", name)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n\"]", value) else value


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
