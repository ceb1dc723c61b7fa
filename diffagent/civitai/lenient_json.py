"""Reader of JSON from untrusted sources: one odd value does not make a page unreadable."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import orjson

from diffagent.errors import ServerError
from diffagent.schemas.payloads import MAX_DEPTH

#: Deeper than a record may be, so that a record which was cut is still too deep to be kept.
_CUT_DEPTH = 2 * MAX_DEPTH
#: Whole texts, since brackets in them nest nothing, and runs of brackets.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[{]+|[\]}]+', re.DOTALL)


def loads(data: bytes) -> Any:
    """Read JSON; values that JSON lacks are replaced.

    NaN, infinities and numbers beyond a double become null, lone surrogates and bytes that are no
    UTF-8 a replacement character, integers beyond 64 bits doubles. Parts that are nested deeper
    than any record may be become null.

    Raises:
        ValueError: the text ends early or is no JSON.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    text = _without_depths(data).decode("utf-8-sig", "replace")
    value = json.loads(
        text, strict=False, parse_constant=lambda _: None, parse_float=_float, parse_int=_int
    )
    return orjson.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def parse_json(body: bytes, source: str) -> Any:
    """Read the JSON of an answer or a file as ``loads`` does.

    Raises:
        ServerError: the text of ``source`` ends early or is no JSON.
    """
    try:
        return loads(body)
    except ValueError as error:
        raise ServerError(f"{source}: {len(body)} bytes that are no JSON ({error})") from None


def _float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _int(text: str) -> int | float | None:
    return int(text) if len(text) < 20 else _float(text)  # int() refuses thousands of digits


def _without_depths(data: bytes) -> bytes:
    """Replace each array and object that is nested too deeply by null."""
    depth, start, done, parts = 0, 0, 0, []
    for token in _TOKEN.finditer(data):
        kind = token[0][:1]
        if kind == b'"':
            continue
        step = len(token[0]) if kind in b"[{" else -len(token[0])
        if depth <= _CUT_DEPTH < depth + step:
            start = token.start() + _CUT_DEPTH - depth
        elif depth + step <= _CUT_DEPTH < depth:
            parts += [data[done:start], b"null"]
            done = token.start() + depth - _CUT_DEPTH
        depth += step
    if depth > _CUT_DEPTH:
        raise ValueError("it ends within an array or object")
    return b"".join([*parts, data[done:]])
