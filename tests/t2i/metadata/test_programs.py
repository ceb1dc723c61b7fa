"""JSON of other programs, and forms of the site's keys that no program writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.t2i.metadata import Generation, Reference, parse_generation

MADE: dict[str, Any] = {
    "prompt_raw": "a cat",
    "prompt": "a cat",
    "negative_prompt_raw": "a dog",
    "negative_prompt": "a dog",
    "steps": 30,
    "cfg_scale": 4.0,
    "width": 1152,
    "height": 896,
    "seed": 5,
}

SWARMUI = {
    "sui_image_params": {
        "prompt": "a cat", "negativeprompt": "a dog", "model": "sub/base", "seed": 5, "steps": "30",
        "cfgscale": 4.0, "width": 1152, "height": 896, "sampler": "dpmpp_2m", "scheduler": "karras",
        "loras": ["sub/ink", "oil"], "loraweights": ["0.5", "1"], "clipstopatlayer": -2,
    },
    "sui_models": [
        {"name": "sub/base.safetensors", "param": "model", "hash": "0x" + "ab" * 32},
        {"name": "sub/ink.safetensors", "param": "loras", "hash": "0x" + "cd" * 32},
    ],
}  # fmt: skip
FOOOCUS = {
    "prompt": "a cat", "full_prompt": ["a cat", "cinematic"], "negative_prompt": "a dog",
    "base_model": "base", "base_model_hash": "0123456789", "resolution": "(1152, 896)",
    "guidance_scale": 4.0, "steps": 30, "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras",
    "seed": "5", "loras": [["ink", 0.5, "aabbccddeeff"]], "version": "Fooocus v2.5.0",
}  # fmt: skip
FOOOCUS_LOG = {
    "Prompt": "a cat", "Negative Prompt": "a dog", "Base Model": "base.safetensors",
    "Resolution": "(1152, 896)", "Guidance Scale": 4, "Steps": 30, "Sampler": "euler",
    "Scheduler": "normal", "Seed": 5, "LoRA 1": "ink.safetensors : 0.5",
    "LoRA 2": "False : off : 1",
}  # fmt: skip
RUINED = {
    "Prompt": "a cat", "Negative": "a dog", "steps": 30, "cfg": 4, "width": 1152, "height": 896,
    "seed": 5, "sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras",
    "base_model_name": "base.safetensors", "base_model_hash": "be9edd61",
    "loras": [["AABBCCDDEE", "0.5 - ink.safetensors"]], "clip_skip": 1, "software": "RuinedFooocus",
}  # fmt: skip
INVOKEAI = {
    "positive_prompt": "a cat", "negative_prompt": "a dog", "steps": 30, "cfg_scale": 4.0,
    "width": 1152, "height": 896, "seed": 5, "scheduler": "dpmpp_2m_k",
    "model": {"name": "base", "hash": "blake3:x"}, "generation_mode": "sdxl_txt2img",
    "loras": [{"model": {"name": "ink"}, "weight": 0.5}],
}  # fmt: skip
NOVELAI = {
    "prompt": "a cat", "uc": "a dog", "steps": 30, "scale": 4.0, "width": 1152, "height": 896,
    "seed": 5, "sampler": "k_euler_ancestral", "noise_schedule": "karras",
}  # fmt: skip
SITE_RUINED = {
    "prompt": "a cat", "negativePrompt": "a dog", "cfgScale": 4, "steps": 30, "seed": 5,
    "sampler": "DPM++ 2M SDE Karras", "width": 1152, "height": 896, "Model": "base",
    "Model hash": "be9edd61", "software": "RuinedFooocus",
    "other": {"sampler_name": "dpmpp_2m_sde_gpu", "loras": "Loras:<ink:0.5>,<oil:1>"},
}  # fmt: skip


def ref(**fields: Any) -> tuple[Reference, ...]:
    return (Reference(**fields),)


@pytest.mark.parametrize(
    ("meta", "made"),
    [
        (SWARMUI, Generation(
            form="swarmui", sampler_name="dpmpp_2m", schedule_name="karras",
            sampler="DPM++ 2M Karras", clip_skip=2,
            checkpoints=ref(hash="AB" * 6, name="sub/base"),
            loras=(*ref(hash="CD" * 6, name="sub/ink", weight=0.5), *ref(name="oil")), **MADE)),
        (FOOOCUS, Generation(
            form="fooocus", sampler_name="dpmpp_2m_sde_gpu", schedule_name="karras",
            sampler="DPM++ 2M SDE Karras", checkpoints=ref(hash="0123456789", name="base"),
            loras=ref(hash="AABBCCDDEEFF", name="ink", weight=0.5), **MADE)),
        (FOOOCUS_LOG, Generation(
            form="fooocus", sampler_name="euler", schedule_name="normal", sampler="Euler",
            checkpoints=ref(name="base.safetensors"),
            loras=ref(name="ink.safetensors", weight=0.5), **MADE)),
        (RUINED, Generation(
            form="ruinedfooocus", sampler_name="dpmpp_2m_sde_gpu", schedule_name="karras",
            sampler="DPM++ 2M SDE Karras",
            checkpoints=ref(hash="BE9EDD61", name="base.safetensors"),
            loras=ref(hash="AABBCCDDEE", name="ink.safetensors", weight=0.5), **MADE)),
        (SITE_RUINED, Generation(
            form="ruinedfooocus", sampler_name="DPM++ 2M SDE Karras",
            sampler="DPM++ 2M SDE Karras", checkpoints=ref(hash="BE9EDD61", name="base"),
            loras=(*ref(name="ink", weight=0.5), *ref(name="oil")), **MADE)),
        (INVOKEAI, Generation(
            form="invokeai", sampler_name="dpmpp_2m_k", sampler="DPM++ 2M Karras",
            checkpoints=ref(name="base"), loras=ref(name="ink", weight=0.5), **MADE)),
        (NOVELAI, Generation(
            form="novelai", sampler_name="k_euler_ancestral", schedule_name="karras",
            sampler="Euler a Karras", **MADE)),
    ],
    ids=["swarmui", "fooocus", "fooocus log", "ruinedfooocus", "ruinedfooocus of the site",
         "invokeai", "novelai"],
)  # fmt: skip
def test_programs(meta: dict[str, Any], made: Generation) -> None:
    assert parse_generation(meta) == made
    assert parse_generation(json.dumps(meta)) == made


@pytest.mark.parametrize(("skipped", "clip_skip"), [(0, 1), (1, 2), ("2", 3), (None, 1), ([], 1)])
def test_invokeai_counts_the_layers_that_it_leaves_out(skipped: Any, clip_skip: int) -> None:
    """Its ``skipped_layers`` of 1 is the WebUI's clip skip of 2."""
    assert parse_generation({**INVOKEAI, "clip_skip": skipped}).clip_skip == clip_skip


