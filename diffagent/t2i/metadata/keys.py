"""The reader of keys: the WebUI's names as the site parses them, of every era.

All other dialects are turned into these keys first. This is the hot path: a build reads millions
of records, nearly all of them in this form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from diffagent.t2i.metadata.generation import Form, Generation, Reading, Reference
from diffagent.t2i.metadata.networks import merge_networks
from diffagent.t2i.metadata.prompt_tags import Prompt, split_prompt
from diffagent.t2i.metadata.values import (
    Bag,
    air,
    file_hash,
    first,
    integer,
    items,
    number,
    size,
    text,
    weight,
)
from diffagent.t2i.samplers import normalise

_MAX_SHARED = 4000  # characters of a prompt; the cache holds 16 MB at most
_MAX_NAME = 100  # characters; a longer sampler is none, and must not fill the cache
_cached = lru_cache(maxsize=4096)(normalise)  # a few spellings, millions of records
_split = lru_cache(maxsize=4096)(split_prompt)  # pictures of a post share theirs

_PROMPT = ("prompt", "Prompt")
_CHECKPOINT_AIRS = frozenset({"checkpoint", "diffusionmodel"})
_LORA_TYPES = frozenset({"lora", "locon", "lycoris", "lyco", "dora"})
_EMBEDDING_TYPES = frozenset({"embed", "embedding", "textualinversion"})
_UPSCALED = re.compile(r"hires|upscal|first pass", re.I)
_HIRES = frozenset({"Hires upscale", "Hires resize", "Hires upscaler", "First pass size"})
#: Keys that name the checkpoint besides its hash.
_SEVERAL = frozenset({"civitaiResources", "hashes", "models", "resources", "versionIds"})
#: What the site's form asks for; a program's text always has more.
_TYPED = frozenset(
    {"prompt", "negativePrompt", "cfgScale", "steps", "sampler", "seed", "clipSkip", "resources"}
)
#: Names of a ControlNet's settings that the site's early parser spilled among the picture's own.
_SPILLED = ('"preprocessor', "preprocessor", "control mode")
_FIELDS = {"negativePrompt": "negative_prompt", "clipSkip": "clip_skip"}
_OLD_FIRST_PASS = 512 * 512  # pixels


def form_of_keys(bag: Bag) -> Form:
    """The form of a bag that no other reader claims."""
    if isinstance(bag.get("civitaiResources"), list):
        return "civitai"
    if "external" in bag:
        return "external"
    return "typed" if bag.keys() <= _TYPED else "a1111"


class Named(NamedTuple):
    """What of a record names models; many are dropped before more of them is wanted."""

    checkpoints: tuple[Reference, ...]
    prompt: Prompt
    loras: tuple[Reference, ...]
    weights_known: bool = True  # of the LoRAs


NOTHING_NAMED = Named((), Prompt(), ())


def read_named(reading: Reading, named: tuple[Reference, ...] | None = None) -> Named:
    """The part of `read_keys` that names models; ``named``: its `checkpoints`, where known."""
    bag = reading.keys
    prompt = _prompt(text(first(bag, *_PROMPT)), _known_embeddings(bag))
    loras, weights_known = _loras(bag, prompt.loras, reading.loras)
    return Named(
        checkpoints(reading) if named is None else named,
        prompt,
        loras,
        weights_known and prompt.weights_known,
    )


def read_keys(
    reading: Reading,
    image_width: object = None,
    image_height: object = None,
    named: Named | None = None,
) -> Generation:
    """Read the site's keys. Never raises, whatever the values.

    Args:
        reading: the keys, and the models that another dialect names.
        image_width: pixels of the picture itself, for a record that has no size.
        image_height: as ``image_width``.
        named: what `read_named` gave, where that is known already.
    """
    bag = reading.keys
    named = read_named(reading) if named is None else named
    prompt_raw = text(first(bag, *_PROMPT))
    negative_raw = text(first(bag, "negativePrompt", "Negative prompt", "negative_prompt"))
    negative = _prompt(negative_raw, _known_embeddings(bag), take_words=True)
    if reading.original is not None:
        prompt_raw = text(reading.original.get("prompt"))
        negative_raw = text(reading.original.get("negativePrompt"))
    sampler = text(first(bag, "sampler", "Sampler", "sampler_name"))
    schedule = text(first(bag, "Schedule type", "scheduler"))
    if schedule is None and "Scheduler" in bag:  # Fooocus', or some extension's
        schedule = text(bag["Scheduler"])
        schedule = schedule if sampler and _normalise(sampler, schedule) else None
    steps = number(first(bag, "steps", "Steps"))
    if "size" in reading.not_known:
        image_width = image_height = None
    width, height, from_picture = _size(bag, image_width, image_height)
    clip_skip = integer(first(bag, "clipSkip", "Clip skip", "clip_skip"))
    seed = integer(first(bag, "seed", "Seed"))
    return Generation(
        form=reading.form,
        prompt_raw=prompt_raw,
        prompt=named.prompt.text,
        negative_prompt_raw=negative_raw,
        negative_prompt=negative.text,
        sampler_name=sampler,
        schedule_name=schedule if sampler else None,
        sampler=_normalise(sampler, schedule) if sampler else None,
        steps=int(steps) if steps is not None and steps == int(steps) else None,
        cfg_scale=number(first(bag, "cfgScale", "CFG scale", "CFG Scale", "cfg_scale", "cfg")),
        width=width,
        height=height,
        size_from_image=from_picture,
        # 1 is the last layer; some programs count from 0 or, like ComfyUI, from -1 downwards.
        clip_skip=abs(clip_skip) or 1 if clip_skip is not None else 1,
        seed=seed if seed is not None and 0 <= seed < 2**64 else None,
        from_image=reading.from_image or _from_image(bag),
        checkpoints=named.checkpoints,
        loras=named.loras,
        hypernetworks=_hypernetworks(bag, named.prompt.hypernetworks),
        embeddings=named.prompt.embeddings + _site_embeddings(bag, negative_raw, negative=False),
        negative_embeddings=negative.embeddings
        + _site_embeddings(bag, negative_raw, negative=True),
        vae=_vae(bag),
        not_known=(
            *(_FIELDS.get(key, key) for key in reading.not_known),
            *(() if named.weights_known else ("loras",)),
        ),
    )


def _prompt(
    raw: str | None, known: tuple[tuple[str, str | None], ...], *, take_words: bool = False
) -> Prompt:
    if not raw:
        return Prompt()
    split = _split if len(raw) <= _MAX_SHARED else split_prompt
    return split(raw, known, take_words=take_words)


def _normalise(sampler: str, schedule: str | None) -> str | None:
    return _cached(sampler, schedule) if len(sampler) + len(schedule or "") < _MAX_NAME else None


def _size(
    bag: Bag, image_width: object, image_height: object
) -> tuple[int | None, int | None, bool]:
    """(width, height) at which the sampler began, and whether they are only the picture's.

    Before any upscaling, in whole latent pixels: the WebUI and ComfyUI divide a size by 8 and
    forget the rest, so 500 x 700 ran as 496 x 696. The first hires fix wrote the final size, and
    the size of its first pass apart; 0x0 there meant about 512 x 512 pixels in whole 64s.
    """
    found = size(first(bag, "Size", "size", "resolution"))
    if found is None:
        width, height = integer(bag.get("width")), integer(bag.get("height"))
        found = (width, height) if width and height and width > 0 and height > 0 else None
    if found is not None:
        passed = size(bag["First pass size"]) if "First pass size" in bag else None
        if passed is not None and all(found):
            found = passed if all(passed) else _first_pass(*found)
        return found[0] // 8 * 8, found[1] // 8 * 8, False
    width, height = integer(image_width), integer(image_height)
    if not width or not height or width % 8 or height % 8:  # other sizes were scaled or cropped
        return None, None, False
    if any(_UPSCALED.search(key) for key in bag if isinstance(key, str)):
        return None, None, False
    return width, height, True


def _first_pass(width: int, height: int) -> tuple[int, int]:
    scale = math.sqrt(_OLD_FIRST_PASS / (width * height))
    return math.ceil(scale * width / 64) * 64, math.ceil(scale * height / 64) * 64


def _from_image(bag: Bag) -> bool:
    """The WebUI writes a denoising strength for img2img, and for its hires fix's second pass."""
    if "Denoising strength" in bag or "Mask blur" in bag:
        return bag.keys().isdisjoint(_HIRES)
    workflow = bag.get("workflow") or bag.get("process")
    return isinstance(workflow, str) and workflow.startswith(("img2img", "inpaint"))


