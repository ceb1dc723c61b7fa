"""The T2I API record: one compact form, one parser, errors that name the field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffagent.schemas.api import T2IAPI, ApiError, Embedding, LoRA, Params, parse_api

text = st.text(min_size=1, max_size=20)
apis = st.builds(
    T2IAPI,
    model=text,
    version=text,
    base_model=text,
    air=st.none() | text,
    loras=st.lists(
        st.builds(LoRA, model=text, version=text, weight=st.floats(-4, 4)), max_size=3
    ).map(tuple),
    embeddings=st.lists(
        st.builds(
            Embedding, model=text, version=text, weight=st.floats(-4, 4), negative=st.booleans()
        ),
        max_size=2,
    ).map(tuple),
    params=st.builds(
        Params,
        sampler=text,
        steps=st.integers(1, 150),
        cfg_scale=st.floats(0, 30),
        width=st.integers(8, 512).map(lambda n: n * 8),
        height=st.integers(8, 512).map(lambda n: n * 8),
        clip_skip=st.integers(1, 12),
        seed=st.none() | st.integers(0, 2**64 - 1),
    ),
    negative_prompt=st.text(max_size=30),
    description=st.none() | st.text(max_size=30),
)

EXAMPLE = (
    '{"model":"DreamShaper","version":"8","type":"Checkpoint","base_model":"SD 1.5",'
    '"loras":[{"model":"Detail","version":"1","weight":0.8}],"params":{"sampler":"DPM++ 2M Karras",'
    '"steps":25,"cfg_scale":7,"width":512,"height":768,"clip_skip":2},"negative_prompt":"blurry"}'
)


@given(apis)
def test_write_then_read_is_the_identity(api: T2IAPI) -> None:
    assert parse_api(api.to_json()) == api
    assert "\n" not in api.to_json()


@given(apis)
def test_key_order_is_fixed_and_response_has_no_lookups(api: T2IAPI) -> None:
    keys = list(json.loads(api.to_json()))
    assert keys == [name for name in T2IAPI.model_fields if name in keys]
    response = json.loads(api.response().to_json())
    assert not {"air", "description"} & response.keys() and "seed" not in response["params"]


def test_example_is_its_own_compact_form() -> None:
    assert parse_api(EXAMPLE).to_json() == EXAMPLE
    spaced = json.dumps(dict(reversed(json.loads(EXAMPLE).items())), indent=2)
    assert parse_api(spaced).to_json() == EXAMPLE


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('"steps":25', '"steps":0', "params.steps"),
        ('"steps":25', '"steps":"many"', "params.steps"),
        ('"width":512', '"width":513', "params.width"),
        ('"weight":0.8', '"weight":9', "loras.0.weight"),
        ('"model":"DreamShaper",', "", "model"),
        ('"version":"8"', '"version":"8","colour":"red"', "colour"),
        ('"type":"Checkpoint"', '"type":"VAE"', "type"),
        ('"version":"8"', '"version":"8","version":"9"', "version"),
        ('"steps":25', '"steps":NaN', "params.steps"),
        ('"cfg_scale":7', '"cfg_scale":Infinity', "params.cfg_scale"),
    ],
)
def test_errors_name_the_field(old: str, new: str, field: str) -> None:
    assert old in EXAMPLE
    with pytest.raises(ApiError) as caught:
        parse_api(EXAMPLE.replace(old, new))
    assert caught.value.field == field


@given(st.text(max_size=200) | st.sampled_from(["[" * 100_000, "null", "[]", EXAMPLE[:-1], ""]))
def test_any_text_is_an_api_or_an_api_error(raw: str) -> None:
    try:
        parse_api(raw)
    except ApiError as error:
        assert str(error)


def test_a_key_that_stands_there_twice_is_found_in_linear_time() -> None:
    """Keys are hashed a few times each, not compared with all others."""
    keys = [f'"{i}":1' for i in range(200_000)]
    with pytest.raises(ApiError, match="199999: key appears twice"):
        parse_api("{" + ",".join([*keys, keys[-1]]) + "}")
