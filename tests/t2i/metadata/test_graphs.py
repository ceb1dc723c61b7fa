"""Which sampler's picture was saved, and what the nodes that compute give it."""

from __future__ import annotations

from typing import Any

import pytest

from diffagent.t2i.metadata import Generation, Reference, parse_generation
from diffagent.t2i.metadata.expression import NotKnownError, evaluate, replace_pattern
from tests.t2i.metadata.test_comfy import Graph, graph, node, read, ui, workflow

SAVE = node("SaveImage", images=["8", 0], filename_prefix="x")


def sampler(**changes: Any) -> dict[str, Any]:
    """The sampler of `graph` with other inputs."""
    return node("KSampler", **{**graph()["3"]["inputs"], **changes})


def other(**changes: Any) -> dict[str, Any]:
    """A sampler with prompt, steps, scale and seed of its own."""
    return sampler(**{"positive": ["61", 0], "steps": 40, "cfg": 9, "seed": 1, **changes})


def with_other(**nodes: dict[str, Any]) -> Graph:
    """`graph` with another sampler before it, whose picture nobody saves."""
    return graph(
        **{
            "1": other(),
            "61": node("CLIPTextEncode", text="a red square", clip=["4", 1]),
            "9": SAVE,
            **nodes,
        }
    )


def seen(made: Generation) -> tuple[object, ...]:
    return made.prompt, made.steps, made.cfg_scale, made.seed


OURS, OTHERS = ("a blue star", 12, 5.5, 9), ("a red square", 40, 9.0, 1)


# --- which sampler --------------------------------------------------------------------------

UNSAVED: dict[str, dict[str, dict[str, Any]]] = {
    "nowhere": {},
    "decoded": {"2": node("VAEDecode", samples=["1", 0])},
    "previewed": {"2": node("VAEDecode", samples=["1", 0]),
                  "21": node("PreviewImage", images=["2", 0])},
    "compared": {"2": node("VAEDecode", samples=["1", 0]), "21": node(
        "Image Comparer (rgthree)", image_a=["2", 0], image_b=["8", 0])},
    "a saved latent": {"2": node("SaveLatent", samples=["1", 0], filename_prefix="x")},
    "a control picture": {"2": node("VAEDecode", samples=["1", 0]), "21": node(
        "ControlNetApplyAdvanced", positive=["61", 0], negative=["7", 0], image=["2", 0]),
        "22": sampler(positive=["21", 0])},
}  # fmt: skip


@pytest.mark.parametrize("name", list(UNSAVED))
def test_what_is_not_saved_does_not_count(name: str) -> None:
    assert seen(read(with_other(**UNSAVED[name]))) == OURS


@pytest.mark.parametrize(
    "save",
    [
        node("SaveImageWebsocket", images=["8", 0]),
        node("Image Save", images=["8", 0], output_path="x"),
        node("VHS_VideoCombine", images=["8", 0], frame_rate=8),
        node("SaveAnimatedWEBP", images=["8", 0]),
        node("Image Saver", images=["8", 0], steps=99, cfg=1, positive="wrong"),
        node("easy imageSave", images=["8", 0]),
        node("ETN_SendImageWebSocket", images=["8", 0]),
        node("Someone's Export", image=["8", 0]),
    ],
)
def test_nodes_that_save(save: dict[str, Any]) -> None:
    shown = {"2": node("VAEDecode", samples=["1", 0]), "21": node("PreviewImage", images=["2", 0])}
    assert seen(read(with_other(**{"9": save}, **shown))) == OURS


def test_a_preview_counts_where_nothing_is_saved() -> None:
    previewed = with_other(**{"9": node("PreviewImage", images=["8", 0])})
    assert seen(read(previewed)) == OURS
    only_loaded = with_other(
        **{"9": node("SaveImage", images=["2", 0]), "2": node("LoadImage", image="x.png")}
    )
    assert read(only_loaded).prompt == ""


