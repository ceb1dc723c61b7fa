"""Values of an open bag: text, numbers, sizes and hashes, whatever JSON holds them.

Every function takes any JSON, never raises, and takes time linear in its length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

Bag = Mapping[str, Any]

_INTEGER = re.compile(r"\s*([+-]?\d{1,20})\b")
_SIZE = re.compile(r"\s*\(?(\d{1,5})\s?[x×,*]\s?(\d{1,5})\b", re.I)
#: Algorithms whose digests the site lists, as programs write them before a digest. One of any
#: other (InvokeAI's "md5:", "random:") is the digest of nothing that can be looked up.
_HASH = re.compile(
    r"(?:(?:sha-?256|blake3(?:_single|_multi)?|auto-?v[123]|crc-?32)\s?[:=-]\s?)?"
    r"(?:0x)?([0-9a-f]{8,64})\Z",
    re.I,
)
_DECIMAL_COMMA = re.compile(r"\s*([+-]?\d{0,9}),(\d{1,9})\s*\Z")
_AIR = re.compile(r"urn:air:[^:]*:(?P<type>[^:]*):civitai:\d+@(?P<version>\d{1,15})")
# A string, closed or not, or a word of JavaScript that JSON lacks. A string matches wherever a
# quotation mark is, so that no part of the text is read twice.
_UNDEFINED = re.compile(r'"(?:[^"\\]++|\\.?)*+"?|\bundefined\b', re.S)


def first(bag: Bag, *keys: str) -> Any:
    """The value of the first key that has one."""
    for key in keys:
        value = bag.get(key)
        if value is not None and value != "":
            return value
    return None


def text(value: object) -> str | None:
    """Text as UTF-8 can hold it (a lone surrogate cannot be stored), or None."""
    if not isinstance(value, str):
        return None
    if not value.isascii():
        value = value.encode("utf-8", "replace").decode()
    return value.replace("\0", "").strip() or None


def number(value: object) -> float | None:
    """A finite number from a number or the text of one. Some write it with a comma: ``7,5``."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and (match := _DECIMAL_COMMA.match(value)):
        value = f"{match.group(1)}.{match.group(2)}"
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def integer(value: object) -> int | None:
    """An integer from a number or from text that begins with one ("2," is seen in the wild)."""
    if isinstance(value, str):
        match = _INTEGER.match(value)
        return int(match.group(1)) if match else None
    found = number(value)
    if found is None or found != int(found):
        return None
    return value if isinstance(value, int) else int(found)


def size(value: object) -> tuple[int, int] | None:
    """(width, height) in pixels of ``512x768``, ``(512, 768)`` or ``832x1216 (0.68)``."""
    match = _SIZE.match(value) if isinstance(value, str) else None
    return (int(match.group(1)), int(match.group(2))) if match else None


def file_hash(value: object) -> str | None:
    """A file's hash of 8 to 64 digits in upper case, without what is before it, or None."""
    match = _HASH.match(value.strip()) if isinstance(value, str) else None
    return match.group(1).upper() if match else None


def weight(value: object) -> float:
    """A network's strength; 1 when it is not said."""
    found = number(value)
    return 1.0 if found is None else round(found, 4)


def air(value: object, kinds: frozenset[str]) -> int | None:
    """The version id of an AIR (``urn:air:sdxl:lora:civitai:1@2``) of one of the kinds."""
    match = _AIR.search(value) if isinstance(value, str) and "urn:air:" in value else None
    return int(match.group("version")) if match and match.group("type") in kinds else None


def items(value: object) -> Iterator[Bag]:
    """The objects of a list."""
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else _NONE


_NONE: Iterator[Bag] = iter(())


def mapping(value: object) -> Bag:
    """The object, or an empty one."""
    return value if isinstance(value, dict) else {}


def load_json(value: object) -> object:
    """JSON from text that may hold NaN and undefined, as JavaScript leaves them; None if not.

    What is no text is returned as it is.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        pass
    cleaned = _UNDEFINED.sub(lambda m: "null" if m.group() == "undefined" else m.group(), value)
    try:
        return json.loads(cleaned, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
