"""Generation metadata: every dialect is read, and nothing makes the parser raise."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.t2i.metadata import Reference, clean_prompt, parse_generation

A1111 = {
    "prompt": "a red square, <lora:flat_style:0.7>, on sand",
    "negativePrompt": "blurry",
    "sampler": "DPM++ 2M Karras",
    "steps": 28,
    "cfgScale": 6.5,
    "seed": 12345,
    "Size": "512x768",
    "Model": "shapes",
    "Model hash": "0123456789",
    "Clip skip": "2",
    "hashes": {"model": "0123456789", "lora:flat_style": "aabbccddeeff"},
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KEYS = [
    *A1111, "meta", "id", "comfy", "civitaiResources", "resources", "models", "width", "height",
    "scheduler", "Schedule type", "clipSkip", "Lora hashes", "AddNet Model 1", "AddNet Weight A 1",
]  # fmt: skip


def test_a1111_keys() -> None:
    made = parse_generation(A1111)
    assert made.form == "a1111"
    assert made.prompt == "a red square, on sand"
    assert made.prompt_raw == A1111["prompt"]
    assert (made.sampler, made.steps, made.cfg_scale) == ("DPM++ 2M Karras", 28, 6.5)
    assert (made.width, made.height, made.clip_skip, made.seed) == (512, 768, 2, 12345)
    assert made.checkpoints == (Reference(hash="0123456789", name="shapes"),)
    assert made.loras == (Reference(hash="AABBCCDDEEFF", name="flat_style", weight=0.7),)


def test_numbers_may_be_text_and_the_schedule_apart() -> None:
    made = parse_generation(
        {
            **A1111,
            "steps": "28",
            "sampler": "DPM++ 2M",
            "Schedule type": "Karras",
            "Clip skip": "2,",
        }
    )
    assert (made.steps, made.sampler, made.clip_skip) == (28, "DPM++ 2M Karras", 2)
    assert made.sampler_raw == "DPM++ 2M (Karras)"


def test_unknown_sampler_keeps_its_spelling() -> None:
    made = parse_generation({**A1111, "sampler": "Shapes 9000"})
    assert (made.sampler_raw, made.sampler) == ("Shapes 9000", None)


@pytest.mark.parametrize(
    ("changes", "image", "size"),
    [
        ({"Size": "500x700"}, (1, 1), (496, 696)),  # whole latent pixels
        ({"Size": None, "width": 640, "height": "448"}, (1, 1), (640, 448)),
        ({"Size": None}, (512, 640), (512, 640)),
        ({"Size": None}, (513, 640), (None, None)),  # not what a sampler makes
        ({"Size": None, "Hires upscale": "2"}, (1024, 1024), (None, None)),
    ],
)
def test_size(
    changes: dict[str, object], image: tuple[int, int], size: tuple[int | None, int | None]
) -> None:
    made = parse_generation({**A1111, **changes}, image_width=image[0], image_height=image[1])
    assert (made.width, made.height) == size


def test_on_site_generator_names_versions_and_its_list_is_complete() -> None:
    made = parse_generation(
        {
            "prompt": "a circle <lora:somewhere_else:1>",
            "sampler": "Euler a",
            "civitaiResources": [
                {"type": "lora", "modelVersionId": 7, "weight": 0.5},
                {"type": "checkpoint", "modelVersionId": 5},
            ],
        }
    )
    assert made.form == "civitai"
    assert made.checkpoints == (Reference(version_id=5),)
    assert made.loras == (Reference(version_id=7, weight=0.5),)


def test_air_names_a_version() -> None:
    made = parse_generation({"prompt": "x", "Model": "urn:air:sdxl:checkpoint:civitai:8@17"})
    assert made.checkpoints == (Reference(version_id=17),)


def test_nested_metadata_is_unwrapped() -> None:
    assert parse_generation({"id": 1, "meta": {"id": 1, "meta": A1111}}) == parse_generation(A1111)
    assert parse_generation({"id": 1, "meta": None}).prompt_raw is None


def test_comfyui_graph_with_javascript_leftovers() -> None:
    graph = {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "steps": 12, "cfg": 5.5, "sampler_name": "dpmpp_2m", "scheduler": "karras",
                "seed": 9, "positive": ["6", 0], "negative": ["7", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple",
              "inputs": {"ckpt_name": "urn:air:sd1:checkpoint:civitai:1@2"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a blue star"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "noise"}},
        "8": {"class_type": "LoraLoader", "inputs": {"lora_name": "ink.safetensors",
                                                     "strength_model": 0.6}},
    }  # fmt: skip
    text = json.dumps({"prompt": graph})[:-1] + ', "workflow": {"zoom": NaN, "x": undefined}}'
    made = parse_generation({"comfy": text})
    assert made.form == "comfyui"
    assert (made.prompt, made.negative_prompt) == ("a blue star", "noise")
    assert (made.sampler, made.steps, made.cfg_scale, made.seed) == ("DPM++ 2M Karras", 12, 5.5, 9)
    assert (made.width, made.height) == (512, 640)
    assert made.checkpoints == (Reference(version_id=2),)
    assert made.loras == (Reference(name="ink.safetensors", weight=0.6),)


def test_addnet() -> None:
    made = parse_generation(
        {
            "prompt": "x",
            "AddNet Module 1": "LoRA",
            "AddNet Model 1": "ink(aabbccddeeff)",
            "AddNet Weight A 1": "0.4",
            "resources": [{"type": "lora", "name": "ink", "hash": "aabbccddeeff", "weight": None}],
        }
    )
    assert made.loras == (Reference(hash="AABBCCDDEEFF", name="ink", weight=0.4),)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a, <lora:x y:0.5>,\n b", "a, b"),
        ("<lora:x:1:0.5:lbw=ALL> cat <hypernet:h:1>", "cat"),
        ("(a:1.2), [b], <c>", "(a:1.2), [b], <c>"),
        (" ,, a ,b ,", "a,b"),
    ],
)
def test_clean_prompt(text: str, clean: str) -> None:
    assert clean_prompt(text) == clean


@settings(deadline=None)
@given(st.text())
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean_prompt(text)
    if "<" not in text:  # taking a tag out may put another one together
        assert clean_prompt(once) == once


@settings(deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(KEYS), JSON), JSON)
def test_parsing_never_raises_on_any_json(meta: object, size: object) -> None:
    made = parse_generation(meta, image_width=size, image_height=size)
    made.prompt.encode()  # can be stored
    assert made.sampler is None or made.sampler_raw


@settings(deadline=None)
@given(JSON)
def test_parsing_never_raises_on_any_comfy_text(graph: object) -> None:
    parse_generation({"comfy": json.dumps({"prompt": graph})})