def test_the_sites_own_reading_of_the_wrong_sampler_is_not_believed() -> None:
    site = {"prompt": "a red square", "steps": 40, "cfgScale": 9, "seed": 1, "sampler": "Euler a",
            "clipSkip": 2, "Model": "wrong"}  # fmt: skip
    nodes = with_other(
        **{
            "1": other(sampler_name="euler_ancestral"),
            "2": node("CLIPSetLastLayer", stop_at_clip_layer=2, clip=["4", 1]),
            "21": node("CheckpointLoaderSimple", ckpt_name="wrong.safetensors"),
        }
    )
    made = read(nodes, **site)
    assert (seen(made), made.sampler, made.clip_skip) == (OURS, "DPM++ 2M Karras", 1)
    assert made.checkpoints == (Reference(name="sd/shapes_v1"),)
    edited = read(nodes, **{**site, "prompt": "by hand", "steps": 33})
    assert (edited.prompt, edited.steps) == ("by hand", 33)


def test_the_walk_goes_through_pictures_and_switches() -> None:
    made = read(
        with_other(
            **{
                "9": node("SaveImage", images=["33", 0]),
                "30": node("ImageUpscaleWithModel", upscale_model=["31", 0], image=["8", 0]),
                "31": node("UpscaleModelLoader", model_name="x.pth"),
                "32": node("CR Image Input Switch", Input=2, image1=["2", 0], image2=["30", 0]),
                "2": node("VAEDecode", samples=["1", 0]),
                "33": node("FaceDetailer", image=["32", 0], steps=50, cfg=2, seed=3,
                           sampler_name="euler", scheduler="normal", positive=["61", 0]),
            }
        )
    )  # fmt: skip
    assert seen(made) == OURS
    assert not made.from_image


PASSES: dict[str, dict[str, dict[str, Any]]] = {
    "upscaled latent": {
        "8": node("VAEDecode", samples=["1", 0]),
        "1": other(latent_image=["20", 0], denoise=0.5),
        "20": node("LatentUpscaleBy", samples=["3", 0], scale_by=2),
    },
    "upscaled picture": {
        "8": node("VAEDecode", samples=["1", 0]),
        "1": other(latent_image=["20", 0], denoise=0.4),
        "20": node("VAEEncode", pixels=["21", 0]),
        "21": node("ImageScale", image=["22", 0], width=1024, height=1280),
        "22": node("VAEDecode", samples=["3", 0]),
    },
    "refiner": {
        "8": node("VAEDecode", samples=["1", 0]),
        "1": node("KSamplerAdvanced", add_noise="disable", noise_seed=1, steps=40, cfg=9,
                  sampler_name="euler", scheduler="normal", start_at_step=10, end_at_step=40,
                  positive=["61", 0], latent_image=["3", 0]),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(PASSES))
def test_of_several_passes_the_first_one_counts(name: str) -> None:
    made = read(with_other(**PASSES[name]))
    assert (seen(made), made.width, made.height) == (OURS, 512, 640)
    assert not made.from_image


def test_a_pass_that_adds_all_the_noise_begins_anew() -> None:
    made = read(
        with_other(
            **{
                "8": node("VAEDecode", samples=["1", 0]),
                "1": other(latent_image=["20", 0], denoise=1),
                "20": node("LatentUpscaleBy", samples=["3", 0], scale_by=2),
            }
        )
    )
    assert (seen(made), made.width, made.height) == (OTHERS, 1024, 1280)


def test_of_several_saved_pictures_only_what_they_share_is_known() -> None:
    made = read(
        with_other(
            **{
                "2": node("VAEDecode", samples=["1", 0]),
                "21": node("SaveImage", images=["2", 0]),
                "1": other(seed=9, cfg=5.5),
            }
        )
    )
    assert seen(made) == ("", None, 5.5, 9)
    assert made.not_known == ("prompt",)
    assert (made.width, made.height, made.negative_prompt) == (512, 640, "noise")


def test_bundles_of_links_that_hand_values_on() -> None:
    bundle = node("Context Big (rgthree)", model=["4", 0], clip=["4", 1], positive=["6", 0],
                  negative=["7", 0], latent=["5", 0], steps=["21", 0], seed=9,
                  ckpt_name="wrong.safetensors")  # fmt: skip
    made = read(
        graph(
            **{
                "20": bundle,
                "21": node("PrimitiveInt", value=12),
                "22": node("Context Big (rgthree)", base_ctx=["20", 0], cfg=5.5),
                "23": node("Context Switch Big (rgthree)", ctx_01=["22", 0], ctx_02=["99", 0]),
                "3": sampler(model=["23", 1], positive=["23", 4], negative=["23", 5],
                             latent_image=["23", 6], seed=["23", 8], steps=["23", 9],
                             cfg=["23", 11]),
                "9": SAVE,
            }
        )
    )  # fmt: skip
    assert (seen(made), made.width, made.negative_prompt) == (OURS, 512, "noise")
    assert made.checkpoints == (Reference(name="sd/shapes_v1"),)


def test_an_unconnected_node_sets_nothing() -> None:
    loose = {
        "20": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["4", 1]),
        "21": node("LoraLoader", lora_name="ink", strength_model=1, model=["4", 0], clip=["20", 0]),
        "22": node("CheckpointLoaderSimple", ckpt_name="other.safetensors"),
        "23": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    }
    made = read(with_other(**loose))
    assert (made.clip_skip, made.loras, made.width) == (1, (), 512)
    assert made.checkpoints == (Reference(name="sd/shapes_v1"),)
    connected = {**loose, "6": node("CLIPTextEncode", text="a blue star", clip=["21", 1])}
    assert read(with_other(**connected)).clip_skip == 2


