"""Payloads of every age of the API have one meaning; what is new is counted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffagent.schemas import payloads

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "meta", "files", "modelVersions", "nsfw", "x"]), children
        )
    ),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("image", "level"),
    [
        ({"nsfw": False}, 1),
        ({"nsfw": True}, 4),
        ({"nsfw": "Soft"}, 2),
        ({"nsfw": False, "nsfwLevel": "Mature"}, 4),
        ({"nsfw": True, "nsfwLevel": "X", "browsingLevel": 16}, 16),
        ({"nsfwLevel": 8}, 8),
        ({"nsfwLevel": "Blocked"}, 32),
        ({"nsfwLevel": "a new name"}, 1),
        ({}, 1),
    ],
)
def test_image_level(image, level):
    assert payloads.image_level(image) == level


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("Sell", ("Image", "Rent", "RentCivit", "Sell")),
        ("Rent", ("Image", "Rent", "RentCivit")),
        ("None", ()),
        (["RentCivit", "Image"], ("Image", "RentCivit")),
        ("{Image,RentCivit}", ("Image", "RentCivit")),
        ("{}", ()),
        (None, None),
        (True, None),
    ],
)
def test_commercial_use_has_three_shapes(value, names):
    assert payloads.commercial_use(value) == names


def test_meta_is_unwrapped_only_where_it_is_wrapped():
    flat = {"prompt": "x", "id": 3}
    assert payloads.unwrap_meta(flat) == flat
    assert payloads.unwrap_meta({"id": 1, "meta": flat}) == flat
    assert payloads.unwrap_meta({"id": 1, "meta": {"id": 2, "meta": flat}}) == flat
    assert payloads.unwrap_meta({"id": 1, "meta": None}) is None
    assert payloads.unwrap_meta(["x"]) is None


def test_drift_names_new_fields_and_new_types():
    drift = payloads.SchemaDrift()
    version = {"id": 1, "files": [{"id": "7"}], "colour": 1}
    drift.model({"id": 1, "name": None, "modelVersions": [version, 5]})
    drift.model({"id": 1, "name": "x", "type": "Hologram", "modelVersions": []})
    drift.image({"url": "x"})
    drift.image("text")
    assert drift.report() == {
        "file.id: str": 1,
        "image.id: missing": 1,
        "image: str": 1,
        "model.name: NoneType": 1,
        "model.type: missing": 1,
        "model.type: new value 'Hologram'": 1,
        "version.colour: unknown": 1,
        "version: int": 1,
    }


def test_drift_of_a_site_gone_mad_stays_small():
    drift = payloads.SchemaDrift()
    for number in range(3000):
        drift.image({"id": 1, "url": "x", f"field{number}": 1})
    assert len(drift.report()) <= 1001
    assert sum(drift.report().values()) == 3000


def test_counters_are_no_content():
    stats = {"stats": {"downloadCount": 1}}
    file = {"id": 3, "scannedAt": "2024", "pickleScanResult": "Success"}
    version = {"id": 2, **stats, "files": [file], "images": [{"id": 4, **stats}]}
    image = {"id": 5, **stats, "meta": {"stats": "a key of generation metadata"}}
    assert payloads.content({"id": 1, **stats, "cosmetic": {}, "modelVersions": [version, 7]}) == {
        "id": 1,
        "modelVersions": [
            {"id": 2, "files": [{"id": 3, "pickleScanResult": "Success"}], "images": [{"id": 4}]},
            7,
        ],
    }
    assert payloads.content(image) == {"id": 5, "meta": {"stats": "a key of generation metadata"}}


@pytest.mark.parametrize(
    ("value", "number"),
    [(7, 7), ("7", 7), ("", None), ("7.0", None), (True, None), ("9" * 30, None), (None, None)],
)
def test_ids_may_be_in_quotes(value, number):
    assert payloads.whole_number(value) == number


@given(JSON)
def test_no_payload_crashes_a_reader(value):
    drift = payloads.SchemaDrift()
    drift.model(value)
    drift.image(value)
    if isinstance(value, dict):
        payloads.content(value)
    payloads.unwrap_meta(value)
    payloads.commercial_use(value)
    payloads.level_of(value)
    if isinstance(value, dict):
        payloads.image_level(value)
        payloads.model_levels(value)


@given(JSON)
def test_canonical_json_is_one_line_and_keeps_the_value(value):
    text = payloads.canonical(value)
    assert b"\n" not in text
    assert json.loads(text) == value
