"""ComfyUI: what the sampler that drew the saved picture was fed with.

There is no schema: the graph is the metadata, and `walks` reads it. A picture that went through
several samplers is read from the first of those whose noise is still in it: a base model's, not
its refiner's or its upscaler's. Where a graph saves pictures of several such samplers, only what
is the same for all of them is known. `Reading.not_known` names what a graph computes in a way
that this package does not know; the site's own reading of such a graph is not believed either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from diffagent.t2i.metadata.expression import NotKnownError
from diffagent.t2i.metadata.generation import Form, Reading, Reference
from diffagent.t2i.metadata.graph import Nodes, api_nodes, workflow_nodes
from diffagent.t2i.metadata.graph_walks import Walks
from diffagent.t2i.metadata.values import (
    Bag,
    air,
    integer,
    items,
    load_json,
    mapping,
    number,
    text,
    weight,
)
from diffagent.t2i.names import file_stem
from diffagent.t2i.samplers import normalise

_LORA_AIRS = frozenset({"lora", "lycoris", "locon", "dora"})
_CHECKPOINT_AIRS = frozenset({"checkpoint", "diffusionmodel"})
_ENDING = re.compile(r"\.(?:safetensors|ckpt|pt|pth|gguf|bin)\Z", re.I)


def read_comfy(value: object) -> Reading | None:
    """Read a graph, or None when there is none.

    Args:
        value: JSON text or an object: the site's ``{"prompt": ..., "workflow": ...}``, or either
            graph itself.
    """
    bag = mapping(load_json(value))
    prompt = mapping(load_json(bag["prompt"])) if "prompt" in bag else bag
    workflow = mapping(load_json(bag.get("workflow")))
    if not workflow and isinstance(bag.get("nodes"), list):
        workflow = bag
    on_site = _on_site(prompt, workflow, bag)
    if on_site is not None:
        return on_site
    nodes = api_nodes(prompt)
    if nodes:
        return _reading("comfyui", nodes, workflow, prompt)
    nodes = workflow_nodes(workflow)
    return _reading("comfyui-workflow", nodes, workflow, prompt) if nodes else None


def _on_site(prompt: Bag, workflow: Bag, bag: Bag) -> Reading | None:
    """The site's generator runs ComfyUI too, and keeps what was asked for beside the graph."""
    places = (prompt, bag, workflow, mapping(workflow.get("extra")))
    found = next((p["extraMetadata"] for p in places if p.get("extraMetadata")), None)
    extra = load_json(found)
    if not isinstance(extra, dict) or not text(extra.get("prompt")):
        return None
    keys: dict[str, object] = {**extra, "workflow": extra.get("workflowId", extra.get("workflow"))}
    checkpoints, loras = _extra_airs(prompt, workflow)
    strengths = {
        integer(item.get("modelVersionId")): item.get("strength")
        for item in items(extra.get("resources"))
    }
    loras = tuple(
        Reference(version_id=use.version_id, weight=weight(strengths.get(use.version_id)))
        for use in loras
    )
    return Reading("civitai", keys, checkpoints, loras)


def _extra_airs(prompt: Bag, workflow: Bag) -> tuple[tuple[Reference, ...], tuple[Reference, ...]]:
    """Checkpoints and LoRAs of the AIRs that the site's nodes leave beside the graph."""
    checkpoints: list[Reference] = []
    loras: list[Reference] = []
    for extra in (mapping(prompt.get("extra")), mapping(workflow.get("extra"))):
        for found, key, kinds in (
            (checkpoints, "ckpt_airs", _CHECKPOINT_AIRS),
            (loras, "lora_airs", _LORA_AIRS),
        ):
            both = [*_list(extra.get("airs")), *_list(extra.get(key))]
            versions = [air(value, kinds) for value in both]
            versions += [_short_air(value) for value in _list(extra.get(key))]
            found.extend(Reference(version_id=version) for version in versions if version)
    return tuple(dict.fromkeys(checkpoints)), tuple(dict.fromkeys(loras))


