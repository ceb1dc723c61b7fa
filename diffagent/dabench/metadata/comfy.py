"""ComfyUI: what the sampler that drew the picture was fed with.

There is no schema: the graph is the metadata. The reader finds the sampler that begins with an
empty latent, and follows its links: the model's through LoRA loaders to the checkpoint, the
prompts' through conditioning and text nodes to the texts, the latent's to the size, and the
parts of a custom sampler to theirs. What it follows goes by names of inputs rather than by lists
of node classes, since nodes of other authors keep to them. Every walk is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from diffagent.dabench.metadata.generation import Reading, Reference
from diffagent.dabench.metadata.graph import Node, Nodes, api_nodes, is_link, workflow_nodes
from diffagent.dabench.metadata.values import (
    Bag,
    air,
    integer,
    items,
    load_json,
    mapping,
    number,
    size,
    text,
    weight,
)

_MAX_STEPS = 200  # links of one walk
#: What makes a part of a custom sampler; a node without any only hands one on.
_PART_KEYS = frozenset({"sampler_name", "scheduler", "steps", "cfg", "noise_seed", "seed"})
_MAX_PIPES = 8  # nodes that hand a bundle of links on
_MAX_CHARS = 20_000  # of a text that is put together
_LORA_AIRS = frozenset({"lora", "lycoris", "locon", "dora"})
_CHECKPOINT_AIRS = frozenset({"checkpoint", "diffusionmodel"})
_LATENTS = ("latent_image", "latent", "samples", "latents", "optional_latent", "LATENT")
_PIPES = ("pipe", "basic_pipe", "sdxl_tuple", "context", "base_ctx", "ctx", "pipe_in", "SCA_PIPE")
_CHECKPOINTS = ("ckpt_name", "base_ckpt_name", "unet_name", "model_path", "gguf_name")
_STRENGTHS = ("strength_model", "lora_model_strength", "model_strength", "strength", "lora_wt")
_NUMBERS = ("value", "Value", "seed", "noise_seed", "int", "float", "number", "INT")
#: Inputs of nodes that hand a name on: primitive nodes, selectors, loaders.
_NAMES = (
    *("value", "Value", "string", "String", "text", "air", *_CHECKPOINTS, "lora_name"),
    *("sampler_name", "scheduler", "name"),
)
#: Inputs of nodes that hold a text or hand a conditioning on.
_TEXTS = (
    *("text", "prompt", "string", "String", "value", "Text", "text1", "wildcard_text"),
    *("conditioning", "cond", "template", "any_01", "input1", *_PIPES),
)
_STACKED = re.compile(r"lora_(?:name_)?0*(\d{1,3})(?:_name)?\Z")
_TEXT_PART = re.compile(r"(?:text|string|prompt|str)_?(?:[a-h]|\d{1,2})\Z")
_CONDITIONINGS = ("conditioning_to", "conditioning_from", "conditioning_1", "conditioning_2")
_DIMENSIONS = re.compile(r"\d{3,4}\s?[x×]\s?\d{3,4}")
_ENDING = re.compile(r"\.(?:safetensors|ckpt|pt|pth|gguf|bin)\Z", re.I)
_DELIMITERS = {"comma": ", ", "space": " ", "newline": "\n", "\\n": "\n", "tab": " "}


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


def _reading(form: Any, nodes: Nodes, workflow: Bag, prompt: Bag) -> Reading:
    graph = _Graph(nodes)
    sampler, stage = graph.first_sampler()
    checkpoints, loras = _extra_airs(prompt, workflow)
    names: list[str] = []
    used: list[Reference] = []
    keys: dict[str, object] = {}
    if sampler is not None:
        keys = graph.sampling(sampler)
        keys["prompt"] = graph.text(sampler, "positive")
        keys["negativePrompt"] = graph.text(sampler, "negative")
        names, used = graph.models(sampler)
    keys |= stage.keys
    keys["clipSkip"] = graph.clip_skip()
    if not names:
        names, used = graph.all_models(used)
    versions = [air(name, _CHECKPOINT_AIRS) for name in names]
    # Two checkpoints are a merge, which is neither; an unnamed one is told by nothing.
    named = tuple(
        Reference(version_id=version, name=None if version else _ENDING.sub("", name))
        for name, version in zip(names[:1], versions[:1], strict=True)
        if len(set(names)) == 1
    )
    strength = keys.pop("denoise", None)
    denoised = number(strength)
    return Reading(
        form,
        {key: value for key, value in keys.items() if value is not None},
        named + tuple(ref for ref in checkpoints if ref.version_id not in versions),
        tuple(used) or loras,
        from_image=stage.from_image or (denoised is not None and denoised < 1 and not stage.empty),
    )


class _Stage:
    """Where a sampler's latent comes from."""

    def __init__(self, origin: str | None = None, keys: dict[str, object] | None = None) -> None:
        self.origin = origin  # 'empty', 'image', 'sampler' or None
        self.keys = keys or {}
        self.empty = origin == "empty"
        self.from_image = origin == "image"

    @property
    def rank(self) -> int:
        return ("empty", "image", None, "sampler").index(self.origin)