def _name(value: object) -> str | None:
    """A model's name. The site reads a quoted one with a colon in it as an object."""
    if isinstance(value, dict):
        return text(", ".join(f"{key}: {part}" for key, part in value.items()))
    return text(value)


def checkpoints(reading: Reading) -> tuple[Reference, ...]:
    """References to the checkpoint, the site's own ids before hashes, each once."""
    bag, given = reading.keys, reading.checkpoints
    model = bag.get("Model")
    if not model and bag.keys().isdisjoint(_SPILLED):
        model = bag.get("model")
    name = _name(model) or next((reference.name for reference in given if reference.name), None)
    if not given and bag.keys().isdisjoint(_SEVERAL) and not str(model).startswith("urn:"):
        digest = file_hash(first(bag, "Model hash", "modelHash"))
        return (Reference(hash=digest, name=name),) if digest or name else ()
    found: dict[int | str, Reference] = {}
    for reference in (*_site_checkpoints(bag, model), *given, *_hashed_checkpoints(bag, name)):
        key = reference.version_id or reference.hash
        if key and key not in found:
            found[key] = reference
    return tuple(found.values()) or ((Reference(name=name),) if name else ())


def _site_checkpoints(bag: Bag, model: object) -> Iterator[Reference]:
    """Checkpoints by the site's ids."""
    if "civitaiResources" in bag:
        for item in items(bag["civitaiResources"]):
            if str(item.get("type", "")).lower() in _CHECKPOINT_AIRS:
                yield Reference(version_id=integer(item.get("modelVersionId")))
    for value in (model, *_list(bag.get("models"))):
        if isinstance(value, str) and value.startswith("urn:air:"):
            yield Reference(version_id=air(value, _CHECKPOINT_AIRS))