def test_muted_nodes_do_not_run_and_links_go_through_bypassed_ones() -> None:
    flow = workflow()
    flow["nodes"] += [
        ui(1, "KSampler", [1, "fixed", 40, 9, "euler", "normal", 1], model=11, positive=12,
           negative=13, latent_image=14),
        ui(2, "VAEDecode", samples=15),
        ui(21, "SaveImage", ["x"], mode=2, images=16),
        ui(8, "VAEDecode", samples=17),
        ui(9, "PreviewImage", images=18),
    ]  # fmt: skip
    flow["links"] += [
        [11, 4, 0, 1, 0, "MODEL"], [12, 6, 0, 1, 1, "CONDITIONING"],
        [13, 7, 0, 1, 2, "CONDITIONING"], [14, 5, 0, 1, 3, "LATENT"], [15, 1, 0, 2, 0, "LATENT"],
        [16, 2, 0, 21, 0, "IMAGE"], [17, 3, 0, 8, 0, "LATENT"], [18, 8, 0, 9, 0, "IMAGE"],
    ]  # fmt: skip
    assert parse_generation({"comfy": {"workflow": flow}}).steps == 12
    flow["nodes"][-3]["mode"] = 0
    assert parse_generation({"comfy": {"workflow": flow}}).steps == 40
    bypassed = ui(6, "ControlNetApplyAdvanced", mode=4)
    bypassed["inputs"] = [
        {"name": "positive", "type": "CONDITIONING", "link": 20},
        {"name": "negative", "type": "CONDITIONING", "link": 21},
        {"name": "image", "type": "IMAGE", "link": None},
    ]
    bypassed["outputs"] = [{"type": "CONDITIONING"}, {"type": "CONDITIONING"}]
    flow["nodes"][3] = bypassed
    flow["nodes"] += [ui(60, "CLIPTextEncode", ["a cat"]), ui(70, "CLIPTextEncode", ["a dog"])]
    flow["links"] += [[20, 60, 0, 6, 0, "*"], [21, 70, 0, 6, 1, "*"]]
    flow["links"][2] = [3, 6, 1, 3, 2, "CONDITIONING"]
    flow["nodes"][-5]["mode"] = 2
    made = parse_generation({"comfy": {"workflow": flow}})
    assert (made.prompt, made.negative_prompt) == ("a cat", "a dog")


# --- numbers --------------------------------------------------------------------------------

SIXTEEN = node("PrimitiveInt", value=16)


def steps_of(**nodes: dict[str, Any]) -> object:
    return read(graph(**{"3": sampler(steps=["20", 0]), "30": SIXTEEN, **nodes})).steps


