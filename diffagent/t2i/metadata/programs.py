"""JSON of other programs: SwarmUI, Fooocus, RuinedFooocus, InvokeAI, NovelAI, Draw Things,
Easy Diffusion, Stability Matrix.

Each reader takes the object that the program writes into its pictures (or the site passes on)
and gives the site's keys, or None when the object is not its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from diffagent.t2i.metadata.generation import Reading, Reference
from diffagent.t2i.metadata.values import (
    Bag,
    file_hash,
    first,
    integer,
    items,
    load_json,
    mapping,
    number,
    text,
    weight,
)


def read_program(bag: Bag) -> Reading | None:
    """What one of the programs of this module wrote, or None."""
    for read in _READERS:
        reading = read(bag)
        if reading is not None:
            return reading
    return None


def _swarmui(bag: Bag) -> Reading | None:
    """SwarmUI (docs/Image Metadata Format.md there): ``sui_image_params`` and ``sui_models``.

    Lists may be text with commas. A hash is that of the tensors, whose first twelve digits are
    the site's AutoV3.
    """
    params = load_json(bag.get("sui_image_params"))
    if not isinstance(params, dict):
        return None
    found = _renamed(
        params,
        prompt="prompt",
        negativePrompt="negativeprompt",
        steps="steps",
        cfgScale="cfgscale",
        seed="seed",
        width="width",
        height="height",
        clipSkip="clipstopatlayer",
        Model="model",
    )
    found["sampler"] = first(params, "sampler", "comfyuisampler", "comfysampler")
    found["scheduler"] = first(params, "scheduler", "comfyuischeduler", "comfyscheduler")
    models = list(items(bag.get("sui_models")))
    hashes = {_stem(item.get("name")): _tensor_hash(item.get("hash")) for item in models}
    main = next((item for item in models if item.get("param") == "model"), {})
    weights = _listed(params.get("loraweights"))
    loras = tuple(
        Reference(hash=hashes.get(_stem(name)), name=text(name), weight=weight(_at(weights, i)))
        for i, name in enumerate(_listed(params.get("loras")))
        if text(name)
    )
    found["Model hash"] = _tensor_hash(main.get("hash"))
    return Reading("swarmui", found, loras=loras, from_image="initimage" in params)


def _tensor_hash(value: object) -> str | None:
    digest = file_hash(value)
    return digest[:12] if digest else None


def _stem(name: object) -> str:
    return str(name).rpartition("/")[2].removesuffix(".safetensors").casefold()


def _listed(value: object) -> list[Any]:
    if isinstance(value, str):  # with the brackets and quotation marks of Python's lists, if any
        parts = (part.strip(" '\"") for part in value.strip(" []").split(","))
        return [part for part in parts if part]
    return value if isinstance(value, list) else []


def _at(values: list[Any], index: int) -> object:
    return values[index] if index < len(values) else None


def _renamed(bag: Bag, **names: str) -> dict[str, object]:
    return {key: bag.get(name) for key, name in names.items()}


def _ruined_fooocus(bag: Bag) -> Reading | None:
    """RuinedFooocus, as it writes and as the site passes it on (its LoRAs under ``other``).

    ``loras`` is a list of [hash, "WEIGHT - NAME"], or once the text ``Loras:<NAME:WEIGHT>,...``.
    """
    if bag.get("software") != "RuinedFooocus":
        return None
    other = {**mapping(bag.get("other")), **bag}
    found: dict[str, object] = {**bag, "scheduler": other.get("scheduler")}
    found["prompt"] = first(bag, "Prompt", "prompt")
    found["negativePrompt"] = first(bag, "Negative", "negativePrompt")
    found["sampler"] = first(bag, "sampler") or other.get("sampler_name")
    found["Model"] = first(bag, "Model") or other.get("base_model_name")
    found["Model hash"] = first(other, "Model hash", "base_model_hash")
    found["cfgScale"] = first(other, "cfgScale", "cfg")
    found["clipSkip"] = other.get("clip_skip")
    loras = other.get("loras")
    used: list[Reference] = []
    if isinstance(loras, str):
        for part in loras.split("<")[1:]:
            name, _, strength = part.partition(">")[0].rpartition(":")
            used.append(Reference(name=text(name), weight=weight(strength)))
    for item in loras if isinstance(loras, list) else []:
        if isinstance(item, list) and len(item) == 2 and isinstance(item[1], str):
            strength, _, name = item[1].partition(" - ")
            used.append(_hashed(item[0], name, strength))
    return Reading("ruinedfooocus", found, loras=tuple(use for use in used if use.name))


def _hashed(digest: object, name: str, strength: object) -> Reference:
    return Reference(hash=file_hash(digest), name=text(name), weight=weight(strength))


def _fooocus(bag: Bag) -> Reading | None:
    """Fooocus' own scheme (modules/meta_parser.py there), and the labels of its log.

    Its prompt is what was asked for; the styles that it adds are in ``full_prompt``.
    """
    if not ("base_model" in bag or "Base Model" in bag) or "positive_prompt" in bag:
        return None
    found: dict[str, object] = {
        "prompt": first(bag, "prompt", "Prompt"),
        "negativePrompt": first(bag, "negative_prompt", "Negative Prompt"),
        "steps": first(bag, "steps", "Steps"),
        "cfgScale": first(bag, "guidance_scale", "Guidance Scale"),
        "sampler": first(bag, "sampler", "Sampler"),
        "scheduler": first(bag, "scheduler", "Scheduler"),
        "seed": first(bag, "seed", "Seed"),
        "Size": first(bag, "resolution", "Resolution"),
        "width": bag.get("width"),
        "height": bag.get("height"),
        "clipSkip": first(bag, "clip_skip", "CLIP Skip"),
        "Model": first(bag, "base_model", "Base Model"),
        "Model hash": first(bag, "base_model_hash", "Base Model Hash"),
    }
    loras = bag.get("loras")
    used = [
        _hashed(item[2] if len(item) > 2 else None, str(item[0]), item[1])
        for item in (loras if isinstance(loras, list) else [])
        if isinstance(item, list) and len(item) >= 2
    ]
    for slot in range(1, 11) if not used else ():
        combined = first(bag, f"lora_combined_{slot}", f"LoRA {slot}")
        parts = combined.split(" : ") if isinstance(combined, str) else []
        if len(parts) >= 2 and parts[0] != "False":
            used.append(_hashed(None, parts[-2], parts[-1]))
    return Reading("fooocus", found, loras=tuple(use for use in used if use.name))


def _invokeai(bag: Bag) -> Reading | None:
    """InvokeAI 3 and later: ``positive_prompt`` and typed models; 2: ``image.prompt``."""
    if "positive_prompt" not in bag:
        return _invokeai_2(bag)
    found = _renamed(
        bag,
        prompt="positive_prompt",
        negativePrompt="negative_prompt",
        steps="steps",
        cfgScale="cfg_scale",
        sampler="scheduler",
        seed="seed",
        width="width",
        height="height",
        clipSkip="clip_skip",
    )
    skipped = integer(found["clipSkip"])  # layers that are left out; the WebUI counts from 1
    found["clipSkip"] = None if skipped is None else abs(skipped) + 1
    model = mapping(bag.get("model"))
    found["Model"] = first(model, "name", "model_name") or text(bag.get("model"))
    found["Model hash"] = model.get("hash")
    loras = []
    for item in items(bag.get("loras")):
        lora = mapping(item.get("model") or item.get("lora"))
        name = text(first(lora, "name", "model_name"))
        if name:
            loras.append(_hashed(lora.get("hash"), name, item.get("weight")))
    mode = str(bag.get("generation_mode", ""))
    return Reading(
        "invokeai", found, loras=tuple(loras), from_image="img2img" in mode or "inpaint" in mode
    )


def _invokeai_2(bag: Bag) -> Reading | None:
    image = mapping(bag.get("image"))
    prompts = image.get("prompt")
    if "model_weights" not in bag or not prompts:
        return None
    found: dict[str, object] = {**image, "Model": bag.get("model_weights")}
    found["Model hash"] = bag.get("model_hash")
    prompt = (
        ", ".join(str(item.get("prompt", "")) for item in items(prompts))
        if isinstance(prompts, list)
        else str(prompts)
    )
    found["prompt"], found["negativePrompt"] = _bracketed(prompt)
    return Reading("invokeai", found, from_image=image.get("type") == "img2img")


def _bracketed(prompt: str) -> tuple[str, str]:
    """InvokeAI 2 has the negative prompt in brackets at the end: ``a cat [a dog]``."""
    prompt = prompt.strip()
    positive, bracket, negative = prompt.partition("[")
    if not bracket or not prompt.endswith("]"):
        return prompt, ""
    return positive.strip(), negative[:-1].strip()


_DREAM = re.compile(r"-(\w)\s?([\w.]+)")


def read_dream(value: str) -> Reading | None:
    """The command line of InvokeAI 1: ``"a cat [a dog]" -s 30 -S 5 -W 512 -H 512 -C 7 -A ddim``."""
    prompt, quote, settings = value.strip().removeprefix('"').rpartition('"')
    given = dict(_DREAM.findall(settings))
    if not quote or "s" not in given:
        return None
    positive, negative = _bracketed(prompt)
    names = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfgScale"}
    found: dict[str, object] = {names[key]: given[key] for key in names if key in given}
    found |= {"prompt": positive, "negativePrompt": negative, "sampler": given.get("A")}
    return Reading("invokeai", found, from_image="I" in given)


def _novelai(bag: Bag) -> Reading | None:
    """NovelAI's comment. Its checkpoints are its own, so none is named.

    In files other than PNG, and in the alpha channel, the chunks are one object.
    """
    if "Comment" in bag:
        bag = mapping(load_json(bag["Comment"]))
    if "uc" not in bag or "prompt" not in bag or "scale" not in bag:
        return None
    found = _renamed(
        bag,
        prompt="prompt",
        negativePrompt="uc",
        steps="steps",
        cfgScale="scale",
        sampler="sampler",
        scheduler="noise_schedule",
        seed="seed",
        width="width",
        height="height",
    )
    return Reading("novelai", found, from_image="strength" in bag)


def _draw_things(bag: Bag) -> Reading | None:
    """Draw Things' comment in the XMP of its pictures. Its files have names of their own."""
    if "c" not in bag or "steps" not in bag or not isinstance(bag["c"], str):
        return None
    found = _renamed(
        bag,
        prompt="c",
        negativePrompt="uc",
        steps="steps",
        cfgScale="scale",
        sampler="sampler",
        seed="seed",
        Size="size",
        Model="model",
    )
    found["clipSkip"] = mapping(bag.get("v2")).get("clipSkip")
    loras = tuple(
        Reference(name=text(item.get("model")), weight=weight(item.get("weight")))
        for item in items(bag.get("lora", bag.get("loras")))
    )
    strength = number(bag.get("strength"))
    return Reading(
        "drawthings",
        found,
        loras=tuple(use for use in loras if use.name),
        from_image=strength is not None and strength < 1,
    )


