"""Readers of Civitai's payloads: every field may be absent or of an older form.

The API has changed its forms several times and never versioned them. So these functions read plain
JSON values instead of rejecting them as models would: each accepts every form of a field and
returns one meaning. ``SchemaDrift`` counts unexpected fields, so that a change of the site shows up
in a crawl's metrics instead of in a crash. (Hundreds of thousands of records pass through here:
pydantic models would be too slow.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import orjson

from diffagent.schemas.printable import printable

#: Browsing levels: one bit an image; a model has the union of its images' bits.
PG, PG13, R, X, XXX, BLOCKED = 1, 2, 4, 8, 16, 32
ALL_LEVELS = PG | PG13 | R | X | XXX

_LEVEL_OF_NAME = {
    "none": PG,
    "soft": PG13,
    "mature": R,
    "x": X,
    "xxx": XXX,
    "blocked": BLOCKED,
}


#: Bounds of a record. Of 130,000 real ones none nests deeper than 9 or takes more than 0.7 MB;
#: JSON writers and readers give up between 250 and 1,000 levels, each at another one.
MAX_DEPTH = 100
MAX_RECORD_BYTES = 8 << 20


def whole_number(value: Any) -> int | None:
    """Read an id: an integer in 0 .. 2^63 - 1, also one in quotes; None for any other value."""
    if type(value) is int:
        return value if 0 <= value < 2**63 else None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    return None


def as_dict(value: Any) -> dict[str, Any]:
    """Return an object as it is, and any other value as an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, and any other value as an empty one."""
    return value if isinstance(value, list) else []


def objects_in(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list; none of any other value."""
    return [item for item in as_list(value) if isinstance(item, dict)]


def flaw(item: Any) -> str:
    """Return why a value is no usable record of a model, an image or a page; '' for a record.

    A record is an object with an id, of bounded depth and size, that every part of the project
    can write as JSON. All its other fields may be odd: the readers below are lenient.
    """
    if not isinstance(item, dict):
        return f"no object but {type(item).__name__}"
    if whole_number(item.get("id")) is None:
        return "no id" if item.get("id") is None else "its id is no whole number below 2^63"
    return json_flaw(item)


def json_flaw(value: Any) -> str:
    """Return why a JSON value is not usable: its depth or its size; '' when it is."""
    try:
        text = orjson.dumps(value)
    except TypeError as error:  # too deep for the writer, or a value of a table that JSON lacks
        return _TOO_DEEP if _is_too_deep(value) else f"no JSON ({error})"
    if len(text) > MAX_RECORD_BYTES:
        return f"larger than {MAX_RECORD_BYTES >> 20} MB"
    # Most records have fewer brackets than levels are allowed: those need no walk.
    brackets = text.count(b"[") + text.count(b"{")
    return _TOO_DEEP if brackets > MAX_DEPTH and _is_too_deep(value) else ""


_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for part in level
            if isinstance(part, dict | list)
            for child in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return False
    return True


def level_of(value: Any) -> int | None:
    """Read an nsfw value in any form that the site has used as a browsing level.

    ``True`` is the boolean of early 2023 and means at least R. None: not a level.
    """
    if value is True:
        return R
    if value is False:
        return PG
    if isinstance(value, int) and 0 < value < 64:
        return value
    return _LEVEL_OF_NAME.get(value.lower()) if isinstance(value, str) else None


def image_level(image: Mapping[str, Any]) -> int:
    """Return the browsing level of an image by its most exact field; PG without any."""
    for key in ("browsingLevel", "nsfwLevel", "nsfw"):
        level = level_of(image.get(key))
        if level is not None:
            return level
    return PG


def model_levels(model: Mapping[str, Any]) -> int:
    """Return the union of a model's browsing levels; by its nsfw flag without a bitmask."""
    level = model.get("nsfwLevel")
    if isinstance(level, int) and not isinstance(level, bool) and level > 0:
        return level
    return X if model.get("nsfw") is True else PG


#: The single choice of 2023 included all those before it.
_CHOICES = {
    "Image": ("Image",),
    "Rent": ("Image", "Rent", "RentCivit"),
    "Sell": ("Image", "Rent", "RentCivit", "Sell"),
}


def commercial_use(value: Any) -> tuple[str, ...] | None:
    """Read ``allowCommercialUse``: "Sell" (2023), ["Image", "Rent"] (2024), "{Image,Rent}" (2026).

    Returns:
        Names of the permissions: Image (sell pictures), Rent and RentCivit (let others generate,
        elsewhere and on the site), Sell (the model itself); () for none, None when the site
        states nothing.
    """
    if isinstance(value, str):
        if not value.startswith("{"):
            return _CHOICES.get(value, ())
        value = value.strip("{}").split(",")
    if not isinstance(value, list):
        return None
    names = (name.strip().strip('"') for name in value if isinstance(name, str))
    return tuple(sorted({name for name in names if name and name != "None"}))