COMPUTED: dict[str, tuple[dict[str, Any], object]] = {
    "a*2": (node("MathExpression|pysssss", expression="a*2", a=["30", 0]), 32),
    "round": (node("MathExpression|pysssss", expression="round(a*0.4)", a=["30", 0]), 6),
    "cut": (node("MathExpression|pysssss", expression="a*0.4+0.5", a=["30", 0]), 6),
    "essentials round": (node("SimpleMath+", value="a*0.4+0.5", a=["30", 0]), 7),
    "power": (node("SimpleMath+", value="2**4 + min(a, 3)", a=["30", 0]), 19),
    "a missing input is 0": (node("SimpleMath+", value="a+b", a=["30", 0]), 16),
    "core": (
        node("ComfyMathExpression", **{"expression": "a // 3", "values.a": ["30", 0]}),
        5,
    ),
    "comparison": (node("MathExpression|pysssss", expression="iif(a > 10, 20, 30)", a=["30", 0]),
                   20),
    "width": (node("MathExpression|pysssss", expression="a.width / 16", a=["5", 0]), 32),
    "integers": (node("Evaluate Integers", python_expression="((a + b) - c) / 2", a=["30", 0], b=8,
                      c=2, print_to_console="False"), 11),
    "easy": (node("easy mathInt", a=["30", 0], b=3, operation="divide"), 5),
    "comfymath": (node("CM_IntBinaryOperation", op="Sub", a=["30", 0], b=3), 13),
    "was": (node("Number Operation", number_a=["30", 0], number_b=2, operation="multiplication"),
            32),
    "comfyroll": (node("CR Integer Multiple", integer=["30", 0], multiple=2), 32),
    "slider": (node("mxSlider", Xi=16, Xf=16.5, isfloatX=0), 16),
    "reroute": (node("Reroute", **{"": ["30", 0]}), 16),
    "switch": (node("ImpactSwitch", select=2, input1=["5", 1], input2=["30", 0]), 16),
    "branch": (node("easy ifElse", boolean=False, on_true=3, on_false=["30", 0]), 16),
    "image saver": (node("Input Parameters (Image Saver)", steps=16, seed=20, cfg=7, sampler="x",
                         scheduler="y", denoise=1), 20),
    "rgthree": (node("KSampler Config (rgthree)", steps_total=25, refiner_step=20, cfg=8,
                     sampler_name="euler", scheduler="normal"), 25),
    # Nobody knows:
    "random": (node("MathExpression|pysssss", expression="randomint(1, a)", a=["30", 0]), None),
    "random number": (node("Random Number", minimum=1, maximum=9, seed=16), None),
    "by zero": (node("SimpleMath+", value="a/0", a=["30", 0]), None),
    "huge": (node("SimpleMath+", value="9**9**9**9", a=["30", 0]), None),
    "rounded off": (node("SimpleMath+", value="round(a, 0-999999999)", a=["30", 0]), None),
    "no formula": (node("SimpleMath+", value="__import__('os').getpid()", a=["30", 0]), None),
    "deep": (node("SimpleMath+", value="(" * 400, a=["30", 0]), None),
    "another's": (node("SomeonesMath", value=16, operation="double"), None),
    "one input": (node("NegateInteger", value=["30", 0]), None),
    "index": (node("Switch Number By Index", index=0, number1=16, number2=20), None),
    "itself": (node("SimpleMath+", value="a+1", a=["20", 0]), None),
    "dangling": (node("Reroute", **{"": ["99", 0]}), None),
}  # fmt: skip


@pytest.mark.parametrize("name", list(COMPUTED))
def test_numbers_that_nodes_compute(name: str) -> None:
    computing, expected = COMPUTED[name]
    assert steps_of(**{"20": computing}) == expected


def test_seeds_of_generators() -> None:
    for kind, inputs, expected in (
        ("Seed (rgthree)", {"seed": 5}, 5),
        ("easy seed", {"seed": 5, "control_after_generate": "fixed"}, 5),
        ("CR Seed", {"seed": 5}, 5),
        ("Seed Generator (Image Saver)", {"seed": 5, "increment": 2}, 7),
        ("GlobalSeed //Inspire", {"value": 5, "mode": True, "action": "randomize"}, None),
    ):
        made = read(graph(**{"3": sampler(seed=["20", 0]), "20": node(kind, **inputs)}))
        assert made.seed == expected


def test_settings_that_are_not_known() -> None:
    made = read(
        graph(
            **{
                "3": sampler(cfg=["20", 0], sampler_name=["20", 1], seed=["20", 2]),
                "20": node("Random Settings", cfg=3, sampler_name="euler", seed=4),
            }
        )
    )
    assert (made.cfg_scale, made.sampler, made.seed) == (None, None, None)
    lora = node("LoraLoader", lora_name="ink", strength_model=["21", 0], model=["4", 0])
    made = read(graph(**{"3": sampler(model=["20", 0]), "20": lora,
                         "21": node("Random Float", value=0.3, seed=1)}))  # fmt: skip
    assert (made.loras, made.not_known) == ((), ("loras",))
    assert made.checkpoints == (Reference(name="sd/shapes_v1"),)


