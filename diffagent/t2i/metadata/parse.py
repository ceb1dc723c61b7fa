"""From a record's ``meta`` to a `Generation`: which reader a record is for."""

from __future__ import annotations

from diffagent.schemas.payloads import unwrap_meta
from diffagent.t2i.metadata.a1111 import parameters_reading, recover
from diffagent.t2i.metadata.comfy import read_comfy
from diffagent.t2i.metadata.generation import Generation, Reading
from diffagent.t2i.metadata.keys import form_of_keys, read_keys
from diffagent.t2i.metadata.programs import read_program
from diffagent.t2i.metadata.values import Bag, load_json
from diffagent.t2i.names import file_stem
from diffagent.t2i.samplers import normalise

#: Keys that the site reads from a graph, by the first sampler that it finds.
_READ_BY_THE_SITE = (
    *("prompt", "negativePrompt", "steps", "cfgScale", "sampler", "scheduler", "seed", "clipSkip"),
    *("width", "height"),
)
#: Keys without which no program of `programs` has written the record.
_PROGRAM_KEYS = frozenset(
    {"sui_image_params", "software", "base_model", "Base Model", "positive_prompt", "uc", "c"}
    | {"model_weights", "Comment", "PositivePrompt", "use_stable_diffusion_model"}
    | {"Stable Diffusion model"}
)


def parse_generation(
    meta: object, *, image_width: object = None, image_height: object = None
) -> Generation:
    """Read generation metadata of any dialect. Never raises, whatever the JSON.

    Args:
        meta: the record's ``meta``; also the text or the JSON text that a picture carries.
        image_width: pixels of the picture itself, which stand in for a missing size when
            nothing says that it was scaled up.
        image_height: as ``image_width``.
    """
    reading = read_metadata(meta)
    return read_keys(reading, image_width, image_height) if reading else Generation()


def read_metadata(meta: object) -> Reading | None:
    """Metadata of any dialect in the site's keys, which are yet to be read; None without any."""
    if isinstance(meta, str):
        return read_text(meta)
    bag = unwrap_meta(meta)
    return read_bag(bag) if bag else None


def read_text(value: str) -> Reading | None:
    """What a picture carries: JSON of a program or a graph, or the WebUI's text."""
    if value.lstrip()[:1] == "{":
        bag = load_json(value)
        if isinstance(bag, dict) and bag:
            return read_bag(bag)
    return parameters_reading(value) if value.strip() else None


def read_bag(bag: Bag) -> Reading:
    """The reader that a bag of keys is for."""
    if bag.get("comfy"):
        return _with_graph(bag)
    if not _PROGRAM_KEYS.isdisjoint(bag):
        reading = read_program(bag)
        if reading is not None:
            return reading
    prompt = bag.get("prompt")
    if not isinstance(prompt, str) or prompt.lstrip()[:1] == "{":
        reading = _unparsed(bag)
        if reading is not None:
            return reading
    return recover(bag) or Reading(
        "swarmui" if "originalSampler" in bag else form_of_keys(bag), bag
    )


def _unparsed(bag: Bag) -> Reading | None:
    """A picture's chunks as they are: ``parameters``, or graphs."""
    parameters = bag.get("parameters")
    if isinstance(parameters, str):
        return read_text(parameters)
    details = bag.get("external")
    if isinstance(details, dict) and isinstance(details.get("details"), dict):
        return Reading("external", {**details["details"], **bag})
    if (
        isinstance(bag.get("nodes"), list)
        or "prompt" in bag
        or "workflow" in bag
        or any(isinstance(node, dict) and "class_type" in node for node in bag.values())
    ):
        return read_comfy(bag)
    return None


def _with_graph(bag: Bag) -> Reading:
    """What the site read from a graph, completed by the graph.

    Where the site met a link instead of a value, it left an object or 0.
    """
    form = form_of_keys(bag)
    graph = read_comfy(bag["comfy"])
    if graph is None:
        return Reading("civitai" if form == "civitai" else "comfyui", bag)
    keys: dict[str, object] = dict(bag)
    for key in {**graph.keys, **dict.fromkeys(_READ_BY_THE_SITE)}:
        if not keys.get(key) or isinstance(keys[key], dict | list) or _misread(key, keys, graph):
            keys[key] = graph.keys.get(key)
    if graph.loras:
        keys.pop("additionalResources", None)
    if any(reference.version_id for reference in graph.checkpoints):
        keys = {key: value for key, value in keys.items() if key not in ("models", "versionIds")}
    if not bag.get("Model hash") and (not graph.checkpoints or _other_model(keys, graph)):
        keys.pop("Model", None)  # the first of several loaders
    return Reading(
        "civitai" if form == "civitai" else graph.form,
        keys,
        graph.checkpoints,
        graph.loras,
        graph.from_image,
        not_known=tuple(
            key for key in graph.not_known if key in ("size", "loras") or not keys.get(key)
        ),
    )


def _misread(key: str, keys: Bag, graph: Reading) -> bool:
    """Whether the site took a value from a wrong place of the graph.

    It takes what the first sampler and its text nodes hold. What no node holds was edited by hand.
    """
    value = keys[key]
    if graph.literals is None or not isinstance(value, str | int | float):
        return False
    if key == "sampler" and isinstance(value, str):
        ours = graph.keys.get("sampler")
        name = normalise(value)  # the site translates ComfyUI's names
        return name in graph.literals and not (isinstance(ours, str) and normalise(ours) == name)
    return (value.strip() if isinstance(value, str) else value) in graph.literals


def _other_model(keys: Bag, graph: Reading) -> bool:
    """Whether the site names the model of another loader than that of the picture."""
    name, ours = keys.get("Model"), graph.checkpoints[0].name
    if graph.literals is None or not isinstance(name, str) or not ours:
        return False
    return file_stem(name) != file_stem(ours) and file_stem(name) in graph.literals