def paid_access(version: Mapping[str, Any], day: str) -> str:
    """Return why a version is not free to download on a ``day`` (YYYY-MM-DD); '' when it is.

    Since July 2026 a version may have ``paidAccess: {permanent, endsAt}``, and the older end of an
    early access follows it. On an unknown day ('') an end is taken to lie ahead.
    """
    paid, ends = version.get("paidAccess"), version.get("earlyAccessEndsAt")
    if isinstance(paid, dict):
        if paid.get("permanent") not in (None, False):
            return "paid access"
        ends = paid.get("endsAt")
    elif paid not in (None, False):
        return "paid access"
    if ends in (None, "", False):
        return ""
    return "early access" if not isinstance(ends, str) or ends > day else ""


def unwrap_meta(meta: Any) -> dict[str, Any] | None:
    """Return generation metadata as a flat dict: ``{"id": N, "meta": {...}}`` is opened."""
    while isinstance(meta, dict) and "id" in meta and "meta" in meta:
        meta = meta["meta"]
    return meta if isinstance(meta, dict) else None


#: Our annotation of every model, version and image of a snapshot: the number of the crawl that
#: added it (0: the first one). Where it is missing, it is 0.
GENERATION = "_generation"


def versions_of(model: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the versions of a model by id; those without an id are left out."""
    versions = {}
    for version in objects_in(model.get("modelVersions")):
        ident = whole_number(version.get("id"))
        if ident is not None:
            versions[ident] = version
    return versions


def generation_of(item: Mapping[str, Any]) -> int:
    """Return the number of the crawl that added an item of a snapshot."""
    number = item.get(GENERATION)
    return number if type(number) is int and number >= 0 else 0


#: Name of the tombstones among the kinds of rows in a snapshot.
GONE = "gone"

#: Fields that move without a change of content: counters, the decoration of a card, the time of a
#: file's last scan (its results count as content), and our own annotation.
VOLATILE = frozenset({"stats", "rank", "cosmetic", "scannedAt", GENERATION})


def content(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model, version or image without ``VOLATILE`` fields, also in its versions and files.

    Two records are the same when their contents are. Generation metadata stays as it is.
    """
    steady: dict[str, Any] = _steady_version(dict(item))
    versions = steady.get("modelVersions")
    if isinstance(versions, list):
        steady["modelVersions"] = [_steady_version(version) for version in versions]
    return steady


def _steady(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    return {key: value for key, value in item.items() if key not in VOLATILE}


def _steady_version(version: Any) -> Any:
    steady = _steady(version)
    for part in ("files", "images"):
        if isinstance(steady, dict) and isinstance(steady.get(part), list):
            steady[part] = [_steady(item) for item in steady[part]]
    return steady


_TEXT, _NUMBER, _WHOLE, _FLAG = (str,), (int, float), (int,), (bool,)
_LIST, _MAP, _MAYBE = (list,), (dict,), type(None)

#: Known fields and their types. ``None`` is allowed where the site sends it.
MODEL_FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "id": _WHOLE,
        "name": _TEXT,
        "description": (str, _MAYBE),
        "type": _TEXT,
        "nsfw": _FLAG,
        "nsfwLevel": _WHOLE,
        "availability": _TEXT,
        "mode": (str, _MAYBE),
        "poi": _FLAG,
        "minor": _FLAG,
        "sfwOnly": _FLAG,
        "supportsGeneration": _FLAG,
        "allowNoCredit": _FLAG,
        "allowCommercialUse": (str, list, _MAYBE),
        "allowDerivatives": _FLAG,
        "allowDifferentLicense": _FLAG,
        "cosmetic": (dict, _MAYBE),
        "stats": _MAP,
        "creator": (dict, _MAYBE),
        "tags": _LIST,
        "modelVersions": _LIST,
    }
)
VERSION_FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "id": _WHOLE,
        "index": _WHOLE,
        "name": _TEXT,
        "modelId": _WHOLE,
        "baseModel": _TEXT,
        "baseModelType": (str, _MAYBE),
        "description": (str, _MAYBE),
        "trainedWords": _LIST,
        "publishedAt": (str, _MAYBE),
        "createdAt": _TEXT,
        "updatedAt": _TEXT,
        "availability": _TEXT,
        "status": _TEXT,
        "uploadType": _TEXT,
        "usageControl": _TEXT,
        "trainingStatus": (str, _MAYBE),
        "trainingDetails": (dict, _MAYBE),
        "air": _TEXT,
        "nsfwLevel": _WHOLE,
        "supportsGeneration": _FLAG,
        "stats": _MAP,
        "files": _LIST,
        "images": _LIST,
        "downloadUrl": (str, _MAYBE),
        "earlyAccessTimeFrame": (int, _MAYBE),
        "earlyAccessEndsAt": (str, _MAYBE),
        "earlyAccessConfig": (dict, _MAYBE),
        "paidAccess": (dict, bool, _MAYBE),
    }
)
FILE_FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "id": _WHOLE,
        "name": _TEXT,
        "type": _TEXT,
        "sizeKB": _NUMBER,
        "metadata": (dict, _MAYBE),
        "pickleScanResult": (str, _MAYBE),
        "pickleScanMessage": (str, _MAYBE),
        "virusScanResult": (str, _MAYBE),
        "virusScanMessage": (str, _MAYBE),
        "scannedAt": (str, _MAYBE),
        "hashes": _MAP,
        "downloadUrl": _TEXT,
        "primary": _FLAG,
    }
)
IMAGE_FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "id": _WHOLE,
        "url": (str, _MAYBE),
        "hash": (str, _MAYBE),
        "width": (int, _MAYBE),
        "height": (int, _MAYBE),
        "type": _TEXT,
        "nsfw": (str, bool),
        "nsfwLevel": (str, int),
        "browsingLevel": _WHOLE,
        "createdAt": _TEXT,
        "postId": (int, _MAYBE),
        "username": (str, _MAYBE),
        "baseModel": (str, _MAYBE),
        "modelVersionIds": _LIST,
        "stats": _MAP,
        "meta": (dict, _MAYBE),
        "tags": _LIST,
        "minor": _FLAG,
        "poi": _FLAG,
        "hasMeta": _FLAG,
        "hasPositivePrompt": _FLAG,
        "onSite": _FLAG,
        "remixOfId": (int, _MAYBE),
    }
)


