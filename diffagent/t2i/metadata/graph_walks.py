"""Walks over a graph of ComfyUI: which sampler drew the picture that was saved, and with what.

A walk begins at the nodes that save (preview, where none saves) and goes back: through pictures
and latents to the sampler, and from it to its model, prompts, size and settings. What no walk
reaches does not count. What a walk follows goes by names of inputs rather than by lists of node
classes, since nodes of other authors keep to them; but a value counts only if the node that it
comes from holds it or computes it in a way that `compute` knows. Every walk is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from diffagent.t2i.metadata.compute import (
    COMPUTED,
    PLAIN_LATENT,
    SIZES,
    Inputs,
    Scalar,
    Size,
    concatenate,
    concatenation,
    constant,
    join,
    sized,
)
from diffagent.t2i.metadata.expression import NotKnownError
from diffagent.t2i.metadata.generation import Reference
from diffagent.t2i.metadata.graph import Node, Nodes, is_link
from diffagent.t2i.metadata.prompt_tags import split_prompt
from diffagent.t2i.metadata.switches import chosen, context_link, is_switch
from diffagent.t2i.metadata.values import (
    air,
    integer,
    items,
    load_json,
    mapping,
    number,
    text,
    weight,
)

_MAX_LINKS = 200  # of one walk in a line
_MAX_DEPTH = 60  # of nodes that compute from nodes that compute
_MAX_PIPES = 8  # nodes that hand a bundle of links on
_LORA_AIRS = frozenset({"lora", "lycoris", "locon", "dora"})
#: Inputs of a node that makes a part of a custom sampler; without any it only hands one on.
_PART_KEYS = frozenset({"sampler_name", "scheduler", "steps", "cfg", "noise_seed", "seed"})
_LATENTS = ("latent_image", "latent", "samples", "latents", "optional_latent", "LATENT")
_PIPES = ("pipe", "basic_pipe", "sdxl_tuple", "context", "base_ctx", "ctx", "pipe_in", "SCA_PIPE")
_CHECKPOINTS = ("ckpt_name", "base_ckpt_name", "unet_name", "model_path", "gguf_name")
_STRENGTHS = ("strength_model", "lora_model_strength", "model_strength", "strength", "lora_wt")
_STACKED = re.compile(r"lora_(?:name_)?0*(\d{1,3})(?:_name)?\Z")
_CONDITIONINGS = ("conditioning_to", "conditioning_from", "conditioning_1", "conditioning_2")
#: Inputs that hold a prompt where a conditioning is made of it, and those that hand one on.
_ENCODED = ("text", "prompt", "string")
_HANDED_ON = ("conditioning", "cond", "conditioning1", "cond1", *_PIPES)

_SAVES = re.compile(r"save|export|upload|websocket|send|video.?combine|discord|output", re.I)
_PREVIEWS = re.compile(r"preview|compar|display|view|show", re.I)
_SHOWN = re.compile(r"image|img|picture|frame|pixel|video|anim", re.I)
_PICTURES = re.compile(
    r"image|img|picture|frame|pixel|video|anim|latent|samples?(?:\d|_|\Z)|destination|source", re.I
)
_ASIDE = re.compile(  # pictures that only steer one, and what is no picture
    r"ref|mask|control|style|background|overlay|depth|clip|model|vae|positive|negative|cond|name",
    re.I,
)
_SETTINGS = re.compile(
    r"width|height|seed|text|string|prompt|factor|scale|amount|step|cfg|int|float|number|strength"
    r"|size|switch|bool|lora",
    re.I,
)
_HANDS_ON = re.compile(  # nodes that hand their one input on as it is
    r"reroute|^[gs]etnode$|show ?text|show ?anything|preview ?any|display ?any|display ?text"
    r"|^(?:string|text) to (?:string|text|console)|clean ?(?:v|gpu)|purge ?vram",
    re.I,
)
#: Nodes that change a latent and not its size.
_SAME_SIZE = re.compile(
    r"SetLatentNoiseMask|RepeatLatentBatch|LatentFromBatch|LatentBatch|LatentFlip|LatentAdd"
    r"|LatentSubtract|LatentMultiply|LatentBlend|LatentInterpolate|InjectLatentNoise"
    r"|CR Latent Batch Size|Latent Noise Injection|RemoveNoiseMask|LatentComposite"
)
#: Nodes whose outputs are a positive and a negative conditioning, in this order.
_PAIRED = re.compile(r"ControlNetApply(?:Advanced|SD3)|CondPassThrough|InpaintModelConditioning")
#: Nodes that keep a conditioning to an area or to some steps.
_OF_A_PART = re.compile(r"SetArea|SetMask|SetProperties|SetTimestepRange|AreaConditioning", re.I)
_LANGUAGE_MODEL = re.compile(
    r"llm|gpt|ollama|gemini|claude|llava|caption|florence|qwen|joy ?cap|chat|interrogat|describe"
    r"|tagger|enhance|translat|prompt ?(?:gen|schedule|travel)|generate ?prompt|random"
    r"|wildcard(?!.*encode)",
    re.I,
)

#: Loaders whose LoRAs are the tags of a text.
_TAGGED = re.compile(r"lora.*(?:tag|text|prompt)|lazylora", re.I)

_STYLE = re.compile(r"style|template|preset|artist", re.I)
_NO_STYLE = frozenset({"none", "no style", "base", "false", "off", ""})

T = TypeVar("T")


class Source(NamedTuple):
    """Where a link comes from."""

    key: str
    node: Node
    slot: int


class Origin(NamedTuple):
    """The origin of a latent or a picture."""

    samplers: frozenset[str]  # keys of the nearest
    loaded: bool  # a picture that was loaded
    noise: bool  # an empty latent
    plain: bool  # nothing but decoding lies between


class Walks:
    """Walks over a graph's nodes."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._memo: dict[tuple[object, ...], Any] = {}
        self._depth = 0

    # --- links and values -------------------------------------------------------------------

    def source(self, link: object) -> Source | None:
        """The node that an input comes from, through all that only hands it on."""
        end = self._resolve(link)
        return end if isinstance(end, Source) else None

    def _resolve(self, link: object) -> object:
        """`source`, or the value at the end of nodes that hand it on, or None."""
        for _ in range(_MAX_LINKS):
            if not is_link(link):
                return link
            key, slot = str(link[0]), link[1]
            node = self._nodes.get(key)
            if node is None:
                return None
            if node.kind == "Subgraph":
                link = node.inputs.get(f"output_{slot}")
                continue
            bundled = context_link(node, slot)
            if bundled is not None:
                link = bundled
                continue
            name = self._handed_on(key, node, slot)
            if name is None:
                return Source(key, node, slot)
            link = node.inputs.get(name)
        return None

    def _handed_on(self, key: str, node: Node, slot: int) -> str | None:
        """The input that an output simply is: of a reroute, or of a switch that chooses it."""
        if _HANDS_ON.search(node.kind) or node.kind == "Bypassed":
            linked = [name for name, value in node.inputs.items() if is_link(value)]
            return linked[0] if len(linked) == 1 else None
        if not is_switch(node):
            return None
        try:
            return self._once(("switch", key, slot), lambda: chosen(node, self._inputs(node), slot))
        except NotKnownError:
            return None

    def _once(self, key: tuple[object, ...], compute: Callable[[], T]) -> T:
        """A result that is computed once; a cycle, and what is nested too deeply, is not known."""
        if key not in self._memo:
            if self._depth >= _MAX_DEPTH:
                raise NotKnownError("too many nodes in a line")
            self._memo[key] = NotKnownError("a cycle")
            self._depth += 1
            try:
                self._memo[key] = compute()
            except NotKnownError as error:
                self._memo[key] = error
            finally:
                self._depth -= 1
        result = self._memo[key]
        if isinstance(result, NotKnownError):
            raise result
        return result  # type: ignore[no-any-return]

    def _inputs(self, node: Node) -> Inputs:
        return Inputs(node, self.value, self.size)

    def value(self, value: object) -> Scalar:
        """A number or a text, which a node may hold or compute. Raises `NotKnownError`."""
        held = self._resolve(value)
        if isinstance(held, dict):  # a widget with a preview
            held = held.get("content", held.get("name"))
        if isinstance(held, str | int | float):
            return held
        if not isinstance(held, Source):
            raise NotKnownError("a link to nothing")
        return self._once(("value", held.key, held.slot), lambda: self._node_value(held))

    def _node_value(self, source: Source) -> Scalar:
        node, inputs = source.node, self._inputs(source.node)
        slots = mapping(mapping(load_json(node.inputs.get("resources_json"))).get("bySlot"))
        if isinstance(selected := slots.get(str(source.slot)), str):  # the site's model selector
            return selected
        if node.kind in COMPUTED:
            outputs = COMPUTED[node.kind](inputs)
            if source.slot >= len(outputs):
                raise NotKnownError("an output of another kind")
            return outputs[source.slot]
        if concatenation(node):
            return concatenate(inputs)[0]
        held = constant(node)
        if held is None:
            raise NotKnownError(f"the node {node.kind!r}")
        return held

    def value_or_none(self, value: object) -> Scalar | None:
        """`value`, or None where it is not known or there is none."""
        try:
            return None if value is None else self.value(value)
        except NotKnownError:
            return None

    def name(self, value: object) -> str | None:
        """The text of a name."""
        return text(self.value_or_none(value))

    # --- which sampler ----------------------------------------------------------------------

    def samplers(self) -> tuple[list[str], bool]:
        """Keys of the samplers that began the pictures that were saved, in order.

        Returns:
            Also whether each was saved as it was drawn: nothing lies between but decoding.
        """
        for roots in (self._saved(), self._shown_by(_PREVIEWS), self._ends()):
            last = self.origin(roots)
            if last.samplers:
                keys = sorted(last.samplers)
                first = {first for key in keys for first in self._first(key, frozenset())}
                plain = last.plain and first == last.samplers
                return sorted(first, key=lambda key: (len(key), key)), plain
            if last.loaded:
                return [], False  # only a picture that was loaded is saved
        loose = [key for key, node in self._nodes.items() if _draws(node)]
        return (loose if len(loose) == 1 else []), False

    def _saved(self) -> list[object]:
        """Links to the pictures that are saved; a few samplers save their own."""
        own = [
            [key, 0]
            for key, node in self._nodes.items()
            if "save" in str(node.inputs.get("image_output", "")).casefold()
        ]
        return [*self._shown_by(_SAVES), *own]

    def _shown_by(self, kinds: re.Pattern[str]) -> list[object]:
        """Links to the pictures of nodes of these kinds."""
        return [
            value
            for node in self._nodes.values()
            if kinds.search(node.kind) and not _is_sampler(node)
            for name, value in node.inputs.items()
            if _SHOWN.search(name) and is_link(value)
        ]

    def _ends(self) -> list[object]:
        """Where nothing saves or previews: nodes whose output goes nowhere, samplers last."""
        used = {
            str(value[0])
            for node in self._nodes.values()
            for value in node.inputs.values()
            if is_link(value)
        }
        ends = [key for key in self._nodes if key not in used]
        others: list[object] = [[key, 0] for key in ends if not _is_sampler(self._nodes[key])]
        if self.origin(others).samplers:
            return others
        return [[key, 0] for key in ends if _is_sampler(self._nodes[key])]

    def origin(self, links: Iterable[object]) -> Origin:
        """The nearest samplers that pictures or latents come from, or where there is none."""
        samplers: set[str] = set()
        loaded, noise, plain = False, False, True
        ahead = [(link, False) for link in links]
        seen: set[str] = set()
        while ahead:
            link, encoded = ahead.pop()
            source = self.source(link)
            if source is None or source.key in seen:
                continue
            seen.add(source.key)
            key, node, _ = source
            if _draws(node):
                samplers.add(key)
                continue
            encoded = encoded or "pixels" in node.inputs or "VAEEncode" in node.kind
            if _makes_latent(node):
                noise, loaded = noise or not encoded, loaded or encoded
                continue
            behind = [(link, encoded) for link in _pictures(node)]
            ahead.extend(behind)
            plain = plain and (not behind or "VAEDecode" in node.kind)
            loaded = loaded or (not behind and (encoded or "LoadImage" in node.kind))
        return Origin(frozenset(samplers), loaded, noise, plain)

    def _first(self, key: str, after: frozenset[str]) -> set[str]:
        """The samplers that a sampler's picture began with: itself, or those before it."""
        node = self._nodes[key]
        before = self.before(key).samplers - after - {key}
        if not before or self._begins_anew(node) or len(after) > _MAX_LINKS:
            return {key}
        return self._once(
            ("first", key),
            lambda: {first for other in before for first in self._first(other, after | {key})},
        )

    def before(self, key: str) -> Origin:
        """Where the latent of a sampler comes from."""
        node = self._nodes[key]
        link = _first_link(node, _LATENTS) or _first_link(node, _PIPES)
        return self._once(("before", key), lambda: self.origin([link]))

    def _begins_anew(self, node: Node) -> bool:
        """Whether a sampler adds all the noise, so that nothing is left of what it was given."""
        inputs = node.inputs
        if "start_at_step" in inputs:
            added = inputs.get("add_noise", "enable") in ("enable", True)
            return added and number(self.value_or_none(inputs["start_at_step"])) == 0
        denoise = number(self.value_or_none(inputs.get("denoise")))
        return denoise is not None and denoise >= 1

    # --- settings ---------------------------------------------------------------------------

    def sampling(self, key: str) -> dict[str, object]:
        """Steps, scale, sampler, scheduler, seed and denoising, also of custom samplers."""
        return self._sampling(self._nodes[key], 0)

    def _sampling(self, sampler: Node, depth: int) -> dict[str, object]:
        inputs = sampler.inputs
        settings: dict[str, object] = {
            "steps": self.value_or_none(inputs.get("steps")),
            "cfgScale": self.value_or_none(inputs.get("cfg")),
            "sampler": self.name(inputs.get("sampler_name")),
            "scheduler": self.name(inputs.get("scheduler")),
            "seed": self.value_or_none(inputs.get("seed", inputs.get("noise_seed"))),
            "denoise": self.value_or_none(inputs.get("denoise")),
        }
        for part in ("sampler", "sigmas", "guider", "noise"):
            node = self._part(inputs.get(part))
            for name, value in self._custom(part, node).items() if node else ():
                settings[name] = value if settings.get(name) is None else settings[name]
        piped = self._part(_first_link(sampler, _PIPES)) if depth < _MAX_PIPES else None
        if piped is not None and settings["steps"] is None and "steps" not in inputs:
            return settings | self._sampling(piped, depth + 1)
        return settings

    def _part(self, link: object) -> Node | None:
        """The node that makes a part, through nodes that only change it."""
        for _ in range(_MAX_LINKS):
            source = self.source(link)
            if source is None:
                return None
            node = source.node
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
            name = self.name(inputs.get("sampler_name"))
            named = "sampler_name" in inputs or kind == node.kind
            return {"sampler": name if named else kind or None}
        if part == "sigmas":
            kind = node.kind.removesuffix("Scheduler").removesuffix("Sampling")
            kinds = {"Karras", "Exponential", "Polyexponential", "SDTurbo", "Beta", "VP"}
            schedule = "Align Your Steps" if "AlignYourSteps" in kind else kind
            implied = schedule if kind in kinds or schedule != kind else None
            return {
                "steps": self.value_or_none(inputs.get("steps")),
                "scheduler": self.name(inputs["scheduler"]) if "scheduler" in inputs else implied,
                "denoise": self.value_or_none(inputs.get("denoise")),
            }
        if part == "guider":
            cfg = inputs.get("cfg", inputs.get("cfg_conds"))
            # Without a negative prompt there is no guidance, which is what a scale of 1 means.
            return {"cfgScale": 1 if node.kind == "BasicGuider" else self.value_or_none(cfg)}
        return {"seed": self.value_or_none(inputs.get("noise_seed", inputs.get("seed")))}

    # --- size -------------------------------------------------------------------------------

    def sampled_size(self, key: str) -> Size:
        """(width, height) in pixels at which a sampler drew. Raises `NotKnownError`."""
        node = self._nodes[key]
        link = _first_link(node, _LATENTS) or _first_link(node, _PIPES)
        if link is not None:
            return self.size(link)
        makers = [key, *(other for other, node in self._nodes.items() if _makes_latent(node))]
        sizes = {size for maker in makers for size in self._sizes(maker)}
        if len(sizes) != 1:  # where nothing is linked, the only one in the graph
            raise NotKnownError("several sizes, or none")
        return sizes.pop()

    def _sizes(self, key: str) -> list[Size]:
        try:
            return [self.size([key, 0])]
        except NotKnownError:
            return []

    def size(self, link: object) -> Size:
        """(width, height) in pixels of a latent. Raises `NotKnownError`."""
        source = self.source(link)
        if source is None:
            raise NotKnownError("a link to nothing")
        return self._once(("size", source.key), lambda: self._node_size(source))

    def _node_size(self, source: Source) -> Size:
        node, inputs = source.node, self._inputs(source.node)
        if node.kind in SIZES:
            return SIZES[node.kind](inputs)
        behind = _first_link(node, ("samples", "samples1", "samples_to", *_LATENTS))
        if node.kind == "LatentUpscale":
            return self._upscaled(inputs)
        if node.kind in ("LatentUpscaleBy", "Latent Upscale by Factor (WAS)"):
            factor = inputs.number("scale_by" if "scale_by" in inputs.raw else "factor")
            width, height = self.size(behind)
            return sized(round(width // 8 * factor) * 8, round(height // 8 * factor) * 8)
        if node.kind == "LatentCrop":
            return sized(inputs.number("width"), inputs.number("height"))
        if behind is not None and (_is_sampler(node) or _SAME_SIZE.match(node.kind)):
            return self.size(behind)
        if behind is None and (piped := _first_link(node, _PIPES)) is not None:
            return self.size(piped)
        return self._plain_size(node)

    def _upscaled(self, inputs: Inputs) -> Size:
        """ComfyUI's "Upscale Latent": a side of 0 keeps the proportions."""
        width, height = inputs.whole("width"), inputs.whole("height")
        if width and height:
            return sized(max(64, width) // 8 * 8, max(64, height) // 8 * 8)
        old_width, old_height = inputs.size("samples")
        if width:
            return sized(max(64, width), max(64, round(old_height * width / old_width)))
        if height:
            return sized(max(64, round(old_width * height / old_height)), max(64, height))
        return sized(old_width, old_height)

    def _plain_size(self, node: Node) -> Size:
        """The size of an empty latent of any author, if nothing else on the node may change it."""
        inputs, values = node.inputs, self._inputs(node)
        if "empty_latent_width" in inputs:
            preset = inputs.get("resolution", inputs.get("empty_latent_aspect", ""))
            if isinstance(preset, str) and (
                match := re.search(r"(\d{3,5})\s?x\s?(\d{3,5})", preset)
            ):
                return sized(int(match.group(1)), int(match.group(2)))
            return sized(values.number("empty_latent_width"), values.number("empty_latent_height"))
        makes = "Empty" in node.kind or "batch_size" in inputs
        if makes and "width" in inputs and PLAIN_LATENT.issuperset(inputs):
            return sized(values.number("width"), values.number("height"))
        raise NotKnownError(f"the size of {node.kind!r}")

    # --- models -----------------------------------------------------------------------------

    def models(self, key: str) -> tuple[list[str], list[Reference], bool]:
        """Checkpoints of a sampler's model, LoRAs in the order in which they are applied.

        Returns:
            Also whether all LoRAs and their strengths are complete.
        """
        loras: list[list[Reference]] = []
        complete = True
        checkpoints: list[str] = []
        ahead: list[Any] = [_model_link(self._nodes[key])]
        if ahead == [None]:  # a sampler that nothing is linked to has the models that there are
            ahead = [[other, 0] for other in reversed(list(self._nodes))]
        seen: set[str] = set()
        while ahead and len(seen) < _MAX_LINKS:
            source = self.source(ahead.pop())
            if source is None or source.key in seen:
                continue
            seen.add(source.key)
            node = source.node
            try:
                loras.append(self._stack(node, set()))
            except NotKnownError:
                complete = False
            if any(name in node.inputs for name in _CHECKPOINTS):
                checkpoints.append(self._checkpoint(node) or "")
                continue
            merged = [node.inputs.get(name) for name in ("model1", "model2")]
            ahead.extend(merged if all(merged) else [_model_link(node) or _only_link(node)])
        return checkpoints, _added(use for uses in reversed(loras) for use in uses), complete

    def all_checkpoints(self) -> list[str]:
        """Those of all nodes, when no path leads from the sampler to a checkpoint."""
        names = (self._checkpoint(node) for node in self._nodes.values())
        return [name for name in names if name]

    def loads_loras(self) -> bool:
        """Whether any node of the graph loads one."""
        return any("lora" in node.kind.casefold() for node in self._nodes.values())

    def _checkpoint(self, node: Node) -> str | None:
        value = next((node.inputs[name] for name in _CHECKPOINTS if name in node.inputs), None)
        return self.name(value) if value is not None else None

    def _stack(self, node: Node, seen: set[str]) -> list[Reference]:
        """A node's LoRAs, after those of the stacks that are linked to it."""
        uses: list[Reference] = []
        for name in ("lora_stack", "optional_lora_stack", "LORA_STACK"):
            source = self.source(node.inputs.get(name))
            if source is not None and source.key not in seen and len(seen) < _MAX_DEPTH:
                seen.add(source.key)
                uses += self._stack(source.node, seen)
        return uses + list(self._loras(node))

    def _loras(self, node: Node) -> Iterator[Reference]:
        """LoRAs that a node loads: one, or a stack of them in the manner of several authors."""
        inputs = node.inputs
        if inputs.get("toggle") is False:
            return
        if "lora_name" in inputs:
            strength = next((inputs[name] for name in _STRENGTHS if name in inputs), None)
            yield from self._lora(inputs["lora_name"], strength)
        if inputs.keys().isdisjoint({"lora_name", "loras"}) and _TAGGED.search(node.kind):
            given = next(
                (inputs[name] for name in ("lora_syntax", *_ENCODED) if name in inputs), ""
            )
            tagged = split_prompt(self._string(given))
            if not tagged.weights_known:
                raise NotKnownError("a weight that is no number")
            yield from tagged.loras
        listed = inputs.get("loras")
        for item in items(mapping(listed).get("__value__", listed)):
            if item.get("active", True) is not False:
                yield from self._lora(item.get("name"), item.get("strength"))
        simple = inputs.get("input_mode") == "simple"
        count = inputs.get("lora_count", inputs.get("num_loras"))
        count = None if count is None else integer(self.value(count))
        for name, value in inputs.items():
            match = _STACKED.match(name)
            if not match:
                continue
            slot = match.group(1)
            if isinstance(value, dict) and "lora" in value:  # rgthree's
                if value.get("on", True):
                    yield from self._lora(value["lora"], value.get("strength"))
                continue
            on = inputs.get(f"switch_{slot}", "On")
            if self.value(on) == "Off" or (count is not None and int(slot) > count):
                continue
            written = slot if f"strength_{slot}" in inputs else f"{int(slot):02d}"
            names = (f"lora_wt_{slot}", f"model_str_{slot}") if simple else (f"model_str_{slot}",)
            names = (*names, f"lora_wt_{slot}", f"model_weight_{slot}", f"strength_{written}")
            names = (*names, f"strength_model_{slot}", f"lora_{slot}_strength")
            yield from self._lora(value, next((inputs[n] for n in names if n in inputs), None))

    def _lora(self, value: object, strength: object) -> Iterator[Reference]:
        name = text(self.value(value)) if isinstance(value, str | list | dict) else None
        if not name or name == "None":
            return
        given = weight(None if strength is None else self.value(strength))
        if abs(given) >= 0.001:  # the site's own threshold
            yield Reference(version_id=air(name, _LORA_AIRS), name=name, weight=given)

    # --- texts ------------------------------------------------------------------------------

    def clip_skip(self, key: str) -> int | None:
        """The last layer that the positive prompt is read from; -2 is the last but one.

        Raises:
            NotKnownError: it is set and not known.
        """
        link = self._role_link(key, "positive")
        for _ in range(_MAX_LINKS):
            source = self.source(link)
            if source is None:
                return None
            inputs = source.node.inputs
            for name in ("stop_at_clip_layer", "clip_skip"):
                if name in inputs:
                    return integer(self.value(inputs[name]))
            names = ("clip", "CLIP", "clip1", "conditioning", "positive", *_CONDITIONINGS, *_PIPES)
            link = _first_link(source.node, names) or _only_link(source.node)
        return None

    def prompt(self, key: str, role: str) -> str | None:
        """The text of a sampler's positive or negative prompt. Raises `NotKnownError`."""
        link = self._role_link(key, role)
        return None if link is None else text(self._text(link, role))

    def _role_link(self, key: str, role: str) -> object:
        sampler = self._nodes[key]
        link = sampler.inputs.get(role)
        if link is not None:
            return link
        guider = self.source(sampler.inputs.get("guider"))
        names = (role, "conditioning", "cond1") if role == "positive" else (role,)
        return _first_link(guider.node if guider else sampler, (*names, *_PIPES))

    def _text(self, value: object, role: str) -> str:
        end = self._resolve(value)
        if isinstance(end, str):
            return end
        if not isinstance(end, Source):
            raise NotKnownError("a link to nothing")
        key, node, slot = end
        if node.kind in COMPUTED or concatenation(node) or constant(node) is not None:
            return self._string(value)
        if _PAIRED.match(node.kind):
            role = "negative" if slot == 1 else "positive"
        return self._once(("text", key, role), lambda: self._node_text(node, role))

    def _string(self, value: object) -> str:
        string = self.value(value)
        if not isinstance(string, str):
            raise NotKnownError("a number for a text")
        return string

    def _node_text(self, node: Node, role: str) -> str:
        """The text of a node that makes a conditioning, or hands one on."""
        inputs = node.inputs
        if "ZeroOut" in node.kind:
            return ""
        if node.kind == "ConditioningAverage":
            return self._average(node, role)
        for name in ("populated_text", f"text_{role}"):
            if inputs.get(name) not in (None, ""):
                return self._string(inputs[name])
        if inputs.get(role) not in (None, ""):
            loads = "loader" in node.kind.casefold()  # which takes texts
            return self._string(inputs[role]) if loads else self._text(inputs[role], role)
        pair = [inputs.get(name) for name in ("text_g", "text_l") if inputs.get(name)]
        pair = pair or [inputs.get(name) for name in ("t5xxl", "clip_l") if inputs.get(name)]
        texts = [self._string(part) for part in pair]
        if not pair:
            mixed = [inputs[name] for name in _CONDITIONINGS if is_link(inputs.get(name))]
            texts = [self._text(part, role) for part in mixed]
            if len(set(texts)) > 1 and any(self._is_of_a_part(link) for link in mixed):
                raise NotKnownError("prompts of parts of the picture")
        if texts:
            return join(", ", list(dict.fromkeys(filter(None, map(str.strip, texts)))))
        if role in inputs:  # a loader's own, left empty
            return ""
        if "TextEncode" in node.kind or not _LANGUAGE_MODEL.search(node.kind):
            given = next((inputs[name] for name in _ENCODED if name in inputs), None)
            if given is not None and not _is_styled(node):
                return self._string(given)
            link = _first_link(node, _HANDED_ON) or _only_link(node)
            if given is None and link is not None:
                return self._text(link, role)
        raise NotKnownError(f"the text of {node.kind!r}")

    def _is_of_a_part(self, link: object) -> bool:
        """Whether a prompt is for an area of the picture, or for some of the steps."""
        for _ in range(_MAX_LINKS):
            source = self.source(link)
            if source is None or _OF_A_PART.search(source.node.kind):
                return source is not None
            link = _first_link(source.node, _HANDED_ON)
        return False

    def _average(self, node: Node, role: str) -> str:
        """A mixture of two prompts is neither, unless one of them has all the weight."""
        strength = self._inputs(node).number("conditioning_to_strength")
        if strength not in (0, 1):
            raise NotKnownError("an average of prompts")
        return self._text(node.inputs.get(f"conditioning_{'to' if strength else 'from'}"), role)


def _added(uses: Iterable[Reference]) -> list[Reference]:
    """Each LoRA once: two loaders of one file add its product twice."""
    added: dict[str, Reference] = {}
    for use in uses:
        name = use.name or ""
        before = added[name].weight if name in added else 0.0
        added[name] = use._replace(weight=round(before + use.weight, 4))
    return list(added.values())


# --- nodes ----------------------------------------------------------------------------------


def _is_sampler(node: Node) -> bool:
    inputs = node.inputs
    draws = "steps" in inputs or "sigmas" in inputs or "sampler_name" in inputs
    return draws and any(is_link(inputs.get(name)) for name in _LATENTS)


def _draws(node: Node) -> bool:
    """Whether a node draws: a sampler, or one that has its latent from a bundle or makes it."""
    if _is_sampler(node):
        return True
    settings = "steps" in node.inputs and not {"cfg", "sampler_name"}.isdisjoint(node.inputs)
    return settings and not any(is_link(node.inputs[name]) for name in _shown(node))


def _shown(node: Node) -> list[str]:
    return [name for name in node.inputs if _SHOWN.search(name) and not _ASIDE.search(name)]


def _pictures(node: Node) -> list[Any]:
    """Links of a node to the pictures or latents that it changes."""
    links = {name: value for name, value in node.inputs.items() if is_link(value)}
    named = [x for name, x in links.items() if _PICTURES.search(name) and not _ASIDE.search(name)]
    piped = named or [links[name] for name in _PIPES if name in links]
    return piped or [
        value
        for name, value in links.items()
        if not _ASIDE.search(name) and not _SETTINGS.search(name)
    ]


def _makes_latent(node: Node) -> bool:
    """Whether a node makes an empty latent."""
    if node.kind in SIZES or "empty_latent_width" in node.inputs or "Empty" in node.kind:
        return True
    return {"width", "height", "batch_size"} <= node.inputs.keys() and not _pictures(node)


def _is_styled(node: Node) -> bool:
    """Whether a node may put its text into a style or a template, which lie in files."""
    styles = (value for name, value in node.inputs.items() if _STYLE.match(name))
    return any(str(value).casefold() not in _NO_STYLE for value in styles)


def _first_link(node: Node, names: tuple[str, ...]) -> object:
    return next((node.inputs[name] for name in names if is_link(node.inputs.get(name))), None)


def _model_link(node: Node) -> object:
    return _first_link(node, ("model", "MODEL", "base_model", "guider", "unet", *_PIPES))


def _only_link(node: Node) -> object:
    """The link of a node that has one, such as a reroute."""
    links = [value for value in node.inputs.values() if is_link(value)]
    return links[0] if len(links) == 1 else None