@pytest.mark.parametrize("spelling", ["['ink', 'oil']", '["ink", "oil"]', "ink, oil"])
def test_lists_of_easy_diffusion(spelling: str) -> None:
    """It writes a chunk as Python prints a value."""
    made = parse_generation({
        "prompt": "a", "use_stable_diffusion_model": "m", "use_lora_model": spelling,
        "lora_alpha": "[0.5, 0.7]",
    })  # fmt: skip
    assert made.loras == (*ref(name="ink", weight=0.5), *ref(name="oil", weight=0.7))


def test_draw_things_has_its_clip_skip_among_the_newer_settings() -> None:
    made = parse_generation({"c": "a", "uc": "", "steps": 8, "scale": 5, "v2": {"clipSkip": 2}})
    assert (made.form, made.clip_skip) == ("drawthings", 2)


def test_forms_of_the_sites_keys() -> None:
    typed = {"prompt": "a", "negativePrompt": "b", "cfgScale": 7, "steps": 20, "sampler": "Euler a",
             "seed": 1}  # fmt: skip
    assert parse_generation(typed, image_width=512, image_height=512).form == "typed"
    assert parse_generation({**typed, "Size": "512x512"}).form == "a1111"
    assert parse_generation({**typed, "originalSampler": "euler"}).form == "swarmui"
    assert parse_generation({**typed, "external": {"source": {"name": "x"}}}).form == "external"
    details = {"external": {"details": {"prompt": "a", "steps": 3}}}
    assert parse_generation(details).steps == 3
    assert parse_generation({"parameters": "a\nSteps: 3, Seed: 1, Size: 8x8"}).form == "a1111-text"
    assert [parse_generation(x).form for x in (None, {}, [], 3, "", " ")] == ["none"] * 6