# --- sizes ----------------------------------------------------------------------------------

CR = {"width": 1024, "height": 1024, "aspect_ratio": "3:4 portrait 896x1152",
      "swap_dimensions": "Off", "upscale_factor": 1, "batch_size": 1}  # fmt: skip
LATENTS: dict[str, tuple[dict[str, Any], tuple[int | None, int | None]]] = {
    "comfyroll": (node("CR SDXL Aspect Ratio", **CR), (896, 1152)),
    "swapped": (node("CR SDXL Aspect Ratio", **{**CR, "swap_dimensions": "On"}), (1152, 896)),
    "custom": (node("CR SDXL Aspect Ratio", **{**CR, "aspect_ratio": "custom"}), (1024, 1024)),
    "sd15": (node("CR SD1.5 Aspect Ratio", **{**CR, "aspect_ratio": "2:3 portrait 512x768"}),
             (512, 768)),
    "prescaled": (node("CR Aspect Ratio", **{**CR, "prescale_factor": 0.5, "aspect_ratio":
                       "SDXL - 3:4 portrait 896x1152"}), (448, 576)),
    "rgthree": (node("SDXL Empty Latent Image (rgthree)", dimensions=" 896 x 1152  (portrait)",
                     clip_scale=2, batch_size=1), (896, 1152)),
    "inverted": (node("EmptyLatentImagePresets", dimensions="768 x 512 (1.5:1)", invert=True,
                      batch_size=1), (512, 768)),
    "essentials": (node("SDXLEmptyLatentSizePicker+", resolution="896x1152 (0.78)", batch_size=1,
                        width_override=0, height_override=768), (896, 768)),
    "upscaled": (node("LatentUpscale", samples=["5", 0], width=1024, height=0, crop="disabled"),
                 (1024, 1280)),
    "upscaled by": (node("LatentUpscaleBy", samples=["5", 0], scale_by=1.5), (768, 960)),
    "repeated": (node("RepeatLatentBatch", samples=["5", 0], amount=4), (512, 640)),
    "switched": (node("LatentSwitch", select=2, latent1=["99", 0], latent2=["5", 0]), (512, 640)),
    "computed": (node("EmptyLatentImage", width=["30", 0], height=["30", 1], batch_size=1),
                 (896, 1152)),
    "multiplied": (node("EmptyLatentImage", width=["31", 0], height=["31", 0], batch_size=1),
                   (768, 768)),
    # Nobody knows:
    "another's preset": (node("My SDXL Latent", preset="portrait", width=512, height=512,
                              batch_size=1), (None, None)),
    "another's swap": (node("My Empty Latent", width=512, height=768, flip=True), (None, None)),
    "another's upscale": (node("NNLatentUpscale", latent=["5", 0], version="SDXL", upscale=1.5),
                          (None, None)),
    "from a picture": (node("EmptyLatentImage", width=["40", 0], height=["40", 1], batch_size=1),
                       (None, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LATENTS))
def test_sizes_that_nodes_compute(name: str) -> None:
    latent, size = LATENTS[name]
    nodes = graph(
        **{
            "3": sampler(latent_image=["20", 4 if "CR " in latent["class_type"] else 0]),
            "20": latent,
            "30": node("CR SDXL Aspect Ratio", **CR),
            "31": node("MathExpression|pysssss", expression="a*1.5", a=512),
            "40": node("GetImageSize", image=["41", 0]),
            "41": node("LoadImage", image="x.png"),
            "8": node("VAEDecode", samples=["3", 0]),
            "9": node("SaveImage", images=["42", 0]),
            "42": node("ImageScale", image=["8", 0], width=2048, height=2048),
        }
    )
    made = parse_generation({"comfy": {"prompt": nodes}}, image_width=2048, image_height=2048)
    assert (made.width, made.height) == size
    assert ("size" in made.not_known) == (size == (None, None))
    assert not made.from_image


def test_the_pictures_own_size_stands_in_where_nothing_changed_it() -> None:
    nodes = graph(**{"5": node("My Empty Latent", preset="x", batch_size=1), "9": SAVE})
    made = parse_generation({"comfy": {"prompt": nodes}}, image_width=512, image_height=640)
    assert (made.width, made.height, made.size_from_image) == (512, 640, True)


# --- texts ----------------------------------------------------------------------------------

LINES = "a cat\na dog\na bird"
WORDS: dict[str, tuple[dict[str, Any], str]] = {
    "replaced": (node("StringReplace", string="a X", find="X", replace="cat"), "a cat"),
    "pattern": (node("RegexReplace", string="a DOG and a dog", regex_pattern="dogs?",
                     replace="cat"), "a cat and a cat"),
    "case": (node("RegexReplace", string="a DOG and a dog", regex_pattern="dog", replace="cat",
                  case_insensitive=False, multiline=False, dotall=False, count=0),
             "a DOG and a cat"),
    "groups": (node("RegexReplace", string="cat a", regex_pattern=r"(\w+) (\w+)",
                    replace=r"\2 \1"), "a cat"),
    "was pattern": (node("Text Find and Replace", text="a  cat", find=r"\s+", replace=" "),
                    "a cat"),
    "comfyroll": (node("CR Text Replace", text="a X Y", find1="X", replace1="big", find2="Y",
                       replace2="cat"), "a big cat"),
    "function": (node("StringFunction|pysssss", action="append", tidy_tags="yes", text_a="a",
                      text_b="cat", text_c=""), "a, cat"),
    "list": (node("CR Text List", multiline_text=LINES, start_index=1, max_rows=1), "a dog"),
    "line": (node("easy promptLine", prompt=LINES, start_index=2, max_rows=1), "a bird"),
    "selected": (node("ImpactStringSelector", strings=LINES, multiline=False, select=4), "a dog"),
    "switch": (node("CR Text Input Switch", Input=2, text1="a dog", text2="a cat"), "a cat"),
    "index": (node("easy textIndexSwitch", index=1, text0="a dog", text1="a cat"), "a cat"),
    "branch": (node("Text Input Switch", text_a="a dog", text_b="a cat", boolean=False), "a cat"),
    "joined": (node("JoinStrings", string1="a", string2="cat", delimiter=" "), "a cat"),
    "concatenated": (node("easy promptConcat", prompt1="a", prompt2="cat", separator=" "), "a cat"),
    "another's join": (node("ttN concat", text1="a", text2="cat", delimiter=" "), "a cat"),
    "upper": (node("CaseConverter", string="A CAT", mode="lowercase"), "a cat"),
    "constant": (node("StringConstantMultiline", string="a\n cat ", strip_newlines=True), "a cat"),
    "shown": (node("ShowText|pysssss", text=["30", 0], text_0="an older cat"), "a fish"),
    # Nobody knows:
    "language model": (node("OllamaGenerate", prompt="describe a cat", model="x"), ""),
    "one text": (node("LLM Text", text="describe a cat"), ""),
    "shown model": (node("ShowText|pysssss", text=["31", 0], text_0="an older cat"), ""),
    "joined model": (node("StringConcatenate", string_a="a", string_b=["31", 0], delimiter=""), ""),
    "all lines": (node("CR Text List", multiline_text=LINES, start_index=0, max_rows=9), ""),
    "another's list": (node("Text List Picker", text=LINES, index=1), ""),
    "file": (node("Text Load Line From File", file_path="x.txt", index=1), ""),
    "style": (node("SDXLPromptStyler", text_positive="a cat", text_negative="", style="anime"), ""),
    "wildcard": (node("DPRandomGenerator", text="{a|b} cat", seed=1), ""),
    "catastrophe": (node("RegexReplace", string="a" * 5000, regex_pattern="(a*)*b",
                         replace=""), ""),
    "reversed": (node("StringReverse", string="tac a"), ""),
    "translated": (node("Text翻译", text="ein Kater"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WORDS))
def test_texts_that_nodes_compute(name: str) -> None:
    computing, expected = WORDS[name]
    nodes = {
        "6": node("CLIPTextEncode", text=["20", 0], clip=["4", 1]),
        "20": computing,
        "30": node("String Literal", string="a fish"),
        "31": node("Groq LLM API", user_input="write a prompt", model="x"),
    }
    for site in ({}, {"prompt": computing["inputs"].get("prompt", "write a prompt")}):
        made = read(graph(**nodes), **site)
        assert made.prompt == expected
        assert ("prompt" in made.not_known) == (not expected)


def test_a_negative_prompt_that_is_not_known_is_no_empty_one() -> None:
    made = read(graph(**{"7": node("CLIPTextEncode", text=["20", 0], clip=["4", 1]),
                         "20": node("Random Negative", text="noise", seed=1)}))  # fmt: skip
    assert (made.negative_prompt_raw, made.not_known) == (None, ("negative_prompt",))


def test_a_schedule_of_prompts_is_no_prompt() -> None:
    text = '"0": "a cat", "12": "a dog"'
    for kind in ("BatchPromptSchedule", "PromptScheduleEncodeSDXL", "PromptTravel Encode"):
        made = read(graph(**{"6": node(kind, text=text, max_frames=24, clip=["4", 1])}))
        assert (made.prompt, made.not_known) == ("", ("prompt",))


def test_an_encoder_with_a_style_says_more_than_its_text() -> None:
    for style, prompt in (("anime", ""), ("None", "a cat"), ("", "a cat")):
        encoder = node("Styled Text Encode", text="a cat", style=style, clip=["4", 1])
        made = read(graph(**{"6": encoder}))
        assert (made.prompt, made.not_known) == (prompt, () if prompt else ("prompt",))


def test_conditionings_that_are_mixed() -> None:
    average = node("ConditioningAverage", conditioning_to=["6", 0], conditioning_from=["7", 0],
                   conditioning_to_strength=0.5)  # fmt: skip
    made = read(graph(**{"3": sampler(positive=["20", 0]), "20": average}))
    assert (made.prompt, made.not_known) == ("", ("prompt",))
    average["inputs"]["conditioning_to_strength"] = 1
    assert read(graph(**{"3": sampler(positive=["20", 0]), "20": average})).prompt == "a blue star"
    crossed = node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0])
    made = read(graph(**{"3": sampler(positive=["20", 1], negative=["20", 0]), "20": crossed}))
    assert (made.prompt, made.negative_prompt) == ("noise", "a blue star")


