"""SourceRecords of a source as a site would have them: on disk as JSON, in memory as a small index.

They come from a source (``diffagent.localcivitai.sources``). Keys that begin with ``_`` are
annotations: they are read (``_context`` names the version whose showcase held a picture) and never
served. Of several records with one id the first counts, since a site has one model of an id.
"""

from __future__ import annotations

import logging
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from diffagent.localcivitai.sources import UnreadableRecord
from diffagent.schemas.payloads import (
    as_dict,
    as_list,
    flaw,
    image_level,
    model_levels,
    objects_in,
    unwrap_meta,
    whole_number,
)

log = logging.getLogger(__name__)

MEDIA = ("image", "video", "audio")
#: Keys of the HTML page that REST never shows.
PAGE_ONLY_MODEL = ("checkpointType", "licenses")
_MOST = 2**53  # sums of a few such numbers still fit in 64 bits
PAGE_ONLY_VERSION = ("settings", "clipSkip", "steps", "epochs", "recommendedResources")


class Spool:
    """Byte strings in an unlinked temporary file; each takes a few bytes of memory."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115  lives with self
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, data: bytes) -> None:
        """Add a byte string at the end."""
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def flush(self) -> None:
        """Make all appended byte strings readable."""
        self._file.flush()

    def __getitem__(self, index: int) -> bytes:
        start, end = self._ends[index], self._ends[index + 1]
        return os.pread(self._file.fileno(), end - start, start)


@dataclass(slots=True)
class ModelRow:
    """Fields of a model by which listings filter and sort."""

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
    """Index of a source's records. Indexes of models and images are positions in the spools."""

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
    image_tags: Spool = field(default_factory=Spool)  # JSON of tags, or b"" without
    drops: dict[str, Counter[str]] = field(default_factory=dict)  # kind -> reason -> number
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
        models: Iterable[Any],
        images: Iterable[Any],
        files: Mapping[str, Path] | None = None,
    ) -> Replay:
        """Index the records; other values are counted in ``drops``.

        Args:
            models: JSON values, or ``UnreadableRecord``.
            images: the same.
            files: model files by their SHA256 in lower case.
        """
        replay = cls(files=files or {})
        repeated = sum(not replay._add_model(m) for m in replay._records("models", models))
        repeated_images = sum(not replay._add_image(i) for i in replay._records("images", images))
        for spool in (replay.model_json, replay.image_json, replay.image_meta, replay.image_tags):
            spool.flush()
        for kind, reasons in replay.drops.items():
            log.warning("%d %s left out: %s", reasons.total(), kind, dict(reasons))
        log.info(
            "read %d models (%d repeated ids left out) and %d images (%d repeated ids left out)",
            len(replay.models),
            repeated,
            len(replay.image_id),
            repeated_images,
        )
        return replay

    def model(self, index: int) -> dict[str, Any]:
        """Return a model as it was read, without annotations."""
        model: dict[str, Any] = orjson.loads(self.model_json[index])
        return model

    def model_of_version(self, version_id: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the model of a version, and that version."""
        index = self.version_model.get(version_id)
        if index is None:
            return None
        model = self.model(index)
        return model, next(v for n, v in _versions(model) if n == version_id)

    def _records(self, kind: str, records: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Yield the records, their ids as numbers; count other values."""
        for record in records:
            reason = record.reason if isinstance(record, UnreadableRecord) else flaw(record)
            if reason:
                self.drops.setdefault(kind, Counter())[reason] += 1
            else:
                yield {**record, "id": whole_number(record["id"])}

    def _add_model(self, record: dict[str, Any]) -> bool:
        model = _plain(record)
        if model["id"] in self.model_index:
            return False
        raw = model.get("modelVersions") or []
        if isinstance(raw, list):
            raw = [_plain(version) if isinstance(version, dict) else version for version in raw]
        model["modelVersions"] = raw
        versions = _versions(model)
        index = len(self.models)
        stats, username = as_dict(model.get("stats")), as_dict(model.get("creator")).get("username")
        dates = [_text(v.get("publishedAt")) or _text(v.get("createdAt")) for _, v in versions]
        self.models.append(
            ModelRow(
                id=model["id"],
                name=str(model.get("name") or ""),
                type=str(model.get("type")),
                levels=model_levels(model),
                nsfw=model.get("nsfw") is True,
                tags=frozenset(t for t in as_list(model.get("tags")) if isinstance(t, str)),
                username=_text(username),
                base_models=frozenset(str(v.get("baseModel")) for _, v in versions),
                version_ids=tuple(number for number, _ in versions),
                checkpoint_type=_text(model.get("checkpointType")) or None,
                downloads=_count(stats, "downloadCount"),
                thumbs=_count(stats, "thumbsUpCount") or _count(stats, "favoriteCount"),
                comments=_count(stats, "commentCount"),
                images=sum(len(as_list(v.get("images"))) for _, v in versions),
                earliest=min(filter(None, dates), default=""),
            )
        )
        self.model_index[model["id"]] = index
        self.model_json.append(orjson.dumps(model))
        self.tags.update(self.models[-1].tags)
        if self.models[-1].username:
            self.creators[self.models[-1].username] += 1
        for (number, version), date in zip(versions, dates, strict=True):
            self.version_model.setdefault(number, index)
            for file in as_list(version.get("files")):
                for value in as_dict(as_dict(file).get("hashes")).values():
                    if isinstance(value, str):
                        # Duplicates resolve to the earliest published version.
                        key = (date or _UNDATED, number)
                        self.by_hash.setdefault(value.upper(), []).append(key)
        return True

    def _add_image(self, record: dict[str, Any]) -> bool:
        context = as_dict(record.get("_context"))
        image = _plain(record)
        if image["id"] in self.image_index:
            return False
        # Minors and real persons are never listed.
        if image.get("minor") is True or image.get("poi") is True:
            return True
        meta = image.pop("meta", None)
        tags = orjson.dumps(image.pop("tags")) if "tags" in image else b""
        if "modelVersionIds" not in image:
            image["modelVersionIds"] = _version_ids(context, meta)
        base = image.get("baseModel") or context.get("baseModel")
        if base:
            image.setdefault("baseModel", base)
        if isinstance(base, str):
            self.images_of_base.setdefault(base, []).append(len(self.image_id))
        index = len(self.image_id)
        self.image_index[image["id"]] = index
        self.image_id.append(image["id"])
        self.image_level.append(image_level(image))
        media = image.get("type")
        self.image_media.append(MEDIA.index(media) if media in MEDIA else 0)
        stats = as_dict(image.get("stats"))
        kinds = ("likeCount", "heartCount", "laughCount", "cryCount")
        self.image_reactions.append(sum(_count(stats, kind) for kind in kinds))
        self.image_comments.append(_count(stats, "commentCount"))
        for version_id in set(map(whole_number, as_list(image["modelVersionIds"]))):
            if version_id is not None:
                self.images_of_version.setdefault(version_id, []).append(index)
        if isinstance(image.get("postId"), int):
            self.images_of_post.setdefault(image["postId"], []).append(index)
        if username := _text(image.get("username")):
            self.images_of_user.setdefault(username, []).append(index)
        self.image_json.append(orjson.dumps(image)[:-1])
        self.image_meta.append(orjson.dumps(meta))
        self.image_tags.append(tags)
        return True


#: Sorts behind every date.
_UNDATED = "9999"


def _versions(model: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Return the versions of a model that have an id, each with its id."""
    versions = objects_in(model.get("modelVersions"))
    numbered = ((whole_number(version.get("id")), version) for version in versions)
    return [(number, version) for number, version in numbered if number is not None]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.startswith("_")}


def _version_ids(context: dict[str, Any], meta: Any) -> list[int]:
    resources = objects_in((unwrap_meta(meta) or {}).get("civitaiResources"))
    ids = [context.get("modelVersionId"), *(r.get("modelVersionId") for r in resources)]
    return list(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _count(stats: dict[str, Any], key: str) -> int:
    value = stats.get(key)
    return min(max(int(value), 0), _MOST) if isinstance(value, int | float) else 0
