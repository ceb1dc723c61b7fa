"""Whatever a record or a picture says, reading it gives values of the right types, and no error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffagent.t2i.metadata import Generation, parse_generation, read_image_metadata
from diffagent.t2i.metadata.a1111 import write_parameters
from diffagent.t2i.metadata.compute import COMPUTED, SIZES
from diffagent.t2i.names import exact_key, file_stem, titles, words

LITERALS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["1e999", "0,6", "-1", "9" * 400, "a*2", "(a|a)*b", "\ud800", "\0", "896x1152", "custom",
         "a.width", "urn:air:sd1:lora:civitai:1@2", "blake3:" + "ab" * 32, "<lora:a:b:0,5>", "On"]
    )
)  # fmt: skip
IDS = ["1", "2", "3", "4", "5", "6"]
LINKS = st.tuples(st.sampled_from([*IDS, 1, "99"]), st.integers(-2, 6)).map(list)
KINDS = [
    *COMPUTED, *SIZES, "KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced", "CLIPTextEncode",
    "CLIPSetLastLayer", "LoraLoader", "CheckpointLoaderSimple", "VAEDecode", "VAEEncode",
    "SaveImage", "PreviewImage", "EmptyLatentImage", "LatentUpscale", "LatentUpscaleBy", "Reroute",
    "ImpactSwitch", "CR Text Input Switch", "Text Input Switch", "easy ifElse", "LoadImage",
    "Any Switch (rgthree)", "ConditioningAverage", "ControlNetApplyAdvanced", "Efficient Loader",
    "LoRA Stacker", "BasicScheduler", "CFGGuider", "RandomNoise", "PrimitiveInt", "Bypassed",
]  # fmt: skip
NAMES = [
    *("a", "b", "c", "value", "expression", "op", "operation", "number_a", "number_b", "text"),
    *("string", "string_a", "string_b", "find", "replace", "regex_pattern", "count", "delimiter"),
    *("text1", "text2", "Input", "select", "input1", "input2", "boolean", "on_true", "on_false"),
    *("multiline_text", "start_index", "max_rows", "width", "height", "batch_size", "scale_by"),
    *("aspect_ratio", "swap_dimensions", "prescale_factor", "dimensions", "resolution", "samples"),
    *("model", "positive", "negative", "latent_image", "steps", "cfg", "seed", "denoise", "images"),
    *("pixels", "sampler_name", "scheduler", "clip", "stop_at_clip_layer", "lora_name", "pipe"),
    *("strength_model", "lora_1", "lora_count", "switch_1", "ckpt_name", "conditioning", "guider"),
    *("sigmas", "sampler", "noise", "any_01", "any_02", "conditioning_to", "conditioning_from"),
    *("conditioning_to_strength", "start_at_step", "add_noise", "strings", "multiline", "loras"),
    *("mode", "resources_json", "image_output", "empty_latent_width", "output_0", "output_1"),
]
VALUES = LITERALS | LINKS | st.dictionaries(st.sampled_from(["lora", "strength", "on"]), LITERALS)
NODES = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(KINDS),
        "inputs": st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=10),
    }
)
SITE = st.dictionaries(
    st.sampled_from(
        ["prompt", "negativePrompt", "steps", "cfgScale", "sampler", "seed", "clipSkip", "Model",
         "Model hash", "hashes", "models", "versionIds", "Lora hashes", "TI hashes", "resources",
         "civitaiResources", "Size", "workflow", "c", "uc", "Comment", "PositivePrompt", "width"]
    ),
    LITERALS
    | st.lists(LITERALS, max_size=3)
    | st.dictionaries(st.sampled_from(["model", "lora:a", "embed:b", "type"]), LITERALS),
    max_size=8,
)  # fmt: skip


def check(made: Generation) -> None:
    """Every field is of its type, and can be stored."""
    assert isinstance(made, Generation)
    for name in ("prompt", "negative_prompt", "prompt_raw", "negative_prompt_raw", "sampler_raw"):
        (getattr(made, name) or "").encode()
    for name in ("steps", "width", "height", "seed"):
        assert getattr(made, name) is None or type(getattr(made, name)) is int
    assert type(made.clip_skip) is int
    assert made.cfg_scale is None or math.isfinite(made.cfg_scale)
    for use in (*made.loras, *made.checkpoints, *made.embeddings, *made.negative_embeddings):
        assert math.isfinite(use.weight)
        assert use.version_id is None or type(use.version_id) is int
        (use.name or "").encode()
    write_parameters(made)


@settings(deadline=None, max_examples=120)
@given(st.dictionaries(st.sampled_from(IDS), NODES, min_size=1), SITE)
def test_any_graph_of_nodes_that_compute(nodes: dict[str, Any], site: dict[str, Any]) -> None:
    check(parse_generation({**site, "comfy": {"prompt": nodes}}))
    check(parse_generation({**site, "comfy": json.dumps({"prompt": nodes, "workflow": site})}))
    editor = [
        {"id": int(key), "type": node["class_type"], "widgets_values": [*node["inputs"].values()],
         "mode": len(node["inputs"]) % 5, "inputs": [
             {"name": name, "type": "X", "link": slot} for slot, name in enumerate(node["inputs"])],
         "outputs": [{"type": "X"}]}
        for key, node in nodes.items()
    ]  # fmt: skip
    links = [[slot, int(key), slot, int(key) % 6 + 1, slot, "X"]
             for key in nodes for slot in range(3)]  # fmt: skip
    check(parse_generation({**site, "comfy": {"workflow": {"nodes": editor, "links": links}}}))
    check(parse_generation(site))
    check(parse_generation({"meta": site, "id": 1}))


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_name(name: str) -> None:
    file_stem(name), exact_key(name), words(name), titles(name)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["JPEG", "WEBP"]),
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
    | st.sampled_from(
        [b"<exif:UserComment>", b"<exif:UserComment><rdf:li>{&#x110000;&bogus;", b"<dc:description"]
    ),
    st.binary(max_size=60),
)
def test_any_xmp_and_comment(tmp_path: Path, kind: str, xmp: bytes, comment: bytes) -> None:
    path = tmp_path / "x"
    exif = Image.Exif()
    exif[0x9C9C] = comment
    exif[0x010E] = comment.decode("latin-1").replace("\0", "")
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (8, 8)).save(path, kind, xmp=xmp, exif=exif, comment=comment)
    check(read_image_metadata(path))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40), st.integers(0, 2**32 - 1))
def test_any_alpha_channel(tmp_path: Path, body: bytes, length: int) -> None:
    for kind in (b"stealth_pngcomp", b"stealth_pnginfo"):
        data = kind + length.to_bytes(4, "big") + body
        bits = [255 if byte >> bit & 1 else 254 for byte in data for bit in range(7, -1, -1)]
        image = Image.new("RGBA", (1, len(bits)))
        image.putdata([(0, 0, 0, bit) for bit in bits])
        image.save(tmp_path / "x.png")
        check(read_image_metadata(tmp_path / "x.png"))
