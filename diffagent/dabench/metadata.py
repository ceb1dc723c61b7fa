"""Generation metadata: what a record says about how its picture was made.

Civitai's ``meta`` is an open bag of keys (thousands of them) in a handful of dialects: the
AUTOMATIC1111 text as the site parses it, the on-site generator (``civitaiResources``), ComfyUI
(a JSON string with the graph), the AddNet extension, and any of them wrapped once more as
``{id, meta}``. `parse_generation` reads them into one `Generation` and never raises: what cannot
be read is None, and the filters decide what that means.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import orjson

from diffagent.render.samplers import normalise

Form = Literal["none", "a1111", "civitai", "comfyui"]

#: Prompt tags that load a network; (kind, name, the rest after the name).
_TAG = re.compile(r"<(lora|lyco|lycoris|locon|dora|hypernet):([^<>:]+)(?::([^<>]*))?>", re.I)
_COMMAS = re.compile(r"(?: ?,)+")
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")
_INTEGER = re.compile(r"\s*([+-]?\d{1,20})\b")
_SIZE = re.compile(r"\s*(\d{1,5})\s*[x×]\s*(\d{1,5})\s*$", re.I)
_HASH = re.compile(r"(?:0x)?([0-9a-f]{8,64})$", re.I)
_AIR = re.compile(r"urn:air:[^:]*:(?P<type>[^:]*):civitai:\d+@(?P<version>\d{1,15})")
_ADDNET = re.compile(r"(.*?)\s*\(([0-9a-f]{8,64})\)$", re.I)
_LORA_HASHES = re.compile(r"([^:,\"]+):\s*([0-9a-f]{8,64})\b", re.I)
_LORA_RESOURCES = frozenset({"lora", "locon", "lycoris", "dora"})
_UPSCALED = re.compile(r"hires|upscal|first pass", re.I)
_normalise = lru_cache(maxsize=4096)(normalise)  # a few spellings, millions of records


@dataclass(frozen=True, slots=True)
class Reference:
    """How metadata names a model: by the site's version id, by a file's hash, or only by name."""

    version_id: int | None = None
    hash: str | None = None  # upper case
    name: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Generation:
    """What metadata says, in the field's units; None where it does not say."""

    form: Form = "none"
    prompt_raw: str | None = None
    prompt: str = ""  # without the tags that load networks, in one line
    negative_prompt: str = ""
    sampler_raw: str | None = None
    sampler: str | None = None  # canonical; None also when the spelling is unknown
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    clip_skip: int = 1
    seed: int | None = None
    checkpoints: tuple[Reference, ...] = ()  # best evidence first
    loras: tuple[Reference, ...] = ()


def parse_generation(
    meta: object, *, image_width: object = None, image_height: object = None
) -> Generation:
    """Read generation metadata of any dialect. Never raises, whatever the JSON.

    Args:
        meta: the record's ``meta``.
        image_width: pixels of the picture itself, which stand in for a missing size when
            nothing says that it was scaled up.
        image_height: as ``image_width``.
    """
    bag = _unwrap(meta)
    if not bag:
        return Generation()
    graph = _comfy(bag.get("comfy"))
    prompt_raw = _text(_first(bag, "prompt", "Prompt")) or graph.get("prompt")
    negative = _text(_first(bag, "negativePrompt", "Negative prompt", "negative_prompt"))
    sampler_raw, sampler = _sampler(bag, graph)
    steps = _number(_first(bag, "steps", "Steps"))
    cfg_scale = _number(_first(bag, "cfgScale", "CFG scale", "cfg_scale", "cfg"))
    width, height = _size(bag, graph, image_width, image_height)
    steps = graph.get("steps") if steps is None else steps
    on_site = isinstance(bag.get("civitaiResources"), list)
    return Generation(
        form="civitai" if on_site else "comfyui" if bag.get("comfy") else "a1111",
        prompt_raw=prompt_raw,
        prompt=clean_prompt(prompt_raw or ""),
        negative_prompt=clean_prompt(
            (graph.get("negative_prompt") or "") if negative is None else negative
        ),
        sampler_raw=sampler_raw,
        sampler=sampler,
        steps=int(steps) if steps is not None and steps == int(steps) else None,
        cfg_scale=graph.get("cfg_scale") if cfg_scale is None else cfg_scale,
        width=width,
        height=height,
        clip_skip=_clip_skip(bag),
        seed=_seed(bag, graph),
        checkpoints=_checkpoints(bag, graph),
        loras=_loras(bag, graph, prompt_raw or ""),
    )


def clean_prompt(text: str) -> str:
    """A prompt in one line without the tags that load networks (``<lora:name:0.8>``)."""
    if "<" in text:
        text = _TAG.sub(" ", text)
    return _COMMAS.sub(",", " ".join(text.split())).strip(" ,")


def _unwrap(meta: object) -> Mapping[str, Any]:
    """Undo ``{id, meta: {...}}``, as often as it was done."""
    while isinstance(meta, dict) and "id" in meta and "meta" in meta:
        meta = meta["meta"]
    return meta if isinstance(meta, dict) else {}


