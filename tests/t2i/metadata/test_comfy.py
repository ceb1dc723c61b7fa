"""ComfyUI's graphs: the sampler's own inputs are found, however they are linked."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.t2i.metadata import Generation, Reference, parse_generation
from diffagent.t2i.metadata.comfy import read_comfy

Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(**changes: dict[str, Any]) -> Graph:
    """A plain picture from text."""
    return {
        "3": node(
            "KSampler", seed=9, steps=12, cfg=5.5, sampler_name="dpmpp_2m", scheduler="karras",
            denoise=1, model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0],
        ),
        "4": node("CheckpointLoaderSimple", ckpt_name="sd/shapes_v1.safetensors"),
        "5": node("EmptyLatentImage", width=512, height=640, batch_size=1),
        "6": node("CLIPTextEncode", text="a blue star", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="noise", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        **changes,
    }  # fmt: skip


def read(nodes: Graph, **meta: Any) -> Generation:
    return parse_generation({"comfy": json.dumps({"prompt": nodes, "workflow": {}}), **meta})


PLAIN = Generation(
    form="comfyui",
    prompt_raw="a blue star",
    prompt="a blue star",
    negative_prompt_raw="noise",
    negative_prompt="noise",
    sampler_name="dpmpp_2m",
    schedule_name="karras",
    sampler="DPM++ 2M Karras",
    steps=12,
    cfg_scale=5.5,
    width=512,
    height=640,
    seed=9,
    checkpoints=(Reference(name="sd/shapes_v1"),),
)


def test_a_plain_graph() -> None:
    assert read(graph()) == PLAIN
    assert parse_generation({"comfy": {"prompt": graph()}}) == PLAIN
    assert parse_generation({"comfy": {"prompt": json.dumps(graph())}}) == PLAIN
    assert parse_generation(json.dumps(graph())) == PLAIN
    assert parse_generation({"prompt": graph(), "workflow": {}}) == PLAIN


def test_javascript_leftovers() -> None:
    text = '{"prompt": %s, "workflow": {"a": NaN, "b": undefined, "c": [Infinity]}}'
    nodes = graph(**{"6": node("CLIPTextEncode", text='"undefined" NaN')})
    assert parse_generation({"comfy": text % json.dumps(nodes)}).prompt == '"undefined" NaN'


def test_the_site_left_objects_and_zeros_where_it_met_links() -> None:
    made = read(graph(), steps={"inputs": {}}, cfgScale=0, seed=0, prompt="", sampler="DPM++ 2M")
    assert (made.steps, made.cfg_scale, made.seed, made.prompt) == (12, 5.5, 9, "a blue star")
    assert made.sampler == "DPM++ 2M Karras"
    assert read(graph(), prompt="the site's").prompt == "the site's"


def test_a_custom_sampler_has_its_settings_in_other_nodes() -> None:
    made = read(
        graph(
            **{
                "3": node("SamplerCustomAdvanced", noise=["20", 0], guider=["21", 0],
                          sampler=["22", 0], sigmas=["23", 0], latent_image=["5", 0]),
                "20": node("RandomNoise", noise_seed=["30", 0]),
                "30": node("PrimitiveNode", value=77),
                "21": node("CFGGuider", cfg=4.5, model=["4", 0], positive=["6", 0],
                           negative=["7", 0]),
                "22": node("KSamplerSelect", sampler_name="euler_ancestral"),
                "23": node("SplitSigmas", sigmas=["24", 0], step=3),
                "24": node("BasicScheduler", scheduler="beta", steps=28, denoise=1, model=["4", 0]),
            }
        )
    )  # fmt: skip
    assert (made.seed, made.cfg_scale, made.sampler, made.steps) == (
        77,
        4.5,
        "Euler a Beta (ComfyUI)",
        28,
    )
    assert (made.prompt, made.negative_prompt) == ("a blue star", "noise")
    assert made.checkpoints == PLAIN.checkpoints


def test_schedulers_and_samplers_that_are_nodes_of_their_own() -> None:
    made = read(
        graph(
            **{
                "3": node("SamplerCustom", noise_seed=1, cfg=3, sampler=["22", 0], sigmas=["24", 0],
                          model=["4", 0], positive=["6", 0], negative=["7", 0],
                          latent_image=["5", 0]),
                "22": node("SamplerDPMPP_2M_SDE", eta=1.0, solver_type="midpoint"),
                "24": node("KarrasScheduler", steps=15, sigma_max=14.6, sigma_min=0.03, rho=7),
            }
        )
    )  # fmt: skip
    assert (made.sampler, made.steps, made.cfg_scale) == ("DPM++ 2M SDE Karras", 15, 3.0)


def test_a_guider_without_negative_has_no_guidance() -> None:
    made = read(
        graph(
            **{
                "3": node("SamplerCustomAdvanced", noise=["20", 0], guider=["21", 0],
                          sampler=["22", 0], sigmas=["24", 0], latent_image=["5", 0]),
                "20": node("RandomNoise", noise_seed=1),
                "21": node("BasicGuider", model=["4", 0], conditioning=["25", 0]),
                "25": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
                "22": node("KSamplerSelect", sampler_name="euler"),
                "24": node("BasicScheduler", scheduler="simple", steps=20, denoise=1,
                           model=["4", 0]),
                "4": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="fp8"),
                "6": node("CLIPTextEncodeFlux", clip_l="a star", t5xxl="a star, blue"),
            }
        )
    )  # fmt: skip
    assert (made.cfg_scale, made.prompt) == (1.0, "a star, blue, a star")
    assert made.checkpoints == (Reference(name="flux1-dev"),)


LORAS = {
    "one": node("LoraLoader", lora_name="ink.safetensors", strength_model=0.6, strength_clip=1),
    "model only": node("LoraLoaderModelOnly", lora_name="ink.safetensors", strength_model=0.6),
    "rgthree": node("Power Lora Loader (rgthree)",
                    PowerLoraLoaderHeaderWidget={"type": "PowerLoraLoaderHeaderWidget"},
                    lora_1={"on": True, "lora": "ink.safetensors", "strength": 0.6},
                    lora_2={"on": False, "lora": "off.safetensors", "strength": 1}),
    "rgthree stack": node("Lora Loader Stack (rgthree)", lora_01="ink.safetensors",
                          strength_01=0.6, lora_02="None", strength_02=1),
    "preview": node("LoraLoader|pysssss", lora_name={"content": "ink.safetensors", "image": None},
                    strength_model=0.6),
    "manager": node("Lora Loader (LoraManager)", text="<lora:ink:0.6>", loras={"__value__": [
        {"name": "ink.safetensors", "strength": "0.6", "active": True},
        {"name": "off", "strength": 1, "active": False}]}),
    "efficiency": node("LoRA Stacker", input_mode="simple", lora_count=1,
                       lora_name_1="ink.safetensors", lora_wt_1=0.6, model_str_1=1,
                       lora_name_2="off.safetensors", lora_wt_2=1, model_str_2=1),
    "comfyroll": node("CR LoRA Stack", switch_1="On", lora_name_1="ink.safetensors",
                      model_weight_1=0.6, clip_weight_1=1, switch_2="Off",
                      lora_name_2="off.safetensors", model_weight_2=1),
    "tags": node("LoraTagLoader", text="a cat <lora:ink.safetensors:0.6>"),
    "tags of the manager": node("LoRA Text Loader (LoraManager)",
                                lora_syntax="<lora:ink.safetensors:0.6>"),
    "easy": node("easy loraStack", toggle=True, num_loras=1, lora_1_name="ink.safetensors",
                 lora_1_strength=0.6, lora_2_name="off.safetensors", lora_2_strength=1),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LORAS))
def test_loras_of_every_loader(name: str) -> None:
    loader = LORAS[name]
    loader = {**loader, "inputs": {**loader["inputs"], "model": ["4", 0], "clip": ["4", 1]}}
    made = read(
        graph(
            **{"20": loader, "3": {**graph()["3"], "inputs": {**graph()["3"]["inputs"]}}},
        )
        | {"3": node(**_kind(graph()["3"]), **{**graph()["3"]["inputs"], "model": ["20", 0]})}
    )
    assert made.loras == (Reference(name="ink.safetensors", weight=0.6),)
    assert made.checkpoints == PLAIN.checkpoints


def test_a_lora_that_is_loaded_twice_is_as_strong_as_both() -> None:
    first = node("LoraLoaderModelOnly", lora_name="ink", strength_model=0.3, model=["4", 0])
    second = node("LoraLoaderModelOnly", lora_name="ink", strength_model=0.5, model=["20", 0])
    ksampler = node("KSampler", **{**graph()["3"]["inputs"], "model": ["21", 0]})
    made = read(graph(**{"3": ksampler, "20": first, "21": second}))
    assert made.loras == (Reference(name="ink", weight=0.8),)


def test_tags_that_are_computed_are_not_known() -> None:
    loader = node("LoraTagLoader", text=["21", 0], model=["4", 0], clip=["4", 1])
    ksampler = node("KSampler", **{**graph()["3"]["inputs"], "model": ["20", 0]})
    made = read(graph(**{"3": ksampler, "20": loader, "21": node("LLM", text="write")}))
    assert (made.loras, "loras" in made.not_known) == ((), True)


def _kind(made: dict[str, Any]) -> dict[str, str]:
    return {"kind": made["class_type"]}


def test_only_the_loras_of_the_samplers_model_in_their_order() -> None:
    ksampler = graph()["3"]["inputs"]
    made = read(
        graph(
            **{
                "3": node("KSampler", **{**ksampler, "model": ["22", 0]}),
                "20": node("LoraLoader", lora_name="a", strength_model=1, model=["4", 0]),
                "21": node("Reroute", **{"": ["20", 0]}),
                "22": node("LoraLoader", lora_name="b", strength_model=["40", 0], model=["23", 0]),
                "23": node("ModelSamplingDiscrete", sampling="v_prediction", model=["21", 0]),
                "40": node("FloatConstant", value=0.25),
                "30": node("LoraLoader", lora_name="face", strength_model=1, model=["4", 0]),
                "31": node("FaceDetailer", image=["8", 0], model=["30", 0], steps=20, cfg=8,
                           sampler_name="euler", scheduler="normal", positive=["6", 0]),
            }
        )
    )  # fmt: skip
    assert made.loras == (Reference(name="a"), Reference(name="b", weight=0.25))


def test_two_merged_checkpoints_are_neither() -> None:
    ksampler = graph()["3"]["inputs"]
    made = read(
        Model="shapes_v1",  # the site's guess
        nodes=graph(
            **{
                "3": node("KSampler", **{**ksampler, "model": ["20", 0]}),
                "20": node("ModelMergeSimple", model1=["4", 0], model2=["21", 0], ratio=0.5),
                "21": node("CheckpointLoaderSimple", ckpt_name="other.safetensors"),
            }
        ),
    )
    assert made.checkpoints == ()
    assert read(graph(), Model="shapes_v1").checkpoints == (Reference(name="shapes_v1"),)


TEXTS = {
    "link": ({"6": node("CLIPTextEncode", text=["20", 0]), "20": node("ShowText|pysssss",
             text=["21", 0], text_0="shown"), "21": node("String Literal", string="a cat")},
             "a cat"),
    "wildcards": ({"6": node("CLIPTextEncode", text=["20", 0]), "20": node(
        "ImpactWildcardProcessor", wildcard_text="{a|b} cat", populated_text="a cat")}, "a cat"),
    "concatenated": ({"6": node("CLIPTextEncode", text=["20", 0]), "20": node(
        "Text Concatenate", delimiter=" ", text_a="a", text_b=["21", 0], text_c=""),
        "21": node("PrimitiveStringMultiline", value="cat")}, "a cat"),
    "combined": ({"6": node("ConditioningCombine", conditioning_1=["20", 0],
                            conditioning_2=["21", 0]), "20": node("CLIPTextEncode", text="a"),
                  "21": node("CLIPTextEncode", text="cat")}, "a, cat"),
    "controlled": ({"6": node("ControlNetApplyAdvanced", positive=["20", 0], negative=["7", 0],
                              strength=1), "20": node("CLIPTextEncode", text="a cat")}, "a cat"),
    "sdxl": ({"6": node("CLIPTextEncodeSDXL", text_g="a cat", text_l="a cat", width=1024)},
             "a cat"),
    "styled": ({"6": node("CLIPTextEncode", text=["20", 0]), "20": node(
        "SDXLPromptStyler", text_positive="a cat", text_negative="a dog", style="base")}, "a cat"),
    "switched": ({"6": node("CLIPTextEncode", text=["20", 0]), "20": node(
        "ImpactSwitch", select=2, input1=["21", 0], input2=["22", 0]),
        "21": node("String Literal", string="no"), "22": node("String Literal", string="a cat")},
        "a cat"),
    "cyclic": ({"6": node("Reroute", **{"": ["20", 0]}), "20": node("Reroute", **{"": ["6", 0]})},
               ""),
    "zeroed": ({"6": node("ConditioningZeroOut", conditioning=["7", 0])}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TEXTS))
def test_texts_through_nodes(name: str) -> None:
    changes, expected = TEXTS[name]
    assert read(graph(**changes)).prompt == expected


def test_the_sampler_that_begins_with_an_empty_latent_drew_the_picture() -> None:
    ksampler = graph()["3"]["inputs"]
    made = read(
        graph(
            **{
                "2": node("KSampler", **{**ksampler, "steps": 30, "denoise": 0.4,
                                         "latent_image": ["20", 0]}),
                "20": node("LatentUpscale", samples=["3", 0], width=1024, height=1280),
            }
        )
    )  # fmt: skip
    assert made == PLAIN


def test_a_picture_that_began_with_a_picture() -> None:
    ksampler = graph()["3"]["inputs"]
    made = read(
        graph(
            **{
                "3": node("KSampler", **{**ksampler, "denoise": 0.5, "latent_image": ["20", 0]}),
                "20": node("VAEEncode", pixels=["21", 0], vae=["4", 2]),
                "21": node("LoadImage", image="x.png"),
            }
        )
    )
    assert (made.from_image, made.steps) == (True, 12)
    assert not PLAIN.from_image


def test_efficient_nodes() -> None:
    made = read(
        {
            "1": node("Efficient Loader", ckpt_name="shapes.safetensors", clip_skip=-2,
                      lora_name="ink.safetensors", lora_model_strength=0.6, positive="a cat",
                      negative="a dog", empty_latent_width=512, empty_latent_height=768,
                      lora_stack=["3", 0]),
            "2": node("KSampler (Efficient)", seed=5, steps=20, cfg=7, sampler_name="euler",
                      scheduler="normal", denoise=1, model=["1", 0], positive=["1", 1],
                      negative=["1", 2], latent_image=["1", 3]),
            "3": node("LoRA Stacker", input_mode="advanced", lora_count=1, lora_name_1="b",
                      lora_wt_1=1, model_str_1=0.3),
        }
    )  # fmt: skip
    assert (made.prompt, made.negative_prompt, made.clip_skip) == ("a cat", "a dog", 2)
    assert (made.width, made.height, made.sampler, made.seed) == (512, 768, "Euler", 5)
    assert made.loras == (Reference(name="b", weight=0.3),
                          Reference(name="ink.safetensors", weight=0.6))  # fmt: skip
    assert made.checkpoints == (Reference(name="shapes"),)


def test_a_bundle_of_links() -> None:
    made = read(
        graph(
            **{
                "3": node("ImpactKSamplerBasicPipe", basic_pipe=["20", 0], seed=9, steps=12,
                          cfg=5.5, sampler_name="dpmpp_2m", scheduler="karras",
                          latent_image=["5", 0], denoise=1),
                "20": node("ToBasicPipe", model=["4", 0], clip=["4", 1], vae=["4", 2],
                           positive=["6", 0], negative=["7", 0]),
            }
        )
    )  # fmt: skip
    assert made == PLAIN


def test_airs_and_the_sites_selector() -> None:
    air = "urn:air:sd1:checkpoint:civitai:1@2"
    slots = json.dumps({"bySlot": {"1": air, "2": "urn:air:other:upscaler:civitai:1@9"}})
    selected = graph(
        **{
            "4": node("CheckpointLoaderSimple", ckpt_name=["17", 1]),
            "17": node("CivitaiModelSelector", air="urn:air:x", resources_json=slots),
        }
    )
    assert read(selected).checkpoints == (Reference(version_id=2),)
    workflow = {"extra": {"ckpt_airs": ["1@5"], "lora_airs": ["urn:air:sd1:lora:civitai:3@7"]}}
    made = parse_generation({"comfy": {"prompt": graph(), "workflow": workflow}})
    assert made.checkpoints[0] == Reference(version_id=5)
    assert made.loras == (Reference(version_id=7),)


def test_the_sites_generator_keeps_what_was_asked_for_beside_the_graph() -> None:
    extra = {"prompt": "a cat", "negativePrompt": "b", "steps": 30, "cfgScale": 7, "seed": 1,
             "sampler": "Euler a", "workflowId": "txt2img", "resources": [
                 {"modelVersionId": 5, "strength": 1},
                 {"modelVersionId": 7, "strength": 0.4}]}  # fmt: skip
    airs = ["urn:air:sd1:checkpoint:civitai:1@5", "urn:air:sd1:lora:civitai:3@7"]
    prompt = {**graph(), "extra": {"airs": airs}, "extraMetadata": json.dumps(extra)}
    made = parse_generation(json.dumps(prompt))
    assert (made.form, made.prompt, made.sampler) == ("civitai", "a cat", "Euler a")
    assert made.checkpoints == (Reference(version_id=5),)
    assert made.loras == (Reference(version_id=7, weight=0.4),)


def test_resources_that_the_site_read_when_the_graph_is_gone() -> None:
    made = parse_generation(
        {"comfy": "{broken", "prompt": "a", "models": ["urn:air:sd1:checkpoint:civitai:1@2"],
         "additionalResources": [{"name": "ink.safetensors", "type": "lora", "strength": 0.6}],
         "versionIds": [2, 4], "sampler": "euler", "scheduler": "karras"}
    )  # fmt: skip
    assert (made.form, made.sampler) == ("comfyui", "Euler Karras")
    assert made.checkpoints == (Reference(version_id=2), Reference(version_id=4))
    assert made.loras == (Reference(name="ink.safetensors", weight=0.6),)


def ui(
    ident: int, kind: str, widgets: list[Any] | None = None, mode: int = 0, **links: int
) -> dict[str, Any]:
    inputs = [{"name": name, "link": link} for name, link in links.items()]
    return {"id": ident, "type": kind, "widgets_values": widgets or [], "mode": mode,
            "inputs": inputs}  # fmt: skip


def workflow() -> dict[str, Any]:
    """The editor's side of `graph`, with a bypassed LoRA, a muted one and a reroute."""
    return {
        "nodes": [
            ui(3, "KSampler", [9, "randomize", 12, 5.5, "dpmpp_2m", "karras", 1], model=1,
               positive=2, negative=3, latent_image=4),
            ui(4, "CheckpointLoaderSimple", ["sd/shapes_v1.safetensors"]),
            ui(5, "EmptyLatentImage", [512, 640, 1]),
            ui(6, "CLIPTextEncode", ["a blue star"], clip=5),
            ui(7, "CLIPTextEncode", ["noise"], clip=6),
            ui(10, "LoraLoader", ["ink.safetensors", 0.6, 1], model=7, clip=8),
            ui(11, "LoraLoader", ["off.safetensors", 0.6, 1], mode=4, model=9),
            ui(12, "Reroute", None, positive=10),
            ui(13, "Note", ["by hand"]),
        ],
        "links": [
            [1, 11, 0, 3, 0, "MODEL"], [2, 12, 0, 3, 1, "CONDITIONING"],
            [3, 7, 0, 3, 2, "CONDITIONING"], [4, 5, 0, 3, 3, "LATENT"], [5, 10, 1, 6, 0, "CLIP"],
            [6, 10, 1, 7, 0, "CLIP"], [7, 4, 0, 10, 0, "MODEL"], [8, 4, 1, 10, 1, "CLIP"],
            [9, 10, 0, 11, 0, "MODEL"], [10, 6, 0, 12, 0, "*"],
        ],
    }  # fmt: skip


