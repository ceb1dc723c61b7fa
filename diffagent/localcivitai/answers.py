"""Answers of the site's API over the records of a source, without HTTP.

The local server (``diffagent.localcivitai.server``) sends them; ``FolderSite`` returns them to a
caller in the same process. Filters, error bodies and quirks follow the site as of 2026 (its public
source and documentation).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffagent.localcivitai.listing import BadParameter, QueryParameters
from diffagent.localcivitai.replay import PAGE_ONLY_MODEL, PAGE_ONLY_VERSION, Replay
from diffagent.schemas.payloads import PG, as_dict, image_level, objects_in, paid_access

_PREVIEWS, _SHOWCASE = 20, 10
_DISABLED = "The creator of this asset has disabled downloads on this file"
_EARLY = "This asset is in Early Access. You can use Buzz access it now!"
_DOWNLOAD_LINK = re.compile(r"^https?://[^/]+(/api/download/models/.*)$")
_AIR_TYPES = {"LORA": "lora", "LoCon": "lycoris", "TextualInversion": "embedding"}


class ApiFailure(Exception):  # noqa: N818
    """An answer other than 200: status, JSON body and headers."""

    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body
        self.headers = headers or {}


def validation_failure(problem: BadParameter) -> ApiFailure:
    """Return the 400 of the site's validator (zod)."""
    issue = {"code": "custom", "path": [problem.parameter], "message": problem.problem}
    return ApiFailure(400, {"error": {"issues": [issue], "name": "ZodError"}})


def listed_model(replay: Replay, index: int, origin: str, *, adult: bool) -> dict[str, Any]:
    """Return a model as /models lists it: no meta in its previews, no fields of its page."""
    model = replay.model(index)
    for key in PAGE_ONLY_MODEL:
        model.pop(key, None)
    versions = model["modelVersions"]
    if isinstance(versions, list):
        model["modelVersions"] = [
            _version(v, origin, adult=adult, previews=_PREVIEWS, meta=False)
            if isinstance(v, dict)
            else v
            for v in versions
        ]
    return model


def listed_image(
    replay: Replay, index: int, *, meta: bool, nested: bool = False, tags: bool = False
) -> bytes:
    """Return the JSON of an image as /images lists it, spliced from stored JSON.

    Args:
        replay: the records.
        index: place of the image in them.
        meta: with generation metadata, instead of null.
        nested: the metadata as ``{"id": N, "meta": {...}}``, as the site's old path has it.
        tags: with tags.
    """
    metadata = replay.image_meta[index] if meta else b"null"
    if meta and nested:
        metadata = b'{"id":%d,"meta":%s}' % (replay.image_id[index], metadata)
    tag_list = replay.image_tags[index] if tags else b""
    tag_list = b',"tags":' + tag_list if tag_list else b""
    return replay.image_json[index] + tag_list + b',"meta":' + metadata + b"}"


def model_answer(replay: Replay, model_id: int, origin: str) -> dict[str, Any]:
    """Return /models/:id."""
    index = replay.model_index.get(model_id)
    if index is None:
        raise ApiFailure(404, {"error": f"No model with id {model_id}"})
    return listed_model(replay, index, origin, adult=True)


def version_answer(replay: Replay, version_id: int, origin: str) -> dict[str, Any]:
    """Return /model-versions/:id."""
    model, version = _model_of_version(replay, version_id)
    head = {key: model[key] for key in ("name", "type", "nsfw", "poi", "mode") if key in model}
    air = f"urn:air:{_ecosystem(version)}:{_air_type(model, version)}:civitai:"
    answer = {
        "modelId": model["id"],
        "status": "Published",
        "air": f"{air}{model['id']}@{version_id}",
        "model": head,
        **_version(version, origin, adult=True, previews=_SHOWCASE, meta=True),
    }
    for file in objects_in(answer.get("files")):
        file["primary"] = file.get("primary") is True  # here a boolean on every file
    return answer


def version_of_hash(replay: Replay, digest: str) -> int:
    """Return the id of the first published version that has a file with this hash, of any kind."""
    versions = replay.by_hash.get(digest.upper())
    if not versions:
        raise ApiFailure(404, {"error": "Model not found"})
    return min(versions)[1]


