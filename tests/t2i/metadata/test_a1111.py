"""AUTOMATIC1111's text: read as the WebUI reads it, and the identity after writing."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.render.pnginfo import infotext
from diffagent.render.recipe import EmbeddingUse, LoRAUse, Recipe
from diffagent.t2i.metadata import (
    Generation,
    Reference,
    parse_generation,
    read_parameters,
    write_parameters,
)
from diffagent.t2i.metadata.a1111 import read_fields, split_parameters
from diffagent.t2i.metadata.generation import Reading
from diffagent.t2i.metadata.keys import read_keys
from diffagent.t2i.samplers import SAMPLERS

TEXT = """a red square, <lora:flat_style:0.7>,
on (sand:1.2)
Negative prompt: blurry,
(bad:1.4)
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 12345, Size: 512x768, \
Model hash: 0123456789, Model: "a, b: c", Clip skip: 2, Lora hashes: "flat_style: aabbccddeeff", \
TI hashes: "blurry: 001122334455", Version: v1.10.1"""


def test_all_fields() -> None:
    assert read_parameters(TEXT) == Generation(
        form="a1111-text",
        prompt_raw="a red square, <lora:flat_style:0.7>,\non (sand:1.2)",
        prompt="a red square, on (sand:1.2)",
        negative_prompt_raw="blurry,\n(bad:1.4)",
        negative_prompt="(bad:1.4)",
        sampler_name="DPM++ 2M",
        schedule_name="Karras",
        sampler="DPM++ 2M Karras",
        steps=28,
        cfg_scale=6.5,
        width=512,
        height=768,
        clip_skip=2,
        seed=12345,
        checkpoints=(Reference(hash="0123456789", name="a, b: c"),),
        loras=(Reference(hash="AABBCCDDEEFF", name="flat_style", weight=0.7),),
        negative_embeddings=(Reference(hash="001122334455", name="blurry"),),
    )


#: The grammar of the WebUI's line of settings, which it tries at every position.
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value[:1] == '"' == value[-1:] else value
    except ValueError:
        return value


@settings(deadline=None, max_examples=500)
@given(st.text(alphabet='ab 9:,"\\-/()_é\t', max_size=60))
def test_fields_are_those_of_the_webui(line: str) -> None:
    found = [(name, value) for name, value in FIELD.findall(line)]
    made = list(read_fields(line))
    assert [name for name, _ in made] == [name for name, _ in found]
    for (_, value), (_, expected) in zip(made, found, strict=True):
        assert value == unquoted(expected)


@pytest.mark.parametrize("scale", ["7,5", "7,5, Seed: 1", '"7,5", Seed: 1', "7.5,Seed: 1"])
def test_a_decimal_comma_is_part_of_a_number(scale: str) -> None:
    """Programs write numbers in the language of their computer: 7,5 is not 7."""
    made = read_parameters(f"a\nSteps: 20, Sampler: Euler a, Size: 8x16, CFG scale: {scale}")
    assert (made.cfg_scale, made.steps) == (7.5, 20)
    assert parse_generation({"prompt": "a", "cfgScale": "7,5", "steps": 20}).cfg_scale == 7.5


def test_json_values_are_read_whole() -> None:
    line = 'Seed: 1, Hashes: {"model": "ab", "lora:x": "cd"}, Odd: {not json, Last: "a\\"b, c"'
    assert dict(read_fields(line)) == {
        "Seed": "1",
        "Hashes": {"model": "ab", "lora:x": "cd"},
        "Odd": "{not json",
        "Last": 'a"b, c',
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("only a prompt", ("only a prompt", "", "")),
        ("a\nNegative prompt: b", ("a", "b", "")),
        ("a\n(x:1), (y:1), (z:1)", ("a\n(x:1), (y:1), (z:1)", "", "")),  # weights, no settings
        ("Negative prompt: b\nSteps: 1, Seed: 2, Size: 8x8",
         ("", "b", "Steps: 1, Seed: 2, Size: 8x8")),
        ("a\nSteps: 1, Seed: 2, Size: 8x8\nTemplate: {a|b}\nNegative Template: c",
         ("a", "", "Steps: 1, Seed: 2, Size: 8x8")),
        ("parameters\n\na\nSteps: 1, Seed: 2, Size: 8x8",
         ("a", "", "Steps: 1, Seed: 2, Size: 8x8")),
        ("Parameters  : a.Negative prompt: b.Steps: 1, Sampler: c, Seed: 2",
         ("a", "b", "Steps: 1, Sampler: c, Seed: 2")),
        ("a\nNegative prompt: b\nModel: m.ckpt, Steps: 40, Seed: 2\n\nUsed custom terms: x [0]",
         ("a", "b", "Model: m.ckpt, Steps: 40, Seed: 2")),
        ('a\nSteps: 1, Seed: 2, Wildcard prompt: "b\nc", Model: m\nTemplate: d',
         ("a", "", 'Steps: 1, Seed: 2, Wildcard prompt: "b\nc", Model: m')),
        ("a\nNegative prompt: b\nSteps: 1, Seed: 2, Size: 8x8\nSteps: 3, Seed: 4, Size: 8x8",
         ("a", "b", "Steps: 3, Seed: 4, Size: 8x8")),
        ("tutorial, steps: 1 2 3\nSteps: 5, Seed: 2, Hires steps: 15",
         ("tutorial, steps: 1 2 3", "", "Steps: 5, Seed: 2, Hires steps: 15")),
    ],
)  # fmt: skip
def test_where_the_settings_are(text: str, parts: tuple[str, str, str]) -> None:
    assert split_parameters(text) == parts


def test_resources_of_the_site_in_the_text() -> None:
    made = read_parameters(
        "a\nSteps: 4, Sampler: Euler, Seed: 1, Civitai resources: ["
        '{"type": "checkpoint", "modelVersionId": 5, "modelName": "x"}, '
        '{"weight": 0.5, "air": "urn:air:flux1:lora:civitai:3@7"}], Civitai metadata: {"a": {}}'
    )
    assert made.checkpoints == (Reference(version_id=5),)
    assert made.loras == (Reference(version_id=7, weight=0.5),)


def test_fooocus_writes_what_was_asked_for_apart() -> None:
    made = read_parameters(
        "cat, cinematic\nSteps: 30, Sampler: DPM++ 2M SDE Karras, Seed: 1, Scheduler: karras, "
        'Raw prompt: "cat, <lora:x:1>", Lora hashes: "x: aabbccddeeff", Lora weights: "x: 0.3"'
    )
    assert (made.prompt, made.sampler) == ("cat", "DPM++ 2M SDE Karras")
    assert made.loras == (Reference(hash="AABBCCDDEEFF", name="x", weight=1.0),)


@pytest.mark.parametrize(
    ("meta", "negative"),
    [
        ({"prompt": "a", "negativePrompt": "b\nSteps: 5, Sampler: Euler a, Seed: 7\nTemplate: a"},
         "b"),
        ({"prompt": "a\nNegative prompt: b\nSteps: 5, Sampler: Euler a, Seed: 7"}, "b"),
        ({"prompt": "a\nSteps: 5, Sampler: Euler a, Seed: 7", "negativePrompt": ""}, ""),
        ({"prompt": '{"parameters": "a\\n',
          "negativePrompt": 'b\\nSteps: 5, Sampler: Euler a, Seed: 7"}'}, "b"),
        ({"prompt": "a", "negativePrompt": "Negative prompt: b", "steps": 5, "seed": 7,
          "sampler": "Euler a"}, "b"),
        ({"prompt": "a", "negativePrompt": "Steps: 5, Sampler: Euler a, Seed: 7"}, ""),
    ],
)  # fmt: skip
def test_settings_that_the_site_left_in_a_prompt(meta: dict[str, object], negative: str) -> None:
    made = parse_generation(meta)
    assert made.form == "a1111-text"
    assert (made.prompt, made.negative_prompt) == ("a", negative)
    assert (made.steps, made.sampler, made.seed) == (5, "Euler a", 7)
    assert made.prompt_raw == str(meta["prompt"]).strip()  # the original stays


def test_what_the_site_parsed_wins_over_what_it_left() -> None:
    made = parse_generation(
        {"prompt": "a\nSteps: 5, Sampler: Euler a, Seed: 7", "steps": 30, "cfgScale": 4}
    )
    assert (made.steps, made.cfg_scale, made.seed, made.prompt) == (30, 4.0, 7, "a")


PIECES = [
    *("a cat", "\n", " ", "Negative prompt: ", "Steps: 5, Seed: 1, Size: 8x8", ", ", "(x:1.2)"),
    *("<lora:ink:0.5>", "<lora:in k:1>", "<lora:ink:te=1:unet=0.25>", "parameters:"),
    *("Template: b", "embedding:foo", '"', "\\", "猫"),
]
PROMPTS = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
HASHES = st.text(alphabet="0123456789ABCDEF", min_size=10, max_size=10)
NAMES = st.text(min_size=1, max_size=20).filter(
    lambda name: name == name.strip() and "\0" not in name
)
CFG = st.floats(0, 100, allow_nan=False) | st.sampled_from([7.0, 6.5, 1e-12])
SIZES = st.integers(1, 512).map(lambda size: size * 8)


@st.composite
def generations(draw: st.DrawFn) -> Generation:
    """What `read_parameters` can say of a text, with a checkpoint by hash or by id."""
    checkpoint = draw(
        st.tuples(st.none(), HASHES, NAMES | st.none()).map(lambda known: Reference(*known))
        | st.integers(1, 2**40).map(Reference)
        | st.none()
    )
    width = draw(SIZES | st.none())
    sampler = draw(st.sampled_from([*SAMPLERS, "Odd, one", "k_euler_a"]) | st.none())
    keys = {
        "prompt": draw(PROMPTS),
        "negativePrompt": draw(PROMPTS),
        "sampler": sampler,
        "Schedule type": draw(st.sampled_from(["Karras", "Automatic", "Odd"]) | st.none()),
    }
    made = read_keys(Reading("a1111-text", keys))  # what derives from these is the reader's
    loras = [use for use in made.loras if use.name]
    if draw(st.booleans()):
        loras = [use._replace(hash=digest) for use in loras for digest in [draw(HASHES)]]
    return made._replace(
        steps=draw(st.integers(0, 10**6) | st.none()),
        cfg_scale=draw(CFG | st.none()),
        seed=draw(st.integers(0, 2**64 - 1) | st.none()),
        clip_skip=draw(st.integers(1, 12)),
        width=width,
        height=None if width is None else draw(SIZES),
        checkpoints=(checkpoint,) if checkpoint else (),
        loras=tuple(loras),
        vae=draw(st.builds(lambda *known: Reference(None, *known), HASHES, NAMES) | st.none()),
    )


@settings(deadline=None, max_examples=300)
@given(generations())
def test_reading_gives_back_what_was_written(generation: Generation) -> None:
    assert read_parameters(write_parameters(generation)) == generation


@pytest.mark.parametrize("fields", [{}, {"seed": 5}, {"sampler_name": "Odd"}, {"width": 8}])
def test_few_fields_are_not_taken_for_a_prompt(fields: dict[str, Any]) -> None:
    made = Generation(form="a1111-text", prompt_raw="a", prompt="a", **fields)
    made = made._replace(height=made.width)
    assert read_parameters(write_parameters(made)) == made


SHA256 = st.text(alphabet="0123456789abcdef", min_size=64, max_size=64)
WEIGHTS = st.integers(-40000, 40000).map(lambda weight: weight / 10000)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes with everything that a recipe can have."""
    checkpoint, vae, *laid = draw(
        st.lists(SHA256, min_size=2, max_size=6, unique_by=lambda sha256: sha256[:10])
    )
    split = draw(st.integers(0, len(laid)))
    return Recipe(
        prompt=draw(PROMPTS),
        negative_prompt=draw(PROMPTS),
        checkpoint=checkpoint,
        vae=draw(st.sampled_from([vae, None])),
        loras=tuple(LoRAUse(sha256=sha256, weight=draw(WEIGHTS)) for sha256 in laid[:split]),
        embeddings=tuple(
            EmbeddingUse(sha256=sha256, weight=draw(WEIGHTS), negative=draw(st.booleans()))
            for sha256 in laid[split:]
        ),
        sampler=draw(st.sampled_from(sorted(SAMPLERS))),
        steps=draw(st.integers(1, 150)),
        cfg_scale=draw(st.floats(0, 30)),
        width=draw(SIZES),
        height=draw(SIZES),
        clip_skip=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@settings(deadline=None, max_examples=300)
@given(recipes(), st.data())
def test_a_recipe_can_be_read_from_its_infotext(recipe: Recipe, data: st.DataObject) -> None:
    laid = [use.sha256 for use in (*recipe.loras, *recipe.embeddings)]
    # No word of a prompt, or the WebUI would load it there as well.
    names = {sha: f"zq{data.draw(st.text(max_size=9))}" for sha in data.draw(st.sets(some(laid)))}
    payloads = {sha: sha[-12:] for sha in data.draw(st.sets(some(laid)))}
    names[recipe.checkpoint] = data.draw(st.text(alphabet='a ,:"{}[]\\\n', max_size=9))
    text = infotext(recipe, names, payloads)
    made = read_parameters(text)
    assert recipe.prompt.replace("\0", "").strip() in (made.prompt_raw or "")
    assert recipe.negative_prompt.replace("\0", "").strip() in (made.negative_prompt_raw or "")
    assert (made.sampler, made.steps, made.seed) == (recipe.sampler, recipe.steps, recipe.seed)
    assert (made.cfg_scale, made.clip_skip) == (recipe.cfg_scale, recipe.clip_skip)
    assert (made.width, made.height) == (recipe.width, recipe.height)
    assert [ref.hash for ref in made.checkpoints] == [recipe.checkpoint[:10].upper()]
    assert (made.vae and made.vae.hash) == (recipe.vae and recipe.vae[:10].upper())
    loras = {use.hash: use.weight for use in made.loras}
    assert {use.sha256[:10].upper(): use.weight for use in recipe.loras}.items() <= loras.items()
    for negative, found in ((False, made.embeddings), (True, made.negative_embeddings)):
        assert {(use.hash, use.weight) for use in found if use.hash} == {
            (use.sha256[:10].upper(), use.weight)
            for use in recipe.embeddings
            if use.negative == negative
        }
    # Civitai's parser ends "Hashes" at the first brace and makes an object of a quoted value.
    found = re.search(r", Hashes:\s*({[^}]+})", text.rpartition("\n")[2])
    assert found
    assert json.loads(found[1])["model"] == recipe.checkpoint[:10]
    assert re.search(r', Model: [^",:]+, ', text)


def some(values: list[str]) -> st.SearchStrategy[str]:
    """Any of the values; nothing when there is none."""
    return st.sampled_from(values) if values else st.nothing()


@settings(deadline=None, max_examples=300)
@given(st.text() | PROMPTS | st.builds("{}\nSteps: {}, Seed: {}".format, *[st.text()] * 3))
def test_reading_never_raises_on_any_text(text: str) -> None:
    made = read_parameters(text)
    made.prompt.encode()
    assert parse_generation(text).form in ("none", "a1111-text", *["typed", "a1111", "comfyui"])


@pytest.mark.parametrize(
    "piece",
    [
        *("a", " ", ",", ": ", "a:", "a: ", 'ab: "', 'ab: "\\', "ab: {", 'ab: {"', "(", "<", "<a:"),
        *("Steps: 5, ", "\nSteps: 5, ", "\nNegative prompt: ", ", . ", "embedding:", "urn:air:"),
        *("-/ ", '"', "[", "((embedding:x", "Steps: 5, Sampler: a\n"),
    ],
)
def test_time_is_linear_in_the_text(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    read_parameters(text)
    parse_generation({"prompt": text, "negativePrompt": text, "AddNet Model 1": text,
                      "Lora hashes": text, "Model": text, "Size": text, "sampler": text,
                      "TI hashes": {"x": "001122334455"}})  # fmt: skip
    assert time.process_time() - start < 4  # a quadratic one takes minutes
