"""Instruction-API pairs as JSON, in the manner of the authors' DABench release.

What is known of that release (DiffAgent, arXiv 2404.01342, and the README of its repository): it
holds "Instruction-API pairs" and "mapping dictionaries to facilitate subsequent model downloads
or API information reconstruction"; a third party's summary names the API's keys Model, Type,
Base Model, Params and Description. Its file names, the keys inside Params and those of the
dictionaries are not known: `PAIR_KEYS`, `API_KEYS` and the names of
`diffagent.schemas.api.Params` are
this project's choice wherever the table below says so, and are written down nowhere else.

A file is one JSON array with a pair a line, so that it can be read as JSON or line by line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from diffagent.errors import SchemaError
from diffagent.schemas.api import ApiError, parse_api
from diffagent.t2i.catalogue import Catalogue, Entry

#: Column of DABENCH -> key of a pair. The words are the authors', their spelling as keys is not
#: known; ``id`` (the picture's, on the site) is ours.
PAIR_KEYS: Mapping[str, str] = {"id": "id", "prompt": "instruction", "api": "API"}

#: Field of ``diffagent.schemas.api.T2IAPI`` -> key of an API.
API_KEYS: Mapping[str, str] = {
    "model": "Model",
    "type": "Type",
    "base_model": "Base Model",
    "params": "Params",
    "description": "Description",
    # The authors' keys end here; what follows is ours, because an API cannot be run without it.
    "version": "Version",
    "air": "AIR",
    "loras": "LoRAs",
    "embeddings": "Embeddings",
    "negative_prompt": "Negative Prompt",
}
_FIELDS: Mapping[str, str] = {key: field for field, key in API_KEYS.items()}
_BRACKETS = (b"[", b"]", b"[]", b"")


def to_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """The pair of a row of DABENCH (its ``id``, ``prompt`` and ``api`` are read)."""
    api = orjson.loads(row["api"])
    known = {key: api.pop(field) for field, key in API_KEYS.items() if field in api}
    pair = {key: row[column] for column, key in PAIR_KEYS.items()}
    pair[PAIR_KEYS["api"]] = known | api
    return pair


def from_pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The row that `to_pair` made a pair of: the columns that a pair determines.

    Raises:
        SchemaError: a key is missing, or the API is none.
    """
    try:
        ident, prompt, record = (pair[PAIR_KEYS[column]] for column in ("id", "prompt", "api"))
        if type(ident) is not int or not isinstance(prompt, str):
            raise SchemaError(f"a pair needs a whole number and a text, got {ident!r}, {prompt!r}")
        text = json.dumps({_FIELDS.get(key, key): value for key, value in record.items()})
        api = parse_api(text)
    except KeyError as error:
        raise SchemaError(f"a pair has no {error}", field=str(error)) from None
    except (ApiError, AttributeError) as error:
        raise SchemaError(f"the API of pair {ident!r} is none: {error}") from None
    return {
        "id": ident,
        "prompt": prompt,
        "api": api.to_json(),
        "model": api.model,
        "version": api.version,
        "base_model": api.base_model,
    }


def read_pairs(path: Path) -> Iterator[dict[str, Any]]:
    """Pairs of a file, a line in memory at a time.

    Raises:
        SchemaError: a line is not one pair.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip().rstrip(b",")
            if text in _BRACKETS:
                continue
            try:
                pair = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise SchemaError(
                    f"{str(path)!r} line {number} is not a pair ({error}): export it again"
                ) from None
            if not isinstance(pair, dict):
                raise SchemaError(f"{str(path)!r} line {number} is not a pair: export it again")
            yield pair


def api_mapping(catalogue: Catalogue) -> dict[str, Any]:
    """Model -> version -> what the catalogue knows of its API: rebuilds one from its names."""
    mapping: dict[str, Any] = {}
    for entry in catalogue.entries:
        mapping.setdefault(entry.model, {})[entry.version] = _api_facts(entry)
    return dict(sorted(mapping.items()))


def _api_facts(entry: Entry) -> dict[str, Any]:
    facts = {key: getattr(entry, field, None) for field, key in API_KEYS.items()}
    return {key: value for key, value in facts.items() if value is not None}