def _hashed_checkpoints(bag: Bag, name: str | None) -> Iterator[Reference]:
    """Checkpoints by hashes, and last what may be one: ids and hashes of no known type."""
    digest = file_hash(first(bag, "Model hash", "modelHash"))
    if digest:
        yield Reference(hash=digest, name=name)
    hashes = bag.get("hashes")
    if isinstance(hashes, dict) and "model" in hashes:
        yield Reference(hash=file_hash(hashes["model"]), name=name)
    for item in items(bag.get("resources")):
        if item.get("type") in ("model", "checkpoint"):
            yield Reference(hash=file_hash(item.get("hash")), name=text(item.get("name")))
    for value in _list(bag.get("versionIds")):
        yield Reference(version_id=integer(value))
    for value in _list(hashes):
        yield Reference(hash=file_hash(value))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _loras(
    bag: Bag, tagged: tuple[Reference, ...], given: tuple[Reference, ...]
) -> tuple[tuple[Reference, ...], bool]:
    """LoRAs with weights, and whether it is known which of them have which.

    The on-site generator's list is complete, so it wins over the rest. Two tags of one network add
    up in one program, and count twice with the last weight in another.
    """
    if "civitaiResources" in bag:
        listed = tuple(
            Reference(
                version_id=integer(item.get("modelVersionId")),
                name=text(item.get("modelVersionName")),
                weight=weight(item.get("weight")),
            )
            for item in items(bag["civitaiResources"])
            if str(item.get("type", "")).lower() in _LORA_TYPES
        )
        if listed:
            return listed, True
    tags: dict[str, Reference] = {}
    for reference in tagged:
        if reference.name and (key := reference.name.casefold()) not in tags:
            digest = _spilled_hash(bag, reference.name)
            tags[key] = reference._replace(hash=digest) if digest else reference
    listed = (*given, *_listed_loras(bag))
    hashed = tuple(_hashed_loras(bag))
    is_once = len(tags) == sum(1 for reference in tagged if reference.name)
    if not listed and not hashed:
        return tuple(tags.values()), is_once
    networks, weights_known = merge_networks(tags, listed, hashed)
    return networks, weights_known and is_once


def _spilled_hash(bag: Bag, name: str) -> str | None:
    """``Lora hashes: "a: HASH, b: HASH"`` as the site's early parser spilled it: one key a LoRA."""
    value = bag.get(name) or bag.get(f'"{name}')
    return file_hash(value.rstrip('"')) if isinstance(value, str) and len(value) < 70 else None


def _listed_loras(bag: Bag) -> Iterator[Reference]:
    """LoRAs listed with their weights: AddNet, resources, ComfyUI's resources."""
    if "AddNet Enabled" in bag or "AddNet Model 1" in bag:
        yield from _addnet_loras(bag)
    for item in items(bag.get("resources")):
        if str(item.get("type", "")).lower() in _LORA_TYPES:
            yield Reference(
                hash=file_hash(item.get("hash")),
                name=text(item.get("name")),
                weight=weight(item.get("weight")),
            )
    for item in items(bag.get("additionalResources")):
        if str(item.get("type", "")).lower() in _LORA_TYPES:
            strength = weight(item.get("strength"))
            version = air(item.get("name"), _LORA_TYPES)
            yield Reference(version_id=version, name=text(item.get("name")), weight=strength)
    if "Lora weights" in bag:
        weights = dict(_pairs(bag["Lora weights"]))
        for name, value in _pairs(bag.get("Lora hashes")):
            if name in weights:
                strength = weight(weights[name])
                yield Reference(hash=file_hash(value), name=text(name), weight=strength)