class _Graph:
    """Walks over a graph's nodes."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._texts: dict[tuple[str, str], str | None] = {}

    def _at(self, link: object) -> tuple[str, Node] | None:
        """The node that an input comes from; crossings of subgraphs are walked through."""
        for _ in range(_MAX_STEPS):
            if not is_link(link):
                return None
            key = str(link[0])
            node = self._nodes.get(key)
            if node is None:
                return None
            if node.kind != "Subgraph":
                return key, node
            link = node.inputs.get(f"output_{link[1]}")
        return None

    def first_sampler(self) -> tuple[Node | None, _Stage]:
        """The sampler that drew the picture first, and where its latent came from."""
        best: tuple[tuple[int, bool], Node, _Stage] | None = None
        for node in self._nodes.values():
            if not _is_sampler(node):
                continue
            stage = self._stage(node)
            rank = (stage.rank, bool(number(node.inputs.get("start_at_step"))))
            if best is None or rank < best[0]:
                best = (rank, node, stage)
        if best is not None:
            return best[1], best[2]
        # Nodes that are loader and sampler in one, or whose latent comes through a pipe.
        loose = (node for node in self._nodes.values() if {"steps", "cfg"} <= node.inputs.keys())
        sizes = [keys for node in self._nodes.values() if (keys := self._latent_size(node))]
        stage = _Stage("empty", sizes[0]) if sizes else _Stage()
        return next(loose, None), stage

    def _stage(self, sampler: Node) -> _Stage:
        node = sampler
        for _ in range(_MAX_STEPS):
            link = _first_link(node, _LATENTS) or (node is not sampler and _only_link(node))
            found = self._at(link)
            if found is None:
                return _Stage()
            node = found[1]
            if _is_sampler(node):
                return _Stage("sampler")
            keys = self._latent_size(node)
            if keys:
                return _Stage("empty", keys)
            if "pixels" in node.inputs or "VAEEncode" in node.kind:
                return _Stage("image")
        return _Stage()

    def _latent_size(self, node: Node) -> dict[str, object]:
        inputs = node.inputs
        for prefix in ("empty_latent_", ""):
            width = integer(self.scalar(inputs.get(f"{prefix}width"), "width"))
            height = integer(self.scalar(inputs.get(f"{prefix}height"), "height"))
            makes = prefix or "Empty" in node.kind or "batch_size" in inputs
            if width and height and makes and not _first_link(node, _LATENTS):
                return {"width": width, "height": height}
        for name in ("dimensions", "resolution", "aspect_ratio"):
            value = inputs.get(name)
            match = (
                re.search(r"\d{3,4}\s?[x×]\s?\d{3,4}", value) if isinstance(value, str) else None
            )
            if match:
                found = size(match.group()) or (None, None)
                return {"width": found[0], "height": found[1]}
        return {}

    def sampling(self, sampler: Node, depth: int = 0) -> dict[str, object]:
        """Steps, scale, sampler, scheduler, seed and denoising, also of custom samplers."""
        inputs = sampler.inputs
        found: dict[str, object] = {
            "steps": self.scalar(inputs.get("steps"), "steps"),
            "cfgScale": self.scalar(inputs.get("cfg"), "cfg"),
            "sampler": self.string(inputs.get("sampler_name")),
            "scheduler": self.string(inputs.get("scheduler")),
            "seed": self.scalar(inputs.get("seed", inputs.get("noise_seed")), "seed"),
            "denoise": self.scalar(inputs.get("denoise"), "denoise"),
        }
        parts = {"sampler": "sampler", "sigmas": "scheduler", "guider": "cfgScale", "noise": "seed"}
        for part in parts:
            node = self._part(inputs.get(part))
            if node is None:
                continue
            for key, value in self._custom(part, node).items():
                found[key] = value if found.get(key) is None else found[key]
        piped = self._part(_first_link(sampler, _PIPES)) if depth < _MAX_PIPES else None
        if piped is not None and found["steps"] is None:
            return found | self.sampling(piped, depth + 1)
        return found

    def _part(self, link: object) -> Node | None:
        """The node that makes a part, through nodes that only change it."""
        for _ in range(_MAX_STEPS):
            at = self._at(link)
            if at is None:
                return None
            node = at[1]
            if not _PART_KEYS.isdisjoint(node.inputs) or "Guider" in node.kind:
                return node
            link = _first_link(node, ("sigmas", "sampler", "guider", "noise"))
            if link is None and (link := _only_link(node)) is None:
                return node
        return None

    def _custom(self, part: str, node: Node) -> dict[str, object]:
        inputs = node.inputs
        if part == "sampler":
            kind = node.kind.removeprefix("Sampler")
            name = self.string(inputs.get("sampler_name"))
            return {"sampler": name or (kind if kind != node.kind and kind else None)}
        if part == "sigmas":
            kind = node.kind.removesuffix("Scheduler").removesuffix("Sampling")
            known = {"Karras", "Exponential", "Polyexponential", "SDTurbo", "Beta", "VP"}
            schedule = "Align Your Steps" if "AlignYourSteps" in kind else kind
            named = self.string(inputs.get("scheduler"))
            return {
                "steps": self.scalar(inputs.get("steps"), "steps"),
                "scheduler": named or (schedule if kind in known or schedule != kind else None),
                "denoise": self.scalar(inputs.get("denoise"), "denoise"),
            }
        if part == "guider":
            cfg = inputs.get("cfg", inputs.get("cfg_conds"))
            # Without a negative prompt there is no guidance, which is what a scale of 1 means.
            return {"cfgScale": 1 if node.kind == "BasicGuider" else self.scalar(cfg, "cfg")}
        return {"seed": self.scalar(inputs.get("noise_seed", inputs.get("seed")), "seed")}

    def scalar(self, value: object, wanted: str) -> float | int | str | None:
        """A number, also through primitive nodes."""
        for _ in range(_MAX_STEPS):
            if isinstance(value, int | float | str):
                return value
            at = self._at(value)
            if at is None:
                return None
            node = at[1]
            value = next(
                (node.inputs[name] for name in (wanted, *_NUMBERS) if name in node.inputs), None
            )
            value = _only_link(node) if value is None else value
        return None

    def string(self, value: object) -> str | None:
        """A name, also through primitive nodes and the site's model selector."""
        for _ in range(_MAX_STEPS):
            if isinstance(value, dict):  # a widget with a preview
                value = value.get("content", value.get("name"))
            if isinstance(value, str):
                return text(value)
            at = self._at(value)
            if at is None or not isinstance(value, list):
                return None
            inputs = at[1].inputs
            slots = mapping(mapping(load_json(inputs.get("resources_json"))).get("bySlot"))
            found = slots.get(str(value[1]))
            if not isinstance(found, str):
                found = next((inputs[name] for name in _NAMES if name in inputs), None)
            value = _only_link(at[1]) if found is None else found
        return None

    def models(self, sampler: Node) -> tuple[list[str], list[Reference]]:
        """(checkpoints, LoRAs in the order in which they are applied) of a sampler's model."""
        loras: list[list[Reference]] = []
        checkpoints: list[str] = []
        ahead: list[Any] = [_model_link(sampler)]
        seen: set[str] = set()
        while ahead and len(seen) < _MAX_STEPS:
            at = self._at(ahead.pop())
            if at is None or at[0] in seen:
                continue
            seen.add(at[0])
            node = at[1]
            loras.append(self._stack(node, set()))
            name = self._checkpoint(node)
            if name:
                checkpoints.append(name)
                continue
            merged = [node.inputs.get(name) for name in ("model1", "model2")]
            ahead.extend(merged if all(merged) else [_model_link(node) or _only_link(node)])
        return checkpoints, [use for uses in reversed(loras) for use in uses]

    def all_models(self, used: list[Reference]) -> tuple[list[str], list[Reference]]:
        """Those of all nodes, when no path leads from the sampler to a checkpoint."""
        names = [name for node in self._nodes.values() if (name := self._checkpoint(node))]
        if not used:
            used = [use for node in self._nodes.values() for use in self._loras(node)]
        return names, used

    def _checkpoint(self, node: Node) -> str | None:
        value = next((node.inputs[name] for name in _CHECKPOINTS if name in node.inputs), None)
        return self.string(value) if value is not None else None

    def _stack(self, node: Node, seen: set[str]) -> list[Reference]:
        """A node's LoRAs, after those of the stacks that are linked to it."""
        found: list[Reference] = []
        for name in ("lora_stack", "optional_lora_stack", "LORA_STACK"):
            at = self._at(node.inputs.get(name))
            if at is not None and at[0] not in seen and len(seen) < _MAX_STEPS:
                seen.add(at[0])
                found += self._stack(at[1], seen)
        return found + list(self._loras(node))

    def _loras(self, node: Node) -> Iterator[Reference]:
        """LoRAs that a node loads: one, or a stack of them in the manner of several authors."""
        inputs = node.inputs
        if "lora_name" in inputs:
            strength = next((inputs[name] for name in _STRENGTHS if name in inputs), None)
            yield from self._lora(inputs["lora_name"], strength)
        listed = inputs.get("loras")
        for item in items(mapping(listed).get("__value__", listed)):
            if item.get("active", True) is not False:
                yield from self._lora(item.get("name"), item.get("strength"))
        simple = inputs.get("input_mode") == "simple"
        count = integer(inputs.get("lora_count", inputs.get("num_loras")))
        for name, value in inputs.items():
            match = _STACKED.match(name)
            if not match:
                continue
            slot = match.group(1)
            if isinstance(value, dict) and "lora" in value:  # rgthree's
                if value.get("on", True):
                    yield from self._lora(value["lora"], value.get("strength"))
                continue
            off = inputs.get(f"switch_{slot}") == "Off"
            if off or (count is not None and int(slot) > count):
                continue
            written = slot if f"strength_{slot}" in inputs else f"{int(slot):02d}"
            names = (f"lora_wt_{slot}", f"model_str_{slot}") if simple else (f"model_str_{slot}",)
            names = (*names, f"lora_wt_{slot}", f"model_weight_{slot}", f"strength_{written}")
            names = (*names, f"strength_model_{slot}", f"lora_{slot}_strength")
            yield from self._lora(value, next((inputs[n] for n in names if n in inputs), None))

    def _lora(self, value: object, strength: object) -> Iterator[Reference]:
        name = self.string(value)
        strength = weight(self.scalar(strength, "strength"))
        if name and name != "None" and abs(strength) >= 0.001:  # the site's own threshold
            yield Reference(version_id=air(name, _LORA_AIRS), name=name, weight=strength)

    def clip_skip(self) -> int | None:
        """-2 is the last layer but one."""
        for node in self._nodes.values():
            for name in ("stop_at_clip_layer", "clip_skip"):
                if name in node.inputs:
                    return integer(self.scalar(node.inputs[name], name))
        return None

    def text(self, sampler: Node, role: str) -> str | None:
        """The text of a sampler's positive or negative prompt."""
        link = sampler.inputs.get(role)
        if link is None:
            guider = self._at(sampler.inputs.get("guider"))
            names = (role, "conditioning", "cond1") if role == "positive" else (role,)
            link = _first_link(guider[1] if guider else sampler, (*names, *_PIPES))
        return self._text(link, role, 0)

    def _text(self, value: object, role: str, depth: int) -> str | None:
        if isinstance(value, str):
            return text(value)
        at = self._at(value)
        if at is None or depth > _MAX_STEPS // 2:
            return None
        key = (at[0], role)
        if key not in self._texts:
            self._texts[key] = None  # a cycle ends here
            self._texts[key] = self._node_text(at[1], role, depth + 1)
        return self._texts[key]

    def _node_text(self, node: Node, role: str, depth: int) -> str | None:
        inputs = node.inputs
        if "ZeroOut" in node.kind:
            return None
        for name in ("populated_text", f"text_{role}", role):
            if inputs.get(name) not in (None, ""):
                return self._text(inputs[name], role, depth)
        pair = [inputs.get(name) for name in ("text_g", "text_l") if inputs.get(name)]
        pair = pair or [inputs.get(name) for name in ("t5xxl", "clip_l") if inputs.get(name)]
        if pair:
            return self._joined(pair, ", ", role, depth)
        parts = [v for name, v in inputs.items() if name in _CONDITIONINGS and is_link(v)]
        if parts:
            return self._joined(parts, ", ", role, depth)
        parts = [v for name, v in inputs.items() if _TEXT_PART.match(name)]
        if len(parts) > 1 and "text" not in inputs:
            given = inputs.get("delimiter", inputs.get("separator"))
            delimiter = given if isinstance(given, str) else ", "
            return self._joined(parts, _DELIMITERS.get(delimiter, delimiter), role, depth)
        if "select" in inputs and is_link(chosen := inputs.get(f"input{inputs['select']}")):
            return self._text(chosen, role, depth)
        found = next((inputs[name] for name in _TEXTS if inputs.get(name) not in (None, "")), None)
        return self._text(_only_link(node) if found is None else found, role, depth)

    def _joined(self, values: list[Any], delimiter: str, role: str, depth: int) -> str | None:
        texts = [self._text(value, role, depth) for value in values]
        unique = dict.fromkeys(found for found in texts if found)
        return delimiter.join(unique)[:_MAX_CHARS] or None


def _is_sampler(node: Node) -> bool:
    inputs = node.inputs
    draws = "steps" in inputs or "sigmas" in inputs or "sampler_name" in inputs
    return draws and any(name in inputs for name in _LATENTS)


def _first_link(node: Node, names: tuple[str, ...]) -> object:
    return next((node.inputs[name] for name in names if is_link(node.inputs.get(name))), None)


def _model_link(node: Node) -> object:
    return _first_link(node, ("model", "MODEL", "base_model", "guider", "unet", *_PIPES))


def _only_link(node: Node) -> object:
    """The link of a node that has one, such as a reroute."""
    links = [value for value in node.inputs.values() if is_link(value)]
    return links[0] if len(links) == 1 else None