def test_the_editors_graph_when_there_is_no_other() -> None:
    made = parse_generation({"comfy": {"workflow": workflow()}})
    assert made == Generation(
        **{
            **PLAIN._asdict(),
            "form": "comfyui-workflow",
            "loras": (Reference(name="ink.safetensors", weight=0.6),),
        }
    )
    assert parse_generation(workflow()) == made
    assert parse_generation({"comfy": {"prompt": graph(), "workflow": workflow()}}) == PLAIN


def test_widgets_that_the_editor_names() -> None:
    flow = workflow()
    shown = [{"name": name, "link": None, "widget": {"name": name}} for name in
             ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")]  # fmt: skip
    flow["nodes"][0]["type"] = "SomeonesSampler"
    flow["nodes"][0]["inputs"] += shown
    made = parse_generation({"comfy": {"workflow": flow}})
    assert (made.seed, made.steps, made.sampler) == (9, 12, "DPM++ 2M Karras")


def test_subgraphs() -> None:
    flow = workflow()
    inner = {
        "id": "abc",
        "nodes": [ui(1, "CLIPTextEncode", ["a blue star"], clip=1)],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0},
            {"id": 2, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0},
        ],
    }
    flow["definitions"] = {"subgraphs": [inner]}
    flow["nodes"][3] = ui(6, "abc", None, clip=5)
    assert parse_generation({"comfy": {"workflow": flow}}).prompt == "a blue star"