def _hashed_loras(bag: Bag) -> Iterator[Reference]:
    """LoRAs listed by hash alone; their weights are those of the prompt's tags."""
    hashes = bag.get("hashes")
    for key, value in hashes.items() if isinstance(hashes, dict) else ():
        kind, _, name = key.partition(":")
        if name and kind.lower() in _LORA_TYPES:
            yield Reference(hash=file_hash(value), name=text(name))
    if "Lora hashes" in bag:
        for name, value in _pairs(bag["Lora hashes"]):
            yield Reference(hash=file_hash(value), name=text(name))


def _addnet_loras(bag: Bag) -> Iterator[Reference]:
    """The Additional Networks extension: ``AddNet Model 1: "name(hash)"``, weights A and B."""
    for slot in range(1, 6):
        model = text(bag.get(f"AddNet Model {slot}")) or ""
        name, bracket, digest = model.rpartition("(")
        if not bracket or not digest.endswith(")"):
            continue
        if str(bag.get(f"AddNet Module {slot}", "LoRA")).lower() == "lora":
            strength = weight(first(bag, f"AddNet Weight {slot}", f"AddNet Weight A {slot}"))
            yield Reference(hash=file_hash(digest[:-1]), name=text(name), weight=strength)


def _pairs(value: object) -> Iterator[tuple[str, str]]:
    """``a: 1, b: 2`` as text, or the object that the site makes of it; names may have commas."""
    if isinstance(value, str):
        pending: list[str] = []
        for part in value.split(","):
            name, colon, given = part.rpartition(":")
            given = given.strip(' "')
            if colon and (file_hash(given) or number(given) is not None):
                yield ",".join([*pending, name]).strip(' "'), given
                pending = []
            elif pending or part.strip():
                pending.append(part)
    elif isinstance(value, dict):
        for name, given in value.items():
            yield name, str(given)


def _known_embeddings(bag: Bag) -> tuple[tuple[str, str | None], ...]:
    """Embeddings that hashes prove: ``embed:NAME`` of the site's extension, and "TI hashes"."""
    hashes = bag.get("hashes")
    if not isinstance(hashes, dict):
        hashes = {}
    if not hashes and "TI hashes" not in bag:
        return ()
    known = {
        key.partition(":")[2]: file_hash(value)
        for key, value in hashes.items()
        if key.partition(":")[0].lower() in _EMBEDDING_TYPES
    }
    for name, value in _pairs(bag.get("TI hashes")):
        known[name] = known.get(name) or file_hash(value)
    known.pop("", None)
    return tuple(known.items())


def _site_embeddings(
    bag: Bag, negative_prompt: str | None, *, negative: bool
) -> tuple[Reference, ...]:
    """Embeddings of the on-site generator's list, which does not name their prompt."""
    if "civitaiResources" not in bag:
        return ()
    words = (negative_prompt or "").casefold()
    references = (
        Reference(
            version_id=integer(item.get("modelVersionId")),
            name=text(item.get("modelVersionName")),
            weight=weight(item.get("weight")),
        )
        for item in items(bag["civitaiResources"])
        if str(item.get("type", "")).lower() in _EMBEDDING_TYPES
    )
    return tuple(
        reference
        for reference in references
        if bool(reference.name and reference.name.casefold() in words) == negative
    )


def _vae(bag: Bag) -> Reference | None:
    """The WebUI's ``VAE`` and ``VAE hash``, which the site moves among the hashes."""
    hashes = bag.get("hashes")
    moved = hashes.get("vae") if isinstance(hashes, dict) else None
    if moved is None and "VAE" not in bag and "VAE hash" not in bag:
        return None
    digest, name = file_hash(bag.get("VAE hash", moved)), _name(bag.get("VAE"))
    return Reference(hash=digest, name=name) if digest or name else None


def _hypernetworks(bag: Bag, tagged: tuple[Reference, ...]) -> tuple[Reference, ...]:
    """Tags, or the field that the WebUI had before there were tags: ``Hypernet: name(hash)``."""
    if "Hypernet" not in bag:
        return tagged
    name = text(bag["Hypernet"])
    if not name or any(reference.name == name for reference in tagged):
        return tagged
    strength = weight(bag.get("Hypernet strength"))
    digest = file_hash(bag.get("Hypernet hash"))
    return (*tagged, Reference(hash=digest, name=name, weight=strength))
