"""Pictures that say how they were made.

A PNG carries two texts: ``parameters``, the line format that AUTOMATIC1111 writes and Civitai
reads (infotext), and ``diffagent``, the recipe as JSON, which is exact. Equal recipes and equal
pixels give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import ValidationError

from diffagent.errors import RenderError
from diffagent.render.recipe import Recipe
from diffagent.store import atomic_file
from diffagent.t2i.metadata import Generation, Reference, write_parameters
from diffagent.t2i.samplers import SAMPLERS, WEBUI_LABELS, normalise

if TYPE_CHECKING:
    from PIL.Image import Image

_NONE: Mapping[str, str] = MappingProxyType({})


def infotext(
    recipe: Recipe, names: Mapping[str, str], payload_hashes: Mapping[str, str] = _NONE
) -> str:
    """The recipe as AUTOMATIC1111 writes it.

    Args:
        recipe: how the picture was made.
        names: SHA256 of a model's file -> the name to show; its short hash when missing.
        payload_hashes: SHA256 of a LoRA's file -> its AutoV3 (`payload_hash`), by which the WebUI
            finds a LoRA that has another name there.

    Returns:
        Prompt with ``<lora:NAME:WEIGHT>``, negative prompt, and one line of parameters with
        AutoV2 hashes (the first ten digits of the SHA256), which Civitai resolves. Names are made
        fit for both readers.
    """
    words = _words(recipe, names)
    sampler, schedule = sampler_fields(recipe.sampler)
    fields = {"RNG": "CPU"}  # where the noise is drawn; the WebUI's default is the GPU
    if any(use.sha256 in payload_hashes for use in recipe.loras):
        fields["Lora hashes"] = ", ".join(
            f"{words[use.sha256]}: {payload_hashes.get(use.sha256, use.sha256[:10])}"
            for use in recipe.loras
        )
    return write_parameters(
        Generation(
            prompt_raw=recipe.text(words, negative=False),
            negative_prompt_raw=recipe.text(words, negative=True),
            sampler_name=sampler,
            schedule_name=schedule,
            checkpoints=(_reference(recipe.checkpoint, names),),
            vae=_reference(recipe.vae, names) if recipe.vae else None,
            loras=tuple(
                Reference(hash=use.sha256[:10], name=words[use.sha256], weight=use.weight)
                for use in recipe.loras
            ),
            embeddings=tuple(
                Reference(hash=use.sha256[:10], name=words[use.sha256], weight=use.weight)
                for use in recipe.embeddings
            ),
            **recipe.model_dump(
                include={"steps", "cfg_scale", "width", "height", "clip_skip", "seed"}
            ),
        ),
        extra=fields,
    )


def sampler_fields(name: str) -> tuple[str, str | None]:
    """The WebUI's "Sampler" and "Schedule type" of a key of ``SAMPLERS``.

    Karras and Exponential stay in the name, as most records have them. Others go apart, where the
    WebUI would misread a name ("SGM Uniform" ends in "Uniform"), and so does a uniform schedule
    where leaving it out would mean the solver's own.
    """
    spec = SAMPLERS[name]
    if spec.schedule not in ("", "Karras", "Exponential"):
        return spec.solver, WEBUI_LABELS.get(spec.schedule, spec.schedule)
    if not spec.schedule and normalise(name, "Automatic") != name:
        return name, WEBUI_LABELS[""]
    return name, None


def payload_hash(path: Path) -> str:
    """AutoV3 of a safetensors file: SHA256 of what follows its header, the first 12 digits.

    Raises:
        RenderError: it is no such file; reason 'bad-model-file'.
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if start > path.stat().st_size:
            raise RenderError(f"{path.name!r} is no safetensors file", reason="bad-model-file")
        stream.seek(start)
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def _words(recipe: Recipe, names: Mapping[str, str]) -> dict[str, str]:
    """Names of LoRAs and embeddings as words of a prompt, no two alike."""
    kept = {use.sha256: r"[^\w-]+" for use in recipe.embeddings}  # a word ends at a full stop
    kept |= {use.sha256: r"[^\w.-]+" for use in recipe.loras}
    made = {
        sha: re.sub(others, "_", names.get(sha, "")).strip("._-")[:100]
        for sha, others in kept.items()
    }
    counts = Counter(word.casefold() for word in made.values())
    return {
        sha: word if word and counts[word.casefold()] == 1 else f"{word}_{sha[:10]}".strip("_")
        for sha, word in made.items()
    }


def _reference(sha256: str, names: Mapping[str, str]) -> Reference:
    """A model by hash and name, without what Civitai's parser takes for the end of a value."""
    name = " ".join(re.sub(r'[,:"{}\[\]\\]+', " ", names.get(sha256, "")).split())
    return Reference(hash=sha256[:10], name=name or sha256[:10])


def write_png(
    path: Path,
    image: Image,
    recipe: Recipe,
    names: Mapping[str, str],
    payload_hashes: Mapping[str, str] = _NONE,
) -> None:
    """Write ``path`` at once or not at all; the arguments are those of `infotext`.

    Texts outside Latin-1 become iTXt chunks, as AUTOMATIC1111 does it.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", infotext(recipe, names, payload_hashes))
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
