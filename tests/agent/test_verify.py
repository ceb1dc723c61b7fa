"""Verdicts on answers: every kind of hallucination, and no exception for any text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffagent.agent.verify import KINDS, verify
from diffagent.schemas.tables import TRUNCATED
from tests.agent.agent_world import make_catalogue

CATALOGUE = make_catalogue()


def call(**changes: Any) -> dict[str, Any]:
    api: dict[str, Any] = {
        "model": "Inkline",
        "version": "v1.0",
        "type": "Checkpoint",
        "base_model": "SD 1.5",
        "loras": [{"model": "Thick Outlines", "version": "v1", "weight": 0.8}],
        "params": {
            "sampler": "Euler a",
            "steps": 20,
            "cfg_scale": 7,
            "width": 64,
            "height": 64,
            "clip_skip": 1,
        },
        "negative_prompt": "blurry",
    }
    params = changes.pop("params", {})
    return {**api, **changes, "params": {**api["params"], **params}}


def lora(model: str, version: str) -> list[dict[str, Any]]:
    return [{"model": model, "version": version, "weight": 1}]


def test_a_valid_answer_is_completed_from_the_catalogue() -> None:
    verdict = verify(json.dumps(call()), CATALOGUE)
    assert verdict.status == "valid"
    assert verdict.reason is None
    assert verdict.api is not None
    assert verdict.api.air == "urn:air:sd1:checkpoint:civitai:2@102"
    assert verdict.api.description == "Test model Inkline."
    assert verdict.api.response().to_json() == json.dumps(call(), separators=(",", ":"))


def test_an_embedding_of_the_catalogue_is_valid() -> None:
    used = [{"model": "Bad Shapes", "version": "v1", "negative": True}]
    verdict = verify(json.dumps(call(embeddings=used)), CATALOGUE)
    assert verdict.api is not None
    assert verdict.api.embeddings[0].negative
    assert '"embeddings":[{"model":"Bad Shapes"' in verdict.api.to_json()


@pytest.mark.parametrize(
    ("answer", "kind", "field"),
    [
        ("Sure! Here is", "unparsable", ""),
        (json.dumps(call())[:-9], "unparsable", ""),
        ("[" * 100_000, "unparsable", ""),
        ("9" * 5000, "unparsable", ""),
        ("[]", "schema", ""),
        ('{"model":"\\ud800"}', "unparsable", ""),
        (call(params={"steps": "many"}), "schema", "params.steps"),
        (call(params={"steps": True}), "schema", "params.steps"),
        (call(params={"steps": "20"}), "schema", "params.steps"),
        (call(params={"steps": 20.0}), "schema", "params.steps"),
        (call(params={"cfg_scale": True}), "schema", "params.cfg_scale"),
        (call(params={"cfg_scale": "7"}), "schema", "params.cfg_scale"),
        (call(params={"width": "64"}), "schema", "params.width"),
        (call(loras=[{**lora("Thick Outlines", "v1")[0], "weight": "1"}]), "schema", "loras.0"),
        (
            call(embeddings=[{"model": "Bad Shapes", "version": "v1", "negative": 1}]),
            "schema",
            "embeddings.0",
        ),
        (call(negative_prompt=7), "schema", "negative_prompt"),
        (call(air="urn:air:sd1:checkpoint:civitai:9@9"), "wrong_air", "air"),
        (call(air="urn:air:sd1:checkpoint:civitai:2@1023"), "wrong_air", "air"),
        (call(air=""), "wrong_air", "air"),
        (call(air="urn:air:sd1:checkpoint:civitai:2@102+invented"), "wrong_air", "air"),
        (call(air="urn:air:sd1:checkpoint:civitai:2@102.safetensors and more"), "wrong_air", "air"),
        (call(extra=1), "schema", "extra"),
        (json.dumps(call()).replace('"version"', '"model"'), "schema", "model"),
        (call(params={"steps": 0}), "param_out_of_range", "params.steps"),
        (call(params={"cfg_scale": 31}), "param_out_of_range", "params.cfg_scale"),
        (json.dumps(call()).replace(": 7,", ": NaN,"), "param_out_of_range", "params.cfg_scale"),
        (call(params={"width": 65}), "param_out_of_range", "params.width"),
        (call(loras=[{**lora("Thick Outlines", "v1")[0], "weight": 9}]), "param_out_of_range", ""),
        (call(type="LORA"), "wrong_type", "type"),
        (call(model="Thick Outlines", version="v1"), "wrong_type", "model"),
        (call(loras=lora("Inkline", "v1.0")), "wrong_type", "loras.0"),
        (call(model="Ink Line"), "unknown_model", "model"),
        (call(version="v9"), "unknown_version", "version"),
        (call(base_model="SDXL 1.0"), "wrong_base_model", "base_model"),
        (call(loras=lora("Thick Outlines", "v7")), "unknown_lora", "loras.0"),
        (call(loras=lora("Wide Lines", "v1")), "incompatible_lora", "loras.0"),
        (call(embeddings=lora("Bad Shapes", "v7")), "unknown_embedding", "embeddings.0"),
        (call(embeddings=lora("Thick Outlines", "v1")), "wrong_type", "embeddings.0"),
        (call(embeddings=lora("Wide Fog", "v1")), "incompatible_embedding", "embeddings.0"),
        (call(params={"sampler": "Inkline"}), "unknown_sampler", "params.sampler"),
    ],
)
def test_every_kind_of_hallucination_is_told_apart(answer: Any, kind: str, field: str) -> None:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    verdict = verify(text, CATALOGUE)
    assert (verdict.status, verdict.reason, verdict.api) == ("invalid", kind, None)
    assert verdict.detail.startswith(field)
    assert kind in KINDS


@pytest.mark.parametrize("suffix", ["", "+4711", ":vae", ".safetensors"])
def test_a_right_air_is_valid_with_what_names_the_file(suffix: str) -> None:
    air = "urn:air:sd1:checkpoint:civitai:2@102"
    verdict = verify(json.dumps(call(air=air.upper() + suffix)), CATALOGUE)
    assert verdict.api is not None
    assert verdict.api.air == air


WHOLE = json.dumps(call(negative_prompt='tru "quoted" \U0001f600', params={"cfg_scale": 7.25}))


@pytest.mark.parametrize("end", range(1, len(WHOLE)))
def test_an_answer_that_was_cut_anywhere_is_truncated_and_not_unparsable(end: int) -> None:
    verdict = verify(WHOLE[:end], CATALOGUE, ended=False)
    assert (verdict.status, verdict.reason) == ("invalid", TRUNCATED)
    assert verify(WHOLE[:end], CATALOGUE).reason == "unparsable"


@pytest.mark.parametrize(
    "text",
    ["Sure! Here is", WHOLE[:40] + "!" + WHOLE[40:90], '{"model" "version":"', "{} {}", "[1"],
)
def test_what_would_be_no_json_however_long_stays_unparsable(text: str) -> None:
    assert verify(text, CATALOGUE, ended=False).reason == "unparsable"


def test_an_answer_that_is_whole_is_judged_though_its_stop_was_cut_off() -> None:
    assert verify(WHOLE, CATALOGUE, ended=False).status == "valid"
    assert verify("{}", CATALOGUE, ended=False).reason == "schema"


def edits() -> st.SearchStrategy[Callable[[str], str]]:
    whole = json.dumps(call())
    cut = st.integers(0, len(whole)).map(lambda n: lambda text: text[:n])
    put = st.tuples(st.integers(0, len(whole)), st.text(max_size=9)).map(
        lambda at: lambda text: text[: at[0]] + at[1] + text[at[0] :]
    )
    return st.one_of(cut, put)


@given(st.one_of(st.text(), edits().map(lambda edit: edit(json.dumps(call())))))
def test_every_text_has_a_verdict(text: str) -> None:
    verdict = verify(text, CATALOGUE)
    assert (verdict.api is None) == (verdict.status == "invalid")
    assert (verdict.reason in KINDS) == (verdict.status == "invalid")