def test_a_size_of_the_picture_is_marked() -> None:
    made = parse_generation({"prompt": "a"}, image_width=512, image_height=640)
    assert (made.width, made.height, made.size_from_image) == (512, 640, True)
    assert not parse_generation({"prompt": "a", "Size": "512x640"}).size_from_image


@pytest.mark.parametrize(
    ("passed", "size"), [("512x320", (512, 320)), ("0x0", (704, 448)), (None, (1280, 800))]
)
def test_the_first_hires_fix_wrote_the_final_size(
    passed: str | None, size: tuple[int, int]
) -> None:
    made = parse_generation({"prompt": "a", "Size": "1280x800", "First pass size": passed})
    assert (made.width, made.height) == size


@pytest.mark.parametrize(
    ("keys", "from_image"),
    [
        ({"Denoising strength": "0.7"}, True),
        ({"Denoising strength": "0.7", "Hires upscale": "2"}, False),
        ({"Denoising strength": "0.7", "Mask blur": "4"}, True),
        ({"workflow": "img2img-hires"}, True),
        ({"workflow": "txt2img"}, False),
        ({}, False),
    ],
)
def test_pictures_from_pictures(keys: dict[str, str], from_image: bool) -> None:
    assert parse_generation({"prompt": "a", **keys}).from_image is from_image


def test_a_model_that_the_site_read_as_an_object() -> None:
    made = parse_generation(
        {"prompt": "a", "Model": {"meina_7": "3mix"}, "Model hash": "0123456789"}
    )
    assert made.checkpoints == ref(hash="0123456789", name="meina_7: 3mix")


def test_a_checkpoint_that_is_only_named() -> None:
    assert parse_generation({"prompt": "a", "Model": "x"}).checkpoints == ref(name="x")
    spilled = {"prompt": "a", '"preprocessor': "canny", "model": "control_canny"}
    assert parse_generation(spilled).checkpoints == ()


def test_hashes_as_a_list_are_the_last_resort() -> None:
    meta = {"prompt": "a", "Model hash": "0123456789", "hashes": ["ab" * 32, None, 3]}
    assert parse_generation(meta).checkpoints == (*ref(hash="0123456789"), *ref(hash="AB" * 32))


def test_lora_hashes_that_the_sites_parser_spilled() -> None:
    meta = {"prompt": "<lora:ink:0.5> <lora:oil:1>", '"ink': "aabbccddeeff", "oil": '001122334455"'}
    assert parse_generation(meta).loras == (
        *ref(hash="AABBCCDDEEFF", name="ink", weight=0.5),
        *ref(hash="001122334455", name="oil"),
    )


def test_addnets_names_that_the_site_shortened_count_once() -> None:
    meta = {
        "prompt": "a",
        "AddNet Module 1": "LoRA",
        "AddNet Model 1": "fern_(long)_v1(447cbd9ec2e7)",
        "AddNet Weight A 1": "0.8",
        "resources": [{"type": "lora", "name": "_v1", "weight": 0.8, "hash": "447cbd9ec2e7"},
                      {"type": "lora", "weight": 1}],
    }  # fmt: skip
    assert parse_generation(meta).loras == ref(
        hash="447CBD9EC2E7", name="fern_(long)_v1", weight=0.8
    )


