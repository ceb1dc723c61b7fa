"""One network is one network, however its tag, its hash and other lists spell it."""

from __future__ import annotations

from typing import Any

import pytest

from diffagent.t2i.metadata import Reference, parse_generation
from diffagent.t2i.metadata.values import file_hash, weight

HASH, OTHER = "AABBCCDDEE", "1122334455"


def loras(prompt: str, **meta: Any) -> list[tuple[str | None, str | None, float]]:
    made = parse_generation({"prompt": prompt, "steps": 5, **meta})
    return [(use.name, use.hash, use.weight) for use in made.loras]


TEXT = {"Lora hashes": f'"%s: {HASH.lower()}"'}
OBJECT = {"hashes": {"model": "0123456789", "lora:%s": HASH}}
SITE = {"resources": [{"type": "lora", "name": "%s", "hash": HASH, "weight": 0.4}]}


def spelled(form: dict[str, Any], name: str) -> Any:
    """A form of the list of hashes with a name in it."""
    if isinstance(form, dict):
        return {key.replace("%s", name): spelled(value, name) for key, value in form.items()}
    if isinstance(form, list):
        return [spelled(item, name) for item in form]
    return form.replace("%s", name) if isinstance(form, str) else form


@pytest.mark.parametrize("form", [TEXT, OBJECT, SITE], ids=["text", "object", "site"])
@pytest.mark.parametrize(
    ("tag", "listed"),
    [
        ("inkwash", "inkwash"),
        ("Styles/InkWash", "inkwash"),
        ("Styles\\InkWash", "InkWash"),
        ("inkwash", "styles/inkwash.safetensors"),
        ("ink, wash", "ink, wash"),
        ("ink, wash", "ink_ wash"),
        ("ink: wash", "ink: wash"),
        ("ink: wash", "ink_wash"),
        ("Ink Wash", "ink_wash"),
        ("inkwash.safetensors", "inkwash"),
        ("INKWASH", "inkwash"),
        ("墨水", "墨水"),
    ],
)
def test_spellings_of_one_network(tag: str, listed: str, form: dict[str, Any]) -> None:
    assert loras(f"a cat <lora:{tag}:0.4>", **spelled(form, listed)) == [(tag, HASH, 0.4)]


@pytest.mark.parametrize("form", [TEXT, OBJECT], ids=["text", "object"])
@pytest.mark.parametrize(
    ("tag", "listed"), [("Styles/InkWash", "inkwash_v1"), ("my alias", "inkwash_v1")]
)
def test_an_alias_has_the_hash_that_is_left(tag: str, listed: str, form: dict[str, Any]) -> None:
    made = spelled(form, listed)
    assert loras(f"<lora:{tag}:0.4> a cat", **made) == [(tag, HASH, 0.4)]
    both = loras(f"<lora:{tag}:0.4> <lora:oil:0.7>", **made, AddNet="no")
    similar = tag != "my alias"
    assert (both[0] == (tag, HASH, 0.4)) == similar
    made["hashes"] = {**made.get("hashes", {}), "lora:oil": OTHER}
    both = loras(f"<lora:{tag}:0.4> <lora:oil:0.7>", **made)
    assert both == [(tag, HASH, 0.4), ("oil", OTHER, 0.7)]


def test_a_hash_of_no_tag_or_of_any_of_several_has_no_weight_that_is_known() -> None:
    meta = {"prompt": "<lora:one:0.4> <lora:two:0.7>", "Lora hashes": f"third: {HASH}", "steps": 5}
    assert parse_generation(meta).not_known == ("loras",)
    assert parse_generation({**meta, "prompt": "a cat"}).not_known == ("loras",)
    negative = {**meta, "prompt": "a cat", "negativePrompt": "bad <lora:third:0.4>"}
    assert parse_generation(negative).not_known == ("loras",)
    detailed = {**meta, "prompt": "<lora:third:0.4>", "hashes": {"lora:face": OTHER}}
    assert parse_generation(detailed).not_known == ("loras",)


@pytest.mark.parametrize("again", ["<lora:ink:0.3>", "<lora:INK:0.4>", "<lyco:ink:0.4>"])
def test_a_network_that_is_tagged_twice_has_no_weight_that_is_known(again: str) -> None:
    """The WebUI applies it twice, Forge with both weights, the former with the last one."""
    made = parse_generation({"prompt": f"<lora:ink:0.4> a cat {again}", "steps": 5})
    assert made.not_known == ("loras",)
    assert [use.name for use in made.loras] == ["ink"]


