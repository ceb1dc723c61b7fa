"""Recipes, their order, and the texts that pictures carry."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffagent.errors import RenderError
from diffagent.render.pnginfo import infotext, read_png, write_png
from diffagent.render.recipe import LoRAUse, Recipe, resolve
from diffagent.schemas.api import T2IAPI, Embedding, LoRA, Params
from diffagent.store import canonical_json
from diffagent.t2i.catalogue import Catalogue, Entry

ENTRY = Entry(
    model="DreamShaper",
    version="8",
    type="Checkpoint",
    base_model="SD 1.5",
    model_id=1,
    version_id=1,
    air="urn:air:sd1:checkpoint:civitai:1@1",
    file_name="x.safetensors",
    file_id=None,
    size_bytes=None,
    sha256="a" * 64,
    download_path="/api/download/models/1",
)
CATALOGUE = Catalogue(
    [
        ENTRY,
        replace(ENTRY, model="XL", version_id=2, base_model="SDXL 1.0", sha256="b" * 64),
        replace(ENTRY, model="Flux", version_id=3, base_model="Flux.1 D", sha256="c" * 64),
        replace(ENTRY, model="Unhashed", version_id=4, sha256=None),
        replace(ENTRY, model="ink", type="LORA", version_id=5, sha256="F" * 64),
        replace(ENTRY, model="oil", type="LoCon", version_id=6, sha256="d" * 64),
        replace(ENTRY, model="xl ink", type="LORA", version_id=7, base_model="SDXL 1.0"),
        replace(ENTRY, model="fog", type="TextualInversion", version_id=8, sha256="e" * 64),
    ]
)


def api(model: str = "DreamShaper", *loras: tuple[str, float], **params: Any) -> T2IAPI:
    values: dict[str, Any] = {"sampler": "Euler a", "steps": 20, "cfg_scale": 7}
    return T2IAPI(
        model=model,
        version="8",
        base_model="SD 1.5",
        loras=tuple(LoRA(model=name, version="8", weight=weight) for name, weight in loras),
        params=Params(**{**values, "width": 512, "height": 768, **params}),
        negative_prompt="blurred",
    )


def test_names_become_hashes() -> None:
    recipe = resolve(api("DreamShaper", ("ink", 0.8), ("oil", 1)), "a cat", 3, CATALOGUE)
    assert recipe == Recipe(
        prompt="a cat",
        negative_prompt="blurred",
        checkpoint="a" * 64,
        loras=(LoRAUse(sha256="d" * 64, weight=1), LoRAUse(sha256="f" * 64, weight=0.8)),
        sampler="Euler a",
        steps=20,
        cfg_scale=7.0,
        width=512,
        height=768,
        clip_skip=1,
        seed=3,
    )


def test_what_draws_the_same_is_the_same_recipe() -> None:
    def digest(call: T2IAPI, seed: int = 0) -> str:
        return resolve(call, "a cat", seed, CATALOGUE).digest

    same = digest(api("DreamShaper", ("ink", 1), ("oil", 1)))
    assert same == digest(api("DreamShaper", ("oil", 1), ("ink", 1), sampler="k_euler_a"))
    assert same == digest(api("DreamShaper", ("ink", 0.5), ("oil", 1), ("ink", 0.5)))
    assert same == digest(api("DreamShaper", ("ink", 1), ("oil", 1), seed=99))
    others = [
        digest(api("DreamShaper", ("ink", 1), ("oil", 1)), seed=1),
        digest(api("DreamShaper", ("ink", 1))),
        digest(api("DreamShaper", ("ink", 0.9), ("oil", 1))),
        digest(api("XL")),
        *(digest(api(**{name: 64})) for name in ("steps", "width", "height")),
        digest(api(cfg_scale=7.5)),
        digest(api(clip_skip=2)),
        digest(api(sampler="DDIM")),
    ]
    assert len({same, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (api("Nobody"), "unknown-model"),
        (api("ink"), "unknown-model"),
        (api("Flux"), "unsupported-base-model"),
        (api("Unhashed"), "no-hash"),
        (api("DreamShaper", ("nobody", 1)), "unknown-lora"),
        (api("DreamShaper", ("XL", 1)), "unknown-lora"),
        (api("DreamShaper", ("xl ink", 1)), "lora-base-mismatch"),
        (api(sampler="DPM adaptive"), "unsupported-sampler"),
        (api(sampler="Undefined"), "unsupported-sampler"),
    ],
)
def test_what_cannot_be_rendered_has_a_reason(call: T2IAPI, reason: str) -> None:
    with pytest.raises(RenderError) as refused:
        resolve(call, "a cat", 0, CATALOGUE)
    assert refused.value.reason == reason


def test_embeddings_are_part_of_the_recipe_and_of_the_infotext() -> None:
    used = (
        Embedding(model="fog", version="8"),
        Embedding(model="fog", version="8", negative=True, weight=1.2),
    )
    call = api().model_copy(update={"embeddings": used, "negative_prompt": "blurry"})
    recipe = resolve(call, "a cat", 1, CATALOGUE)
    assert [(x.sha256, x.weight, x.negative) for x in recipe.embeddings] == [
        ("e" * 64, 1, False),
        ("e" * 64, 1.2, True),
    ]
    assert recipe.digest != resolve(api(), "a cat", 1, CATALOGUE).digest
    lines = infotext(recipe, {"e" * 64: "fog"}).splitlines()
    assert lines[:2] == ["fog, a cat", "Negative prompt: (fog:1.2), blurry"]
    for name, reason in (("ink", "unknown-embedding"), ("nobody", "unknown-embedding")):
        wrong = (Embedding(model=name, version="8"),)
        with pytest.raises(RenderError) as refused:
            resolve(call.model_copy(update={"embeddings": wrong}), "a cat", 1, CATALOGUE)
        assert refused.value.reason == reason


def test_a_vae_is_part_of_the_digest_and_its_absence_is_not() -> None:
    recipe = resolve(api(), "a cat", 1, CATALOGUE)
    assert "vae" in recipe.model_dump()
    told = recipe.model_dump(mode="json", exclude={"vae"})
    assert recipe.digest == hashlib.sha256(canonical_json(told)).hexdigest()
    assert recipe.model_copy(update={"vae": "d" * 64}).digest != recipe.digest


#: The key-value grammar of AUTOMATIC1111's parameters line: values in double quotes or braces
#: may hold commas.
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|\{[^}]*\}|[^,]*)(?:,|$)')


def parse_infotext(text: str) -> dict[str, str]:
    *lines, last = text.split("\n")
    fields = dict(FIELD.findall(last))
    cut = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), None)
    fields["Prompt"] = "\n".join(lines[:cut])
    fields["Negative prompt"] = "" if cut is None else "\n".join(lines[cut:])[17:]
    return fields


@pytest.mark.parametrize("prompt", ["a cat", "ein Würfel, zwei\nZeilen", "猫, (best:1.2)"])
def test_pictures_carry_their_recipe(tmp_path: Path, prompt: str) -> None:
    recipe = resolve(api("DreamShaper", ("ink", 0.8), clip_skip=2), prompt, 2**63, CATALOGUE)
    image = Image.new("RGB", (16, 16), "red")
    names = {"a" * 64: 'Dream, "the" Shaper', "f" * 64: "ink: v2"}
    path = tmp_path / "x.png"
    write_png(path, image, recipe, names)
    again, text = read_png(path)
    assert again == recipe
    fields = parse_infotext(text)
    assert fields["Prompt"] == f"{prompt} <lora:ink_v2:0.8>"
    assert fields["Negative prompt"] == "blurred"
    assert (fields["Steps"], fields["CFG scale"], fields["Size"]) == ("20", "7", "512x768")
    assert (fields["Sampler"], fields["Seed"]) == ("Euler a", str(2**63))
    assert (fields["Model hash"], fields["Clip skip"]) == ("a" * 10, "2")
    assert (fields["Model"], fields["RNG"]) == ("Dream the Shaper", "CPU")
    assert json.loads(fields["Hashes"]) == {"model": "a" * 10, "lora:ink_v2": "f" * 10}
    assert fields["Lora hashes"] == f'"ink_v2: {"f" * 10}"'
    with Image.open(path) as written:
        assert written.tobytes() == image.tobytes()
    write_png(tmp_path / "y.png", image, recipe, names)
    assert path.read_bytes() == (tmp_path / "y.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.png", "y.png"]


def test_an_unknown_model_is_shown_by_its_hash() -> None:
    recipe = resolve(api(), "a cat", 0, CATALOGUE)
    text = infotext(recipe.model_copy(update={"negative_prompt": ""}), {})
    assert "Model: aaaaaaaaaa" in text
    assert "Negative" not in text
    assert "Clip skip" not in text


def test_damaged_pictures_are_not_taken(tmp_path: Path) -> None:
    recipe = resolve(api(), "a cat", 0, CATALOGUE)
    path = tmp_path / "x.png"
    noise = Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(3 * 32 * 32))
    write_png(path, noise, recipe, {})
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(RenderError):
            read_png(path)
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(RenderError, match="no picture of this program"):
        read_png(path)