def _short_air(value: object) -> int | None:
    """``MODEL@VERSION`` of the site's first nodes."""
    match = re.fullmatch(r"\d{1,15}@(\d{1,15})", value) if isinstance(value, str) else None
    return int(match.group(1)) if match else None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _reading(form: Form, nodes: Nodes, workflow: Bag, prompt: Bag) -> Reading:
    walks = Walks(nodes)
    try:
        samplers, plain = walks.samplers()
    except NotKnownError:
        samplers, plain = [], False
    readings = [_sampler_reading(walks, key, plain=plain) for key in samplers]
    reading = _agreed(readings) if readings else _without_sampler(walks)
    checkpoints, loras = _extra_airs(prompt, workflow)
    versions = {reference.version_id for reference in reading.checkpoints}
    literals = frozenset(_literals(nodes))
    return reading._replace(
        form=form,
        checkpoints=reading.checkpoints
        + tuple(ref for ref in checkpoints if ref.version_id not in versions),
        loras=reading.loras or loras,
        literals=literals if samplers else None,
    )


def _sampler_reading(walks: Walks, key: str, *, plain: bool) -> Reading:
    """The inputs of a sampler."""
    unknown: list[str] = []
    keys = walks.sampling(key)
    for name, role in (("prompt", "positive"), ("negativePrompt", "negative")):
        try:
            keys[name] = walks.prompt(key, role)
        except NotKnownError:
            unknown.append(name)
    try:
        keys["clipSkip"] = walks.clip_skip(key)
    except NotKnownError:
        unknown.append("clipSkip")
    try:
        keys["width"], keys["height"] = walks.sampled_size(key)
    except NotKnownError:
        if not plain:  # else the size of the picture is that of the sampler
            unknown.append("size")
    names, loras, complete = walks.models(key)
    if not names:
        names = walks.all_checkpoints()
        complete = complete and bool(names) and (bool(loras) or not walks.loads_loras())
    if not complete:
        unknown.append("loras")
    before = walks.before(key)
    denoise = number(keys.pop("denoise", None))
    partial = denoise is not None and denoise < 1 and (before.loaded or not before.noise)
    return Reading(
        "comfyui",
        {name: value for name, value in keys.items() if value is not None},
        _named(names),
        tuple(loras),
        from_image=(before.loaded and not before.samplers) or partial,
        not_known=tuple(unknown),
    )


def _without_sampler(walks: Walks) -> Reading:
    names = walks.all_checkpoints()
    return Reading("comfyui", {}, _named(names))


def _named(names: list[str]) -> tuple[Reference, ...]:
    """The checkpoint that loaders name. Two are a merge, which is neither."""
    if len(set(names)) != 1 or not names[0]:
        return ()
    version = air(names[0], _CHECKPOINT_AIRS)
    return (Reference(version_id=version, name=None if version else _ENDING.sub("", names[0])),)


def _agreed(readings: list[Reading]) -> Reading:
    """Keep the values that all saved pictures of a graph share; any may be the one at hand."""
    first, *others = readings
    if not others:
        return first
    keys = {
        name: value
        for name, value in first.keys.items()
        if all(other.keys.get(name) == value for other in others)
    }
    named = {name for reading in readings for name in reading.keys} - keys.keys()
    unknown = dict.fromkeys(name for reading in readings for name in reading.not_known)
    if {"width", "height"} & named:
        unknown["size"] = None
    unknown |= dict.fromkeys(
        name for name in ("prompt", "negativePrompt", "clipSkip") if name in named
    )
    if any(other.loras != first.loras for other in others):
        unknown["loras"] = None
    same = all(other.checkpoints == first.checkpoints for other in others)
    return first._replace(
        keys=keys,
        checkpoints=first.checkpoints if same else (),
        loras=() if "loras" in unknown else first.loras,
        from_image=any(reading.from_image for reading in readings),
        not_known=tuple(unknown),
    )


def _literals(nodes: Nodes) -> Iterator[Any]:
    """All that a graph's nodes hold: what the site may have taken for a setting."""
    for node in nodes.values():
        for name, value in node.inputs.items():
            if isinstance(value, str):
                yield value.strip()
                if name == "sampler_name":
                    yield normalise(value)
                elif _ENDING.search(value):
                    yield file_stem(value)
            elif isinstance(value, int | float):
                yield value