def test_set_and_get_nodes() -> None:
    flow = workflow()
    flow["nodes"] += [ui(20, "SetNode", ["words"], CONDITIONING=20), ui(21, "GetNode", ["words"])]
    flow["links"] += [[20, 6, 0, 20, 0, "*"]]
    flow["links"][1] = [2, 21, 0, 3, 1, "CONDITIONING"]
    assert parse_generation({"comfy": {"workflow": flow}}).prompt == "a blue star"


KEYS = ["class_type", "inputs", "model", "positive", "negative", "latent_image", "steps", "cfg",
        "sampler", "sigmas", "guider", "noise", "text", "lora_1", "loras", "conditioning_1",
        "conditioning_2", "nodes", "links", "type", "widgets_values", "id", "link", "name", "mode",
        "definitions", "subgraphs", "extra", "airs", "extraMetadata", "prompt", "workflow",
        "select", "resources_json", "ckpt_name", "pipe", "basic_pipe", "seed",
        "widget"]  # fmt: skip
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["KSampler", "LoraLoader", "SetNode", "GetNode", "1", "2", "x" * 9])
    | st.tuples(st.sampled_from(["1", "2", "3", 1]), st.integers(0, 2)).map(list)
)  # fmt: skip
ANY = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from([*KEYS, "1", "2", "3"]), inner, max_size=6)
    ),
    max_leaves=40,
)
NODES = st.dictionaries(
    st.sampled_from(["1", "2", "3"]),
    st.fixed_dictionaries(
        {"class_type": st.sampled_from(["KSampler", "SamplerCustomAdvanced", "Any"]),
         "inputs": st.dictionaries(st.sampled_from(KEYS), ANY, max_size=8)}
    ),
)  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(ANY | NODES)
def test_reading_never_raises_on_any_graph(value: object) -> None:
    parse_generation({"comfy": value})
    parse_generation({"comfy": {"workflow": value}})
    parse_generation({"comfy": json.dumps({"prompt": value, "workflow": value})})
    parse_generation(value)
    read_comfy(value)


def test_time_is_bounded_in_large_and_branching_graphs() -> None:
    nodes = graph()
    for index in range(2000):  # every text joins the next two: 2 ** 1000 paths
        nodes[f"{100 + index}"] = node(
            "StringConcatenate", string_a=[f"{101 + index}", 0], string_b=[f"{102 + index}", 0],
            delimiter=str(index),
        )  # fmt: skip
        nodes[f"{5000 + index}"] = node("LoraLoader", lora_name="a", strength_model=1,
                                        model=[f"{5001 + index}", 0])  # fmt: skip
    nodes["6"] = node("CLIPTextEncode", text=["100", 0])
    nodes["3"]["inputs"]["model"] = ["5000", 0]
    subgraph = {"id": "s", "nodes": [ui(n, "s") for n in range(50)], "links": []}
    flow = {**workflow(), "definitions": {"subgraphs": [subgraph]}}
    flow["nodes"] = [ui(n, "s") for n in range(5000)]
    start = time.process_time()
    read(nodes)
    parse_generation({"comfy": {"workflow": flow}})
    parse_generation({"comfy": '{"a": "' + '\\"' * 300_000})
    parse_generation({"comfy": "[" * 300_000})
    assert time.process_time() - start < 4