def _easy_diffusion(bag: Bag) -> Reading | None:
    """Easy Diffusion: keys of its requests or their labels, a chunk of a PNG each, or JSON."""
    if "use_stable_diffusion_model" not in bag and "Stable Diffusion model" not in bag:
        return None
    model = text(first(bag, "use_stable_diffusion_model", "Stable Diffusion model")) or ""
    found: dict[str, object] = {
        "prompt": first(bag, "prompt", "Prompt"),
        "negativePrompt": first(bag, "negative_prompt", "Negative Prompt"),
        "steps": first(bag, "num_inference_steps", "Steps"),
        "cfgScale": first(bag, "guidance_scale", "Guidance Scale"),
        "sampler": first(bag, "sampler_name", "Sampler"),
        "seed": first(bag, "seed", "Seed"),
        "width": first(bag, "width", "Width"),
        "height": first(bag, "height", "Height"),
        "clipSkip": 2 if str(first(bag, "clip_skip", "Clip Skip")).casefold() == "true" else None,
        "Model": model.replace("\\", "/").rpartition("/")[2],
    }
    names = _one_or_more(first(bag, "use_lora_model", "LoRA model"))
    strengths = _one_or_more(first(bag, "lora_alpha", "LoRA Strength"))
    loras = tuple(
        Reference(name=text(str(name)), weight=weight(_at(strengths, i)))
        for i, name in enumerate(names)
        if name not in (None, "", "None")
    )
    return Reading("easydiffusion", found, loras=loras, from_image=bool(first(bag, "init_image")))


def _one_or_more(value: object) -> list[Any]:
    """A list, which may be JSON text, or the one value that stands for it."""
    loaded = load_json(value)
    if isinstance(loaded, list):
        return loaded
    return _listed(value) if isinstance(value, str) else [value]


def _stability_matrix(bag: Bag) -> Reading | None:
    """Stability Matrix's own chunk; it writes the WebUI's text too."""
    if "PositivePrompt" not in bag:
        return None
    found = _renamed(
        bag,
        prompt="PositivePrompt",
        negativePrompt="NegativePrompt",
        steps="Steps",
        cfgScale="CfgScale",
        sampler="Sampler",
        seed="Seed",
        width="Width",
        height="Height",
        Model="ModelName",
    )
    found["Model hash"] = bag.get("ModelHash")
    return Reading("stabilitymatrix", found)


_READERS: tuple[Callable[[Bag], Reading | None], ...] = (
    _swarmui,
    _ruined_fooocus,
    _invokeai,
    _fooocus,
    _novelai,
    _draw_things,
    _easy_diffusion,
    _stability_matrix,
)