@pytest.mark.parametrize(
    "part",
    [
        node("ConditioningSetArea", width=256, height=512, x=0, y=0, conditioning=["22", 0]),
        node("ConditioningSetMask", strength=1, mask=["40", 0], conditioning=["22", 0]),
        node("ConditioningSetTimestepRange", start=0.5, end=1, conditioning=["22", 0]),
    ],
    ids=lambda part: part["class_type"],
)
def test_prompts_of_parts_of_a_picture_are_not_one_prompt(part: dict[str, Any]) -> None:
    """Prompts of areas or of steps draw another picture than both in a line."""
    mixed = node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["21", 0])
    nodes = {"3": sampler(positive=["20", 0]), "20": mixed, "21": part}
    made = read(graph(**nodes, **{"22": node("CLIPTextEncode", text="a dog", clip=["4", 1])}))
    assert (made.prompt, made.not_known) == ("", ("prompt",))
    same = {"22": node("CLIPTextEncode", text="a blue star", clip=["4", 1])}
    assert read(graph(**nodes, **same)).prompt == "a blue star"


PATTERNS = [
    *("(a|a)*b", "(a+)+b", "(?:a*)*b", "a*a*a*a*b", "(a|aa)+$", r"(a)\1*b", "(?P<x>a*)*", "["),
    *("a{0,9}" * 30, "(a?)" * 40 + "a" * 40, "(a|b|ab)" * 20, "(?=a*a*a*)b", "(", "a**", "\\"),
    *("[[a]]", "[a--b]", "[a||b]"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_may_take_long_are_not_tried(pattern: str) -> None:
    with pytest.raises(NotKnownError):
        replace_pattern("a" * 3000 + "c", pattern, "x")


FORMULAS = [
    *("", "a", "1e999", "2**1000", "9" * 400, "[1]*9", "'a'*9", "lambda: 1", "(1).real", "1 if"),
    *("-" * 490, "round(1, 0-10**9)", "max()", "int('9')", "a.b.c", "1 < 2 < 3", "1 << 99"),
    *("(-8)**0.5", "f(x for x in 1)", "0/0", "1 and 2", "a[0]", "1if 1else 2"),
    *(r"'\d'", "f'{1}'"),
]


@pytest.mark.parametrize("formula", FORMULAS)
def test_formulas_without_a_value(formula: str) -> None:
    def nothing(name: str) -> int:
        raise NotKnownError(name)

    with pytest.raises(NotKnownError):
        evaluate(formula, nothing)