def test_addnet_may_begin_at_a_later_slot() -> None:
    meta = {"prompt": "a", "AddNet Enabled": "True", "AddNet Model 2": "ink(aabbccddeeff)"}
    assert parse_generation(meta).loras == ref(hash="AABBCCDDEEFF", name="ink")


def test_embeddings() -> None:
    made = parse_generation(
        {
            "prompt": "a cyborg, embedding:style_x.pt, <embed:folder/face>, (embedding:b:0.5)",
            "negativePrompt": "((EasyNegative)), (bad_hands:1.2), bad, (easynegative_not:1.1)",
            "hashes": {"embed:easynegative": "c74b4e810b", "embed:cyborg": "0123456789"},
            "TI hashes": {"bad_hands": "aabbccddeeff"},
        }
    )
    assert made.prompt == "a cyborg"  # a word that also says what is drawn
    assert made.embeddings == (
        *ref(name="folder/face"),
        *ref(name="style_x.pt"),
        *ref(name="b", weight=0.5),
        *ref(hash="0123456789", name="cyborg"),
    )
    assert made.negative_prompt == "bad, (easynegative_not:1.1)"
    assert made.negative_embeddings == (
        *ref(hash="C74B4E810B", name="easynegative"),
        *ref(hash="AABBCCDDEEFF", name="bad_hands", weight=1.2),
    )
    air = "embedding:urn:air:sd1:embedding:civitai:7808@9208, x"
    assert parse_generation({"negativePrompt": air}).negative_embeddings[0].version_id == 9208


def test_hypernetworks_and_other_tags() -> None:
    made = parse_generation(
        {"prompt": "a <hypernet:h:0.3> <lora:l:te=1:unet=0.4> <lora:b:0.5:0.9> <odd:x:1>",
         "negativePrompt": "b <lora:none:1>", "Hypernet": "old(1234)", "Hypernet strength": "0.7",
         "Hypernet hash": "0123456789"}
    )  # fmt: skip
    assert (made.prompt, made.negative_prompt) == ("a", "b")
    assert made.hypernetworks == (
        *ref(name="h", weight=0.3),
        *ref(hash="0123456789", name="old(1234)", weight=0.7),
    )
    # A negative prompt loads nothing in the WebUI.
    assert made.loras == (*ref(name="l", weight=0.4), *ref(name="b", weight=0.5))


KEYS = [
    *SWARMUI, *FOOOCUS, *FOOOCUS_LOG, *RUINED, *INVOKEAI, *NOVELAI, *SITE_RUINED, "hashes", "image",
    "TI hashes", "Lora hashes", "Lora weights", "resources", "civitaiResources", "versionIds",
    "additionalResources", "external", "parameters", "model_weights", "First pass size", "Hypernet",
    "originalSampler", "Size", "models", "id", "meta", "comfy", "workflow", "nodes", '"ink',
]  # fmt: skip
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["<lora:ink:1>", "1x2", "RuinedFooocus", "a : 1", "1 - a", "\ud800", "\0"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from([*KEYS, "type", "name", "hash", "weight", "model"]), inner),
    max_leaves=20,
)  # fmt: skip


def test_text_can_be_stored() -> None:
    made = parse_generation({"prompt": "a\ud800\0b", "Model": "\ud800"})
    assert (made.prompt_raw, made.checkpoints) == ("a?b", ref(name="?"))


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(KEYS), ANY, max_size=12), ANY)
def test_parsing_never_raises_on_any_json(meta: dict[str, object], size: object) -> None:
    made = parse_generation(meta, image_width=size, image_height=size)
    for text in (made.prompt, made.negative_prompt, made.prompt_raw or ""):
        text.encode()  # can be stored
        assert "\0" not in text
    assert made.sampler is None or made.sampler_raw
    assert all(ref.version_id or ref.hash or ref.name for ref in (*made.loras, *made.checkpoints))


@settings(deadline=None, max_examples=100)
@given(ANY)
def test_parsing_never_raises_on_any_value(meta: object) -> None:
    parse_generation(meta)