def test_three_places_that_name_one_network() -> None:
    made = loras(
        "a cat <lora:Ink/inkwash_v1:0.6>",
        **{
            "hashes": {"lora:inkwash_v1": HASH},
            "Lora hashes": f"inkwash_v1: {HASH.lower()}",
            "resources": [{"type": "lora", "name": "inkwash_v1", "weight": 1, "hash": HASH}],
        },
    )
    assert made == [("Ink/inkwash_v1", HASH, 0.6)]
    assert loras("a cat", **{"Lora hashes": f"a: {HASH}, b, c: {OTHER}"}) == [
        ("a", HASH, 1.0),
        ("b, c", OTHER, 1.0),
    ]


def test_networks_that_differ_stay_two() -> None:
    both = loras("<lora:ink:0.4> <lora:oil:0.6>", hashes={"lora:ink": HASH, "lora:oil": OTHER})
    assert both == [("ink", HASH, 0.4), ("oil", OTHER, 0.6)]


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("ink:0,6", 0.6),
        ("ink:,6", 0.6),
        ("ink:0.6", 0.6),
        ("ink: 0.6 ", 0.6),
        ("ink:.6", 0.6),
        ("ink:-0.6", -0.6),
        ("ink:+0.6", 0.6),
        ("ink:1", 1.0),
        ("ink", 1.0),
        ("ink:", 1.0),
        ("ink:te=1:unet=0,6", 0.6),
        ("ink:0.6:lbw=FACE", 0.6),
        ("ink:0.89896789786", 0.899),
    ],
)
def test_weights_of_tags(tag: str, expected: float) -> None:
    made = parse_generation({"prompt": f"a cat <lora:{tag}>", "steps": 5})
    assert made.loras == (Reference(name="ink", weight=expected),)
    assert made.not_known == ()


@pytest.mark.parametrize("tag", ["ink:0.0.8", "ink:NUM", "ink:.9.8", "ink:0.8a"])
def test_weights_that_are_none(tag: str) -> None:
    made = parse_generation({"prompt": f"a cat <lora:{tag}>", "steps": 5})
    assert made.loras[0].name == "ink"
    assert made.not_known == ("loras",)


def test_numbers_with_a_comma() -> None:
    assert [weight(value) for value in ("0,6", ",5", "1,25", "-0,5", "1", None, "x")] == [
        *(0.6, 0.5, 1.25, -0.5, 1.0, 1.0, 1.0)
    ]


DIGITS = "ab" * 32


@pytest.mark.parametrize(
    "spelling",
    [
        *(DIGITS, DIGITS.upper(), f"0x{DIGITS}", f"0X{DIGITS}", f" {DIGITS} ", f"blake3:{DIGITS}"),
        *(f"sha256:{DIGITS}", f"SHA256: {DIGITS}", f"sha-256:{DIGITS}", f"sha256:0x{DIGITS}"),
        *(f"blake3_single:{DIGITS}", f"BLAKE3-{DIGITS}", f"AutoV3:{DIGITS}"),
    ],
)
def test_hashes_with_a_prefix(spelling: str) -> None:
    assert file_hash(spelling) == DIGITS.upper()
    for meta in (
        {"Model hash": spelling},
        {"hashes": {"model": spelling}},
        {"positive_prompt": "a", "model": {"name": "base", "hash": spelling}},
        {"resources": [{"type": "model", "hash": spelling}]},
    ):
        made = parse_generation({"prompt": "a cat", "steps": 5, **meta})
        assert made.checkpoints[0].hash == DIGITS.upper()


@pytest.mark.parametrize(
    "other",
    ["md5:" + "ab" * 16, "sha1:" + "ab" * 20, "random:" + "ab" * 16, "sha512:" + "ab" * 64, "0x12",
     "ab" * 33, "xyz", "blake3:", "blake3:blake3:" + DIGITS, None, 7],
)  # fmt: skip
def test_what_is_no_hash_of_the_sites(other: object) -> None:
    assert file_hash(other) is None


def test_embeddings_of_the_sites_generator() -> None:
    resources = [
        {"type": "checkpoint", "modelVersionId": 1},
        {"type": "embed", "modelVersionId": 2, "modelVersionName": "EasyNegative", "weight": 1},
        {"type": "embed", "modelVersionId": 3, "modelVersionName": "v1", "weight": 0.8},
    ]
    made = parse_generation(
        {"prompt": "a cat", "negativePrompt": "easynegative, noise", "civitaiResources": resources}
    )
    assert made.negative_embeddings == (Reference(version_id=2, name="EasyNegative"),)
    assert made.embeddings == (Reference(version_id=3, name="v1", weight=0.8),)
