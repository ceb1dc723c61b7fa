"""Nodes of ComfyUI that hand on one of their inputs: which one, by their authors' rules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from diffagent.t2i.metadata.compute import Inputs
from diffagent.t2i.metadata.expression import NotKnownError
from diffagent.t2i.metadata.graph import Node, is_link
from diffagent.t2i.metadata.values import Bag

#: Switches between two inputs by a boolean: its name, and the inputs when it is on and off.
_BRANCHES = (
    ("boolean", "on_true", "on_false"),
    ("switch", "on_true", "on_false"),
    ("cond", "tt_value", "ff_value"),
    ("ANY", "IF_TRUE", "IF_FALSE"),
)
_BRANCHING = frozenset(
    {"easy ifElse", "ComfySwitchNode", "LazySwitchKJ", "ImpactConditionalBranch"}
    | {"If ANY return A else B"}
)
_AB = re.compile(  # WAS Suite's
    r"(?:Text|Number|Latent|Image|Model|CLIP|VAE|Conditioning|Control Net Model|Upscale Model)"
    r" Input Switch\Z"
)
_NUMBERED = re.compile(r"CR .*Switch|ImpactSwitch\Z|LatentSwitch\Z|easy (?:text|\w+Index)Switch\Z")
_FIRST = frozenset({"Any Switch (rgthree)"})
#: rgthree's bundles of links: an output is the input of the same name, or the bundle's before it.
_CONTEXTS = frozenset({"Context (rgthree)", "Context Big (rgthree)"})
_CONTEXT_SWITCHES = frozenset({"Context Switch (rgthree)", "Context Switch Big (rgthree)"})
_CONTEXT = (
    *("base_ctx", "model", "clip", "vae", "positive", "negative", "latent", "images", "seed"),
    *("steps", "step_refiner", "cfg", "ckpt_name", "sampler", "scheduler", "clip_width"),
    *("clip_height", "text_pos_g", "text_pos_l", "text_neg_g", "text_neg_l", "mask", "control_net"),
)
_SELECTORS = ("select", "Input", "input", "index")


def context_link(node: Node, slot: int) -> object:
    """Where an output of a bundle comes from; None for the bundle itself and for other nodes."""
    if not 0 < slot < len(_CONTEXT):
        return None
    behind: object = None
    if node.kind in _CONTEXTS:
        link = node.inputs.get(_CONTEXT[slot])
        if link is not None:
            return link
        behind = node.inputs.get("base_ctx")
    elif node.kind in _CONTEXT_SWITCHES:
        names = (name for name, link in node.inputs.items() if is_link(link))
        behind = next((node.inputs[name] for name in names if name.startswith("ctx_")), None)
    return [behind[0], slot] if is_link(behind) else None


def is_switch(node: Node) -> bool:
    kind = node.kind
    return (
        kind in _BRANCHING
        or kind in _FIRST
        or "[Crystools]" in kind
        or bool(_AB.match(kind) or _NUMBERED.match(kind))
        or kind == "easy imageSwitch"
    )


def chosen(node: Node, inputs: Inputs, slot: int) -> str | None:
    """The name of the input that a switch hands on; None where it is no switch.

    Raises:
        NotKnownError: it is not known which.
    """
    raw = node.inputs
    if node.kind in _FIRST:
        for name in raw:
            if name.startswith("any_") and is_link(raw[name]):
                return name
        raise NotKnownError("a switch without inputs")
    if _NUMBERED.match(node.kind):
        return _numbered(raw, inputs, slot)
    if _AB.match(node.kind) or node.kind == "easy imageSwitch":
        ends = "_a" if inputs.flag("boolean") else "_b"
        return _single(name for name in raw if name.endswith(ends))
    for selector, on, off in _BRANCHES:
        if selector in raw and (on in raw or off in raw):
            return _single([on if inputs.flag(selector) else off])
    return None


def _numbered(raw: Bag, inputs: Inputs, slot: int) -> str:
    """The input whose name ends in the number that is selected, from 0 or 1 as the names do."""
    selector = next((name for name in _SELECTORS if name in raw), "")
    selected = str(inputs.whole(selector))
    names = [
        name for name in raw if name != selector and re.fullmatch(rf"[A-Za-z_]+{selected}", name)
    ]
    if len(names) == 2 and {name.rstrip("0123456789") for name in names} == {"model", "clip"}:
        return sorted(names, reverse=True)[slot == 1]
    return _single(names)


def _single(names: Iterable[str]) -> str:
    inputs = list(names)
    if len(inputs) != 1:
        raise NotKnownError("a switch of another kind")
    return inputs[0]