def versions_of_hashes(replay: Replay, digests: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return (model id, version id) by upper-case hash; a hash that no file has is left out."""
    versions = {
        digest.upper(): min(rows)[1]
        for digest in digests
        if (rows := replay.by_hash.get(digest.upper()))
    }
    models, index = replay.models, replay.version_model
    return {digest: (models[index[number]].id, number) for digest, number in versions.items()}


def available_file(replay: Replay, version_id: int, choice: QueryParameters) -> dict[str, Any]:
    """Return the file of a version that /api/download would send, if it may be downloaded.

    Args:
        replay: the records.
        version_id: of the version.
        choice: ``fileId``, or ``type``, ``format``, ``size`` and ``fp``, as in the site's links.

    Raises:
        ApiFailure: the file is missing, archived, for sale, or its creator has disabled downloads.
    """
    model, version = _model_of_version(replay, version_id)
    if model.get("mode") == "Archived":
        raise ApiFailure(410, {"error": "Model archived, not available for download"})
    if version.get("usageControl") not in (None, "Download"):
        raise ApiFailure(401, {"error": "Unauthorized", "message": _DISABLED})
    for_sale = paid_access(version, time.strftime("%Y-%m-%d", time.gmtime()))
    if for_sale or version.get("availability") == "EarlyAccess":
        paid = version.get("paidAccess")
        deadline = (
            paid.get("endsAt") if isinstance(paid, dict) else version.get("earlyAccessEndsAt")
        )
        raise ApiFailure(403, {"error": "Early Access", "deadline": deadline, "message": _EARLY})
    file = _chosen_file(version, choice)
    if not file_digest(file):
        raise ApiFailure(404, {"error": "Missing model file"})
    return file


def file_digest(file: dict[str, Any]) -> str:
    """Return the SHA256 of a version's file in lower case, or ''."""
    return str(as_dict(file.get("hashes")).get("SHA256") or "").lower()


def stored_file(replay: Replay, digest: str) -> Path | None:
    """Return the path of the model file with this SHA256, if the source has it."""
    path = replay.files.get(digest)
    return path if path is not None and path.is_file() else None


def _model_of_version(replay: Replay, version_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
    pair = replay.model_of_version(version_id)
    if pair is None:
        raise ApiFailure(404, {"error": "Model not found"})
    return pair


def _version(
    version: dict[str, Any], origin: str, *, adult: bool, previews: int, meta: bool
) -> dict[str, Any]:
    """Make a stored version what REST shows of it: bounded previews, links on ``origin``."""
    for key in PAGE_ONLY_VERSION:
        version.pop(key, None)
    images = version.get("images")
    if images and isinstance(images, list):
        images = objects_in(images)
        shown = [image for image in images if adult or image_level(image) & PG][:previews]
        if not meta:
            for image in shown:
                image.pop("meta", None)
        version["images"] = shown
    for item in (version, *objects_in(version.get("files"))):
        link = item.get("downloadUrl")
        if link and isinstance(link, str):
            item["downloadUrl"] = _DOWNLOAD_LINK.sub(lambda match: origin + match[1], link)
            if item["downloadUrl"].startswith("/"):
                item["downloadUrl"] = origin + item["downloadUrl"]
    return version


def _air_type(model: dict[str, Any], version: dict[str, Any]) -> str:
    kind = str(model.get("type"))
    kind = _AIR_TYPES.get(kind, kind.lower())
    files = {str(file.get("type")) for file in objects_in(version.get("files"))}
    # Weights without text encoder and VAE, since June 2026.
    has_only_diffusion_models = bool(files) and files <= {"Diffusion Model", "UNet"}
    return "diffusionmodel" if kind == "checkpoint" and has_only_diffusion_models else kind


def _ecosystem(version: dict[str, Any]) -> str:
    """Return an AIR's ecosystem: "SD 1.5" is sd1, "SDXL 1.0" sdxl, "Flux.1 D" flux1."""
    base = str(version.get("baseModel")).lower()
    ecosystem = f"sd{base[3:4]}" if base.startswith("sd ") else base.partition(" ")[0]
    return re.sub(r"[^a-z0-9]", "", ecosystem)


def _chosen_file(version: dict[str, Any], choice: QueryParameters) -> dict[str, Any]:
    files = objects_in(version.get("files"))
    file_id = choice.text("fileId")
    if file_id:
        files = [file for file in files if str(file.get("id")) == file_id]
    else:
        if kind := choice.text("type"):
            files = [file for file in files if file.get("type") == kind]
        for name in ("format", "size", "fp"):
            value = choice.text(name)
            if value:
                metadata = ((f, f.get("metadata")) for f in files)
                files = [f for f, m in metadata if isinstance(m, dict) and m.get(name) == value]
    if not files:
        raise ApiFailure(404, {"error": "Missing model file"})
    return next((file for file in files if file.get("primary")), files[0])
