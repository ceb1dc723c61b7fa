"""ComfyUI's graphs as nodes with named inputs, from either of the two formats that it saves.

The API format ("prompt") is what ran: nodes by id, each with its class and named inputs; an input
is a value or a link ``[node, output]``. The editor's format ("workflow") holds links in a list of
its own and the values of widgets without their names, which are then known only for common nodes
or when the editor is recent. Muted nodes are in it too, which do not run, and bypassed ones, which
links go through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from diffagent.t2i.metadata.values import Bag, items, mapping

MAX_NODES = 5000
_MAX_DEPTH, _MAX_SUBGRAPHS = 4, 100  # of subgraphs within one another, and in all
_MAX_SLOTS = 50  # outputs of a bypassed node
_MUTED, _BYPASSED = 2, 4  # modes of the editor's nodes
_CONTROL = frozenset({"fixed", "increment", "decrement", "randomize"})
_SAMPLING = "steps cfg sampler_name scheduler denoise"

#: Widgets of common nodes in the editor's order.
_WIDGETS: Mapping[str, str] = {
    "KSampler": f"seed {_SAMPLING}",
    "KSampler (Efficient)": f"seed {_SAMPLING}",
    "KSamplerAdvanced": "add_noise noise_seed steps cfg sampler_name scheduler start_at_step "
    "end_at_step return_with_leftover_noise",
    "SamplerCustom": "add_noise noise_seed cfg",
    "KSamplerSelect": "sampler_name",
    "BasicScheduler": "scheduler steps denoise",
    "KarrasScheduler": "steps sigma_max sigma_min rho",
    "ExponentialScheduler": "steps sigma_max sigma_min",
    "PolyexponentialScheduler": "steps sigma_max sigma_min rho",
    "SDTurboScheduler": "steps denoise",
    "BetaSamplingScheduler": "steps alpha beta",
    "AlignYourStepsScheduler": "model_type steps denoise",
    "CFGGuider": "cfg",
    "RandomNoise": "noise_seed",
    "EmptyLatentImage": "width height batch_size",
    "EmptySD3LatentImage": "width height batch_size",
    "CLIPTextEncode": "text",
    "CLIPTextEncodeSDXL": "width height crop_w crop_h target_width target_height text_g text_l",
    "CLIPTextEncodeSDXLRefiner": "ascore width height text",
    "CLIPTextEncodeFlux": "clip_l t5xxl guidance",
    "CLIPSetLastLayer": "stop_at_clip_layer",
    "CheckpointLoaderSimple": "ckpt_name",
    "UNETLoader": "unet_name weight_dtype",
    "LoraLoader": "lora_name strength_model strength_clip",
    "LoraLoaderModelOnly": "lora_name strength_model",
    "PrimitiveNode": "value",
    "LatentUpscale": "upscale_method width height crop",
    "LatentUpscaleBy": "upscale_method scale_by",
    "StringConcatenate": "string_a string_b delimiter",
    "StringReplace": "string find replace",
    "RegexReplace": "string regex_pattern replace case_insensitive multiline dotall count",
    "MathExpression|pysssss": "expression",
    "SimpleMath+": "value",
    **dict.fromkeys(
        ("CR SDXL Aspect Ratio", "CR SD1.5 Aspect Ratio"),
        "width height aspect_ratio swap_dimensions upscale_factor batch_size",
    ),
    "CR Aspect Ratio": "width height aspect_ratio swap_dimensions upscale_factor prescale_factor "
    "batch_size",
    "CR Text List": "multiline_text start_index max_rows",
    "Efficient Loader": "ckpt_name vae_name clip_skip lora_name lora_model_strength "
    "lora_clip_strength positive negative token_normalization weight_interpretation "
    "empty_latent_width empty_latent_height batch_size",
}


@dataclass(frozen=True, slots=True)
class Node:
    """A node: its class, and its inputs by name."""

    kind: str
    inputs: Bag


Nodes = Mapping[str, Node]


def is_link(value: object) -> TypeGuard[list[Any]]:
    """Whether an input is the output of another node."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str | int)
        and isinstance(value[1], int)
    )


def api_nodes(graph: object) -> Nodes:
    """Nodes of a graph in API format, in the order of their ids."""
    found = {
        str(key): Node(node["class_type"], mapping(node.get("inputs")))
        for key, node in mapping(graph).items()
        if isinstance(node, dict) and isinstance(node.get("class_type"), str)
    }
    return _ordered(found)


def _ordered(nodes: dict[str, Node]) -> Nodes:
    order = sorted(nodes, key=lambda key: (len(key), key))[:MAX_NODES]
    return {key: nodes[key] for key in order}


def workflow_nodes(workflow: object) -> Nodes:
    """Nodes of a graph in the editor's format; empty when it is none."""
    flow = mapping(workflow)
    definitions = {
        str(item.get("id")): item
        for item in items(mapping(flow.get("definitions")).get("subgraphs"))
    }
    return _ordered(_Editor(definitions).read(flow))


