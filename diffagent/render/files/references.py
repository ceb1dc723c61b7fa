"""What people write for a model file: an AIR, a version's id or page, a hash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from diffagent.civitai.site import Site
from diffagent.errors import ConfigError, NotFound, RenderError
from diffagent.schemas.payloads import whole_number
from diffagent.t2i.catalogue import WEIGHT_TYPES, Entry, choose_file, make_entry

_AIR = re.compile(
    r"(?:urn:)?(?:air:)?(?:[\w.-]+:){0,2}civitai:(?P<model>\d{1,15})"
    r"(?:@(?P<version>\d{1,15}))?(?:\+(?P<file>\d{1,15}))?(?::[\w-]+)?(?:\.\w+)?",
    re.IGNORECASE | re.ASCII,
)
#: Lengths of AutoV1 and CRC32, AutoV2, AutoV3, and of SHA256 and BLAKE3.
_HASH = re.compile(r"[0-9a-f]{8}|[0-9a-f]{10}|[0-9a-f]{12}|[0-9a-f]{64}", re.IGNORECASE)
_PAGE = re.compile(r"/(?:api/download/)?model(?:s|-versions)/(\d{1,15})(?!\d)", re.ASCII)
_FORMS = (
    "an AIR (urn:air:sdxl:checkpoint:civitai:MODEL@VERSION), the id of a version, a page's address "
    "(.../models/MODEL?modelVersionId=VERSION) or a hash (AutoV1, AutoV2, AutoV3, SHA256, ...; "
    "hash:DIGITS when it has digits alone)"
)


@dataclass(frozen=True)
class Reference:
    """One of ``version``, ``model`` (its newest version) and ``digest``; ``file`` narrows it."""

    version: int | None = None
    model: int | None = None
    digest: str | None = None
    file: int | None = None


def parse_reference(text: str) -> Reference:
    """Read what people write.

    Raises:
        ConfigError: it is none of the forms known here.
    """
    text = text.strip()
    if air := _AIR.fullmatch(text):
        version, file = air["version"], air["file"]
        return Reference(
            version=int(version) if version else None,
            model=int(air["model"]),
            file=int(file) if file else None,
        )
    if text.isascii() and text.isdigit() and len(text) < 16:
        return Reference(version=int(text))
    digest = text.removeprefix("hash:")
    if _HASH.fullmatch(digest):
        return Reference(digest=digest.lower())
    try:
        parts = urlsplit(text)
    except ValueError as error:  # such as 'http://['
        raise ConfigError(f"{text!r} is no address ({error}), nor {_FORMS}") from None
    if page := _PAGE.match(parts.path) if parts.scheme in ("http", "https") else None:
        values = {name: whole_number(v[0]) for name, v in parse_qs(parts.query).items()}
        query = {name: number for name, number in values.items() if number is not None}
        number, version_page = int(page[1]), "/models/" not in parts.path or "/api/" in parts.path
        version_id = number if version_page else query.get("modelVersionId")
        return Reference(
            version=version_id,
            model=None if version_page else number,
            file=query.get("fileId"),
        )
    raise ConfigError(f"{text!r} is not {_FORMS}")


def find(site: Site, text: str, *, require_scans: bool = True) -> Entry:
    """The file that a reference means, as a row of a catalogue that the store can fetch.

    Args:
        site: is asked.
        text: see `parse_reference`.
        require_scans: refuse what did not pass both of the site's scans.

    Raises:
        ConfigError: it cannot be read.
        NotFound: the site does not know it, or has no such file.
        RenderError: there is no file that may be loaded; reason 'bad-model-file'.
    """
    wanted = parse_reference(text)
    answer = _version(site, wanted, text)
    files = [file for file in answer.get("files") or () if isinstance(file, dict)]
    if wanted.file is not None:
        files = [file for file in files if file.get("id") == wanted.file]
    if wanted.digest is not None:
        files = [file for file in files if wanted.digest in _hashes(file)]
    about = answer.get("model")
    model = {"type": "Other", **(about if isinstance(about, dict) else {})}
    model["id"] = answer.get("modelId", wanted.model) or 0
    name = f"{text!r} ({model.get('name')!r}, version {answer.get('name')!r})"
    if not files:
        raise NotFound(f"{name} has no such file")
    named = wanted.file is not None or wanted.digest is not None
    types = None if named else WEIGHT_TYPES
    file, why = choose_file(files, require_scans=require_scans, types=types)
    if file is None:
        if why == "scan not passed":
            why += f": {'; '.join(map(_scans, files))}; --allow-unscanned takes it all the same"
        raise RenderError(f"{name} is refused: {why}", reason="bad-model-file")
    return make_entry(model, {"baseModel": "", **answer}, file)


def _version(site: Site, wanted: Reference, text: str) -> Mapping[str, Any]:
    """The answer of /model-versions."""
    version = wanted.version
    if wanted.digest is not None:
        return site.get_by_hash(wanted.digest)
    if version is None:
        assert wanted.model is not None
        versions = site.get_model(wanted.model).get("modelVersions") or ()
        version = next((whole_number(v.get("id")) for v in versions if isinstance(v, dict)), None)
    if version is None:
        raise NotFound(f"{text!r}: the model has no version")
    answer = site.get_version(version)
    if wanted.model not in (None, answer.get("modelId")):
        raise NotFound(
            f"{text!r}: version {version} is of model {answer.get('modelId')}, not {wanted.model}"
        )
    return answer


def _hashes(file: Mapping[str, Any]) -> set[str]:
    hashes = file.get("hashes")
    return {str(v).lower() for v in hashes.values()} if isinstance(hashes, dict) else set()


def _scans(file: Mapping[str, Any]) -> str:
    """What the scans of a file found."""
    found = []
    for kind in ("pickle", "virus"):
        message = file.get(f"{kind}ScanMessage")
        said = f" ({str(message)[:100]})" if message else ""
        found.append(f"{kind} scan {file.get(f'{kind}ScanResult')!r}{said}")
    return f"{str(file.get('name'))[:80]!r}: {', '.join(found)}"