def _first(bag: Mapping[str, Any], *keys: str) -> Any:
    return next((bag[key] for key in keys if bag.get(key) not in (None, "")), None)


def _text(value: object) -> str | None:
    """Text as UTF-8 can hold it (a lone surrogate cannot be stored), or None."""
    if not isinstance(value, str):
        return None
    return value.encode("utf-8", "replace").decode().replace("\0", "").strip()


def _number(value: object) -> float | None:
    """A finite number from a number or the text of one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _integer(value: object) -> int | None:
    """An integer from a number or from text that begins with one ("2," is seen in the wild)."""
    if isinstance(value, str):
        match = _INTEGER.match(value)
        return int(match.group(1)) if match else None
    number = _number(value)
    return (
        int(value)
        if isinstance(value, int) and number is not None
        else (int(number) if number is not None and number == int(number) else None)
    )


def _sampler(bag: Mapping[str, Any], graph: Mapping[str, Any]) -> tuple[str | None, str | None]:
    raw = _text(_first(bag, "sampler", "Sampler", "sampler_name")) or graph.get("sampler")
    if not raw:
        return None, None
    schedule = _text(_first(bag, "Schedule type", "scheduler")) or graph.get("scheduler")
    written = f"{raw} ({schedule})" if schedule else raw
    return written, _normalise(raw, schedule)


def _size(
    bag: Mapping[str, Any], graph: Mapping[str, Any], image_width: object, image_height: object
) -> tuple[int | None, int | None]:
    """(width, height) at which the sampler ran: before any upscaling, in whole latent pixels.

    The WebUI and ComfyUI divide a size by 8 and forget the rest, so 500 x 700 ran as 496 x 696.
    """
    match = _SIZE.match(_text(_first(bag, "Size", "size")) or "")
    if match:
        return int(match.group(1)) // 8 * 8, int(match.group(2)) // 8 * 8
    for source in (bag, graph):
        width, height = _integer(source.get("width")), _integer(source.get("height"))
        if width and height:
            return width // 8 * 8, height // 8 * 8
    width, height = _integer(image_width), _integer(image_height)
    if not width or not height or width % 8 or height % 8:  # other sizes were scaled or cropped
        return None, None
    return (None, None) if any(_UPSCALED.search(key) for key in bag) else (width, height)


def _clip_skip(bag: Mapping[str, Any]) -> int:
    """1 is the last layer; some programs count from 0 or, like ComfyUI, from -1 downwards."""
    value = _integer(_first(bag, "clipSkip", "Clip skip", "clip_skip"))
    return abs(value) or 1 if value is not None else 1


def _seed(bag: Mapping[str, Any], graph: Mapping[str, Any]) -> int | None:
    seed = _integer(_first(bag, "seed", "Seed"))
    seed = graph.get("seed") if seed is None else seed
    return seed if seed is not None and 0 <= seed < 2**64 else None


def _hash(value: object) -> str | None:
    match = _HASH.match(value.strip()) if isinstance(value, str) else None
    return match.group(1).upper() if match else None


def _items(value: object) -> Iterator[Mapping[str, Any]]:
    return (
        (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())
    )


def _air(value: object, kinds: frozenset[str]) -> int | None:
    match = _AIR.search(value) if isinstance(value, str) else None
    return int(match.group("version")) if match and match.group("type") in kinds else None


def _checkpoints(bag: Mapping[str, Any], graph: Mapping[str, Any]) -> tuple[Reference, ...]:
    """References to the checkpoint, the site's own ids before hashes, each once."""
    name = _text(_first(bag, "Model", "model")) or graph.get("checkpoint")
    found: list[Reference] = []
    for item in _items(bag.get("civitaiResources")):
        if str(item.get("type", "")).lower() == "checkpoint":
            found.append(Reference(version_id=_integer(item.get("modelVersionId"))))
    models = bag.get("models")
    for value in [bag.get("Model"), *(models if isinstance(models, list) else [])]:
        found.append(Reference(version_id=_air(value, frozenset({"checkpoint"}))))
    found.append(Reference(version_id=_air(graph.get("checkpoint"), frozenset({"checkpoint"}))))
    found.append(Reference(hash=_hash(_first(bag, "Model hash", "modelHash")), name=name))
    hashes = bag.get("hashes")
    if isinstance(hashes, dict):
        found.append(Reference(hash=_hash(hashes.get("model")), name=name))
    for item in _items(bag.get("resources")):
        if item.get("type") in ("model", "checkpoint"):
            found.append(Reference(hash=_hash(item.get("hash")), name=_text(item.get("name"))))
    unique = {ref.version_id or ref.hash: ref for ref in reversed(found)}
    return tuple(
        ref
        for ref in found
        if (ref.version_id or ref.hash) and unique[ref.version_id or ref.hash] is ref
    )