#: Required fields of each kind, and the known values of the site's enumerations (``baseModel`` is
#: none of them: its names are free and grow).
_REQUIRED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model": ("id", "name", "type", "modelVersions"),
        "version": ("id", "files"),
        "file": ("id",),
        "image": ("id", "url"),
    }
)
MODEL_TYPES = (
    *("Checkpoint", "TextualInversion", "Hypernetwork", "AestheticGradient", "LORA", "LoCon"),
    *("DoRA", "Controlnet", "Upscaler", "MotionModule", "VAE", "TextEncoder", "UNet", "CLIPVision"),
    *("Poses", "Wildcards", "Workflows", "ComfyWorkflows", "Detection", "VisionLanguage", "CLIP"),
    *("LLM", "Other"),
)
_AVAILABILITY = ("Public", "Unsearchable", "Private", "EarlyAccess")
_VALUES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "model": {
            "type": MODEL_TYPES,
            "mode": ("Archived", "TakenDown"),
            "availability": _AVAILABILITY,
        },
        "version": {
            "availability": _AVAILABILITY,
            "baseModelType": ("Standard", "Inpainting", "Refiner", "Pix2Pix"),
            "usageControl": (
                *("Download", "Generation", "InternalGeneration", "ExternalGeneration"),
            ),
        },
        "file": {
            "pickleScanResult": ("Pending", "Success", "Danger", "Error"),
            "virusScanResult": ("Pending", "Success", "Danger", "Error"),
        },
        "image": {
            "type": ("image", "video", "audio"),
            "nsfwLevel": ("None", "Soft", "Mature", "X", "XXX", "Blocked"),
        },
    }
)
_MAX_DRIFT = 1000  # a site that sends random keys does not fill the manifest


class SchemaDrift:
    """Counts of unexpected fields: new ones, missing ones, and new types or values.

    Attributes:
        counts: number of each, e.g. of 'model.stats: str', 'image.newField: unknown',
            'model.type: missing' or "model.type: new value 'Hologram'".
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def model(self, model: Any) -> None:
        """Count the fields of a model with its versions and files."""
        self._fields("model", model, MODEL_FIELDS)
        for version in as_list(as_dict(model).get("modelVersions")):
            self._fields("version", version, VERSION_FIELDS)
            for file in as_list(as_dict(version).get("files")):
                self._fields("file", file, FILE_FIELDS)

    def image(self, image: Any) -> None:
        """Count the fields of an image."""
        self._fields("image", image, IMAGE_FIELDS)

    def report(self) -> dict[str, int]:
        """Return the counts in a stable order."""
        return dict(sorted(self.counts.items()))

    def _fields(self, kind: str, item: Any, fields: Mapping[str, tuple[type, ...]]) -> None:
        if not isinstance(item, dict):
            self._count(f"{kind}: {type(item).__name__}")
            return
        values = _VALUES[kind]
        for key, value in item.items():
            if key == GENERATION:
                continue
            types = fields.get(key)
            if types is None:
                self._count(f"{kind}.{printable(key[:40])}: unknown")
            elif type(value) not in types:
                self._count(f"{kind}.{key}: {type(value).__name__}")
            elif key in values and isinstance(value, str) and value not in values[key]:
                self._count(f"{kind}.{key}: new value {value[:40]!r}")
        for key in _REQUIRED[kind]:
            if key not in item:
                self._count(f"{kind}.{key}: missing")

    def _count(self, observation: str) -> None:
        full = len(self.counts) >= _MAX_DRIFT and observation not in self.counts
        self.counts["others" if full else observation] += 1


def canonical(item: Any) -> bytes:
    """Return the one byte string of a JSON value: sorted keys, no spaces, UTF-8, no newline."""
    return orjson.dumps(item, option=orjson.OPT_SORT_KEYS)
