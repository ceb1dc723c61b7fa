"""The records that the local server replays: on disk as JSON, in memory as a small index.

They come from a source (``diffagent.civitai.sources``). Keys that begin with ``_`` are annotations:
they are read (``_context`` says which version's showcase held a picture) and never served. Of
several records with one id the first counts: a site has one model of an id.
"""

from __future__ import annotations

import logging
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from schemas.civitai import image_level, model_levels, unwrap_meta

log = logging.getLogger(__name__)

MEDIA = ("image", "video", "audio")
#: Keys of the HTML page that REST never shows.
PAGE_ONLY_MODEL = ("checkpointType", "licenses")
PAGE_ONLY_VERSION = ("settings", "clipSkip", "steps", "epochs", "recommendedResources")


class Spool:
    """Byte strings in an unlinked temporary file: any number of them for a few bytes each."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115  lives with self
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, data: bytes) -> None:
        """Add one at the end."""
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def flush(self) -> None:
        """Make everything appended readable."""
        self._file.flush()

    def __getitem__(self, index: int) -> bytes:
        start, end = self._ends[index], self._ends[index + 1]
        return os.pread(self._file.fileno(), end - start, start)


@dataclass(slots=True)
class ModelRow:
    """What listings filter and sort models by."""

    id: int
    name: str
    type: str
    levels: int
    nsfw: bool
    tags: frozenset[str]
    username: str
    base_models: frozenset[str]
    version_ids: tuple[int, ...]
    checkpoint_type: str | None
    downloads: int
    thumbs: int
    comments: int
    images: int
    earliest: str


@dataclass(slots=True)
class Replay:
    """Everything that the server knows. Indexes of models and images are positions in spools."""

    files: Mapping[str, Path] = field(default_factory=dict)
    models: list[ModelRow] = field(default_factory=list)
    model_json: Spool = field(default_factory=Spool)
    model_index: dict[int, int] = field(default_factory=dict)
    version_model: dict[int, int] = field(default_factory=dict)
    by_hash: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    tags: Counter[str] = field(default_factory=Counter)
    creators: Counter[str] = field(default_factory=Counter)
    image_json: Spool = field(default_factory=Spool)  # without meta and the closing brace
    image_meta: Spool = field(default_factory=Spool)  # JSON of meta, or b"null"
    image_id: array[int] = field(default_factory=lambda: array("q"))
    image_level: array[int] = field(default_factory=lambda: array("B"))
    image_media: array[int] = field(default_factory=lambda: array("B"))
    image_reactions: array[int] = field(default_factory=lambda: array("l"))
    image_comments: array[int] = field(default_factory=lambda: array("l"))
    image_index: dict[int, int] = field(default_factory=dict)
    images_of_version: dict[int, list[int]] = field(default_factory=dict)
    images_of_post: dict[int, list[int]] = field(default_factory=dict)
    images_of_user: dict[str, list[int]] = field(default_factory=dict)
    images_of_base: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        models: Iterable[dict[str, Any]],
        images: Iterable[dict[str, Any]],
        files: Mapping[str, Path] | None = None,
    ) -> Replay:
        """Index the records. ``files`` are model files by their SHA256 in lower case."""
        replay = cls(files=files or {})
        repeated = sum(not replay._add_model(model) for model in models)
        repeated_images = sum(not replay._add_image(image) for image in images)
        for spool in (replay.model_json, replay.image_json, replay.image_meta):
            spool.flush()
        log.info(
            "replaying %d models (%d older records of the same ids left out) and %d images (%d)",
            len(replay.models),
            repeated,
            len(replay.image_id),
            repeated_images,
        )
        return replay

    def model(self, index: int) -> dict[str, Any]:
        """A model as it was read, without annotations."""
        model: dict[str, Any] = orjson.loads(self.model_json[index])
        return model

    def model_of_version(self, version_id: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The model that has a version, and that version."""
        index = self.version_model.get(version_id)
        if index is None:
            return None
        model = self.model(index)
        return model, next(v for v in model["modelVersions"] if v.get("id") == version_id)

    def _add_model(self, record: dict[str, Any]) -> bool:
        model = _plain(record)
        if model["id"] in self.model_index:
            return False
        versions = model["modelVersions"] = [_plain(v) for v in model.get("modelVersions") or ()]
        index = len(self.models)
        stats = model.get("stats") or {}
        username = (model.get("creator") or {}).get("username") or ""
        dates = [v.get("publishedAt") or v.get("createdAt") or "" for v in versions]
        self.models.append(
            ModelRow(
                id=model["id"],
                name=str(model.get("name") or ""),
                type=str(model.get("type")),
                levels=model_levels(model),
                nsfw=model.get("nsfw") is True,
                tags=frozenset(t for t in model.get("tags") or () if isinstance(t, str)),
                username=username,
                base_models=frozenset(str(v.get("baseModel")) for v in versions),
                version_ids=tuple(v["id"] for v in versions),
                checkpoint_type=model.get("checkpointType"),
                downloads=_count(stats, "downloadCount"),
                thumbs=_count(stats, "thumbsUpCount") or _count(stats, "favoriteCount"),
                comments=_count(stats, "commentCount"),
                images=sum(len(v.get("images") or ()) for v in versions),
                earliest=min(filter(None, dates), default=""),
            )
        )
        self.model_index[model["id"]] = index
        self.model_json.append(orjson.dumps(model))
        self.tags.update(self.models[-1].tags)
        if username:
            self.creators[username] += 1
        for version, date in zip(versions, dates, strict=True):
            self.version_model.setdefault(version["id"], index)
            for file in version.get("files") or ():
                for value in (file.get("hashes") or {}).values():
                    if isinstance(value, str):
                        # Duplicates resolve to the earliest published version.
                        self.by_hash.setdefault(value.upper(), []).append((date, version["id"]))
        return True

    def _add_image(self, record: dict[str, Any]) -> bool:
        context = record.get("_context") or {}
        image = _plain(record)
        if image["id"] in self.image_index:
            return False
        # Minors and real persons are never listed.
        if image.get("minor") is True or image.get("poi") is True:
            return True
        meta = image.pop("meta", None)
        if "modelVersionIds" not in image:
            image["modelVersionIds"] = _version_ids(context, meta)
        base = image.get("baseModel") or context.get("baseModel")
        if base:
            image.setdefault("baseModel", base)
            self.images_of_base.setdefault(base, []).append(len(self.image_id))
        index = len(self.image_id)
        self.image_index[image["id"]] = index
        self.image_id.append(image["id"])
        self.image_level.append(image_level(image))
        media = image.get("type")
        self.image_media.append(MEDIA.index(media) if media in MEDIA else 0)
        stats = image.get("stats") or {}
        kinds = ("likeCount", "heartCount", "laughCount", "cryCount")
        self.image_reactions.append(sum(_count(stats, kind) for kind in kinds))
        self.image_comments.append(_count(stats, "commentCount"))
        for version_id in image["modelVersionIds"]:
            self.images_of_version.setdefault(version_id, []).append(index)
        if isinstance(image.get("postId"), int):
            self.images_of_post.setdefault(image["postId"], []).append(index)
        if image.get("username"):
            self.images_of_user.setdefault(image["username"], []).append(index)
        self.image_json.append(orjson.dumps(image)[:-1])
        self.image_meta.append(orjson.dumps(meta))
        return True


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.startswith("_")}


def _version_ids(context: dict[str, Any], meta: Any) -> list[int]:
    resources = (unwrap_meta(meta) or {}).get("civitaiResources")
    used = resources if isinstance(resources, list) else []
    ids = [context.get("modelVersionId")]
    ids += [item.get("modelVersionId") for item in used if isinstance(item, dict)]
    return list(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _count(stats: dict[str, Any], key: str) -> int:
    value = stats.get(key)
    return int(value) if isinstance(value, int | float) else 0