def _loras(bag: Mapping[str, Any], graph: Mapping[str, Any], prompt: str) -> tuple[Reference, ...]:
    """LoRAs with weights. The on-site generator's list is complete, so it wins over the rest."""
    listed = [
        Reference(
            version_id=_integer(item.get("modelVersionId")),
            name=_text(item.get("modelVersionName")),
            weight=_weight(item.get("weight")),
        )
        for item in _items(bag.get("civitaiResources"))
        if str(item.get("type", "")).lower() in _LORA_RESOURCES
    ]
    if listed:
        return tuple(listed)
    found: dict[str, Reference] = {}
    for ref in [
        *_tagged_loras(prompt),
        *_addnet_loras(bag),
        *_hashed_loras(bag),
        *graph.get("loras", ()),
    ]:
        key = (ref.name or ref.hash or "").casefold()
        known = found.get(key)
        if known is None:
            found[key] = ref
        elif known.hash is None and ref.hash:  # the tag has the weight, the list has the hash
            found[key] = replace(known, hash=ref.hash)
    return tuple(found.values())


def _weight(value: object) -> float:
    number = _number(value)
    return 1.0 if number is None else round(number, 4)


def _tagged_loras(prompt: str) -> Iterator[Reference]:
    for kind, name, rest in _TAG.findall(prompt):
        if kind.lower() != "hypernet":
            number = _NUMBER.match(rest.strip())
            yield Reference(name=_text(name), weight=_weight(number.group() if number else None))


def _addnet_loras(bag: Mapping[str, Any]) -> Iterator[Reference]:
    """The Additional Networks extension: ``AddNet Model 1: "name(hash)"``, weights A and B."""
    for slot in range(1, 6):
        match = _ADDNET.match(_text(bag.get(f"AddNet Model {slot}")) or "")
        if match and str(bag.get(f"AddNet Module {slot}", "LoRA")).lower() == "lora":
            weight = _first(bag, f"AddNet Weight {slot}", f"AddNet Weight A {slot}")
            yield Reference(hash=_hash(match.group(2)), name=match.group(1), weight=_weight(weight))


def _hashed_loras(bag: Mapping[str, Any]) -> Iterator[Reference]:
    """Lists that give LoRAs their hashes: resources, hashes, and the WebUI's "Lora hashes"."""
    for item in _items(bag.get("resources")):
        if str(item.get("type", "")).lower() in _LORA_RESOURCES:
            yield Reference(
                hash=_hash(item.get("hash")),
                name=_text(item.get("name")),
                weight=_weight(item.get("weight")),
            )
    hashes = bag.get("hashes")
    for key, value in hashes.items() if isinstance(hashes, dict) else ():
        kind, _, name = key.partition(":")
        if kind.lower() in _LORA_RESOURCES and name:
            yield Reference(hash=_hash(value), name=_text(name))
    for name, value in _LORA_HASHES.findall(_text(bag.get("Lora hashes")) or ""):
        yield Reference(hash=_hash(value), name=_text(name))


def _comfy(value: object) -> dict[str, Any]:
    """The settings in a ComfyUI graph: what the first sampler node and its inputs say."""
    graph = _load(value)
    if isinstance(graph, dict) and "prompt" in graph:
        graph = _load(graph["prompt"])
    if not isinstance(graph, dict):
        return {}
    nodes = {str(key): node for key, node in graph.items() if isinstance(node, dict)}
    order = sorted(nodes, key=lambda key: (len(key), key))
    samplers = [nodes[key] for key in order if "KSampler" in str(nodes[key].get("class_type"))]
    found: dict[str, Any] = {"loras": []}
    if samplers:
        inputs = _inputs(samplers[0])
        found |= {
            "steps": _integer(inputs.get("steps")),
            "cfg_scale": _number(inputs.get("cfg")),
            "sampler": _text(inputs.get("sampler_name")),
            "scheduler": _text(inputs.get("scheduler")),
            "seed": _integer(_first(inputs, "seed", "noise_seed")),
            "prompt": _linked_text(nodes, inputs.get("positive")),
            "negative_prompt": _linked_text(nodes, inputs.get("negative")),
        }
    for key in order:
        kind, inputs = str(nodes[key].get("class_type")), _inputs(nodes[key])
        if "CheckpointLoader" in kind:
            found.setdefault("checkpoint", _text(inputs.get("ckpt_name")))
        elif "LoraLoader" in kind and (name := _text(inputs.get("lora_name"))):
            weight = _weight(inputs.get("strength_model"))
            version = _air(name, frozenset({"lora", "lycoris", "dora"}))
            found["loras"].append(Reference(version_id=version, name=name, weight=weight))
        elif kind.startswith("Empty") and "width" in inputs:
            found.setdefault("width", inputs["width"])
            found.setdefault("height", inputs.get("height"))
    return found


def _load(value: object) -> object:
    """JSON from text that may hold NaN and undefined, as JavaScript leaves them; None if not."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(re.sub(r"\bundefined\b", "null", value), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def _inputs(node: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _linked_text(nodes: Mapping[str, Mapping[str, Any]], link: object) -> str | None:
    """Follow a link ``[node, output]`` to the first text; graphs may be cyclic, so not far."""
    for _ in range(10):
        if isinstance(link, str):
            return _text(link)
        if not isinstance(link, list) or not link:
            return None
        inputs = _inputs(nodes.get(str(link[0]), {}))
        link = _first(inputs, "text", "text_g", "string", "conditioning", "positive")
    return None