class _Editor:
    """One pass over an editor's graph; subgraphs are laid out flat with ids ``OUTER:INNER``."""

    def __init__(self, definitions: Mapping[str, Bag]) -> None:
        self._definitions = definitions
        self._nodes: dict[str, Node] = {}
        self._left = _MAX_SUBGRAPHS

    def read(self, flow: Bag) -> dict[str, Node]:
        self._level(flow, "", {})
        return self._nodes

    def _level(self, flow: Bag, prefix: str, outside: Mapping[int, list[Any]]) -> dict[int, Any]:
        """Read one level; ``outside`` are the links into it. Returns the links out of it."""
        links: dict[int, list[Any]] = {}
        out: dict[int, Any] = {}
        for ident, origin, slot, target, target_slot in _links(flow.get("links")):
            if origin == -10:  # the subgraph's own inputs
                if slot in outside:
                    links[ident] = outside[slot]
            else:
                links[ident] = [f"{prefix}{origin}", slot]
            if target == -20:  # its outputs
                out[target_slot] = links.get(ident)
        stored = {
            str(_widgets(node)[0]): node
            for node in items(flow.get("nodes"))
            if node.get("type") == "SetNode" and _widgets(node)
        }
        for node in items(flow.get("nodes")):
            if len(self._nodes) < MAX_NODES:
                self._node(node, prefix, links, stored)
        return out

    def _node(
        self, node: Bag, prefix: str, links: Mapping[int, list[Any]], stored: Mapping[str, Bag]
    ) -> None:
        kind, key = str(node.get("type")), f"{prefix}{node.get('id')}"
        if node.get("mode") == _MUTED:
            return  # it did not run, and nothing is linked to it
        linked = {
            str(item.get("name") or slot): link
            for slot, item in enumerate(items(node.get("inputs")))
            if (link := _linked(item, links))
        }
        if node.get("mode") == _BYPASSED:
            through = _through(node, links)
            self._nodes[key] = Node("Subgraph", through) if through else Node("Bypassed", linked)
            return
        definition = self._definitions.get(kind)
        if definition is not None and key.count(":") < _MAX_DEPTH and self._left:
            self._left -= 1
            inputs = enumerate(items(node.get("inputs")))
            inside = {slot: link for slot, item in inputs if (link := _linked(item, links))}
            out = self._level(definition, f"{key}:", inside)
            # The node itself stays as a crossing: output slot -> where it comes from.
            self._nodes[key] = Node("Subgraph", {f"output_{slot}": to for slot, to in out.items()})
            return
        if kind == "GetNode" and (source := stored.get(str(next(iter(_widgets(node)), "")))):
            at = [link for item in items(source.get("inputs")) if (link := _linked(item, links))]
            linked = {"value": at[0]} if at else {}
        self._nodes[key] = Node(kind, {**_named_widgets(node, kind), **linked})


def _through(node: Bag, links: Mapping[int, list[Any]]) -> dict[str, Any]:
    """Where the outputs of a bypassed node come from: its inputs of the same types."""
    inputs = list(items(node.get("inputs")))
    through: dict[str, Any] = {}
    for slot, output in enumerate(list(items(node.get("outputs")))[:_MAX_SLOTS]):
        same = [item for item in inputs if item.get("type") == output.get("type")]
        if slot < len(inputs) and inputs[slot] in same:
            same = [inputs[slot]]
        link = _linked(same[0], links) if same and output.get("type") else None
        if link:
            through[f"output_{slot}"] = link
    return through


def _linked(item: Bag, links: Mapping[int, list[Any]]) -> list[Any] | None:
    link = item.get("link")
    return links.get(link) if isinstance(link, int) else None


def _links(links: object) -> Iterator[tuple[int, Any, int, Any, int]]:
    """(id, origin, its slot, target, its slot): lists at the top, objects in a subgraph."""
    for link in links if isinstance(links, list) else []:
        if isinstance(link, dict):
            names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
            link = [link.get(name) for name in names]  # noqa: PLW2901
        if isinstance(link, list) and len(link) >= 5:
            ident, origin, slot, target, target_slot = link[:5]
            ints = isinstance(ident, int) and isinstance(slot, int)
            if ints and isinstance(target_slot, int) and isinstance(origin, int | str):
                yield ident, origin, slot, target, target_slot


def _widgets(node: Bag) -> list[Any]:
    values = node.get("widgets_values")
    return values if isinstance(values, list) else []


def _named_widgets(node: Bag, kind: str) -> dict[str, Any]:
    """The values of a node's widgets by name, as far as names are known."""
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return dict(values)
    values = _widgets(node)
    names = _WIDGETS[kind].split() if kind in _WIDGETS else _shown_names(node)
    if not names:
        return _guess_widgets(kind, values)
    found: dict[str, Any] = {}
    left = list(reversed(values))
    for name in names:
        if left:
            found[name] = left.pop()
        if "seed" in name and left and _is_control(left[-1]):
            left.pop()
    return found


def _is_control(value: object) -> bool:
    """What the editor shows after a seed: how it changes. Some nodes leave it empty."""
    return value is None or (isinstance(value, str) and value in _CONTROL)


def _shown_names(node: Bag) -> list[str]:
    """Recent editors list every widget among the inputs."""
    shown = (mapping(item.get("widget")).get("name") for item in items(node.get("inputs")))
    return [name for name in shown if isinstance(name, str)]


def _guess_widgets(kind: str, values: list[Any]) -> dict[str, Any]:
    """Nodes of other authors: a list of LoRAs names itself, and a lone value is one."""
    loras = [value for value in values if isinstance(value, dict) and "lora" in value]
    if loras:
        return {f"lora_{index}": value for index, value in enumerate(loras, 1)}
    texts = [value for value in values if isinstance(value, str)]
    is_text = re.search(r"text|prompt|string|positive|negative|wildcard", kind, re.I)
    if is_text and len(texts) == 1:
        return {"text": texts[0]}
    single = [value for value in values if not _is_control(value)]
    return {"value": single[0]} if len(single) == 1 else {}
