"""What an earlier snapshot holds, small enough for memory: ids and fingerprints of contents.

Twenty bytes an image and a few hundred a model: a hundred thousand models and two million images
take about 100 MB.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffagent.crawl.snapshot import read_generations, read_rows
from diffagent.schemas.payloads import (
    GENERATION,
    GONE,
    canonical,
    content,
    generation_of,
    versions_of,
    whole_number,
)
from diffagent.store import Artifact


def fingerprint(item: Mapping[str, Any]) -> int:
    """64 bits of the digest of an item's content (see ``diffagent.schemas.payloads.content``)."""
    digest = hashlib.blake2b(canonical(content(item)), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def image_fingerprint(image: Mapping[str, Any]) -> int:
    """The same; the lowest bit says whether the image has generation metadata."""
    return fingerprint(image) & ~1 | bool(image.get("meta"))


def has_meta(mark: int) -> bool:
    """Whether the image with this fingerprint has generation metadata."""
    return bool(mark & 1)


def head_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model without its versions."""
    return {key: value for key, value in model.items() if key != "modelVersions"}


def downloads_of(model: Mapping[str, Any]) -> int:
    """How often a model was downloaded, as far as it says so."""
    stats = model.get("stats")
    return whole_number(stats.get("downloadCount")) or 0 if isinstance(stats, dict) else 0


def creator_of(model: Mapping[str, Any]) -> str | None:
    """Who made a model; a deleted user is not named."""
    creator = model.get("creator")
    name = creator.get("username") if isinstance(creator, dict) else None
    return name if isinstance(name, str) else None


class Marks:
    """Fingerprints and generations by id, added in the order of the ids."""

    def __init__(self) -> None:
        self._ids, self._marks, self._generations = array("q"), array("Q"), array("I")

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __contains__(self, ident: int) -> bool:
        return self.get(ident) is not None

    def add(self, ident: int, mark: int, generation: int = 0) -> None:
        """Add an id above all others."""
        self._ids.append(ident)
        self._marks.append(mark)
        self._generations.append(generation)

    def get(self, ident: int) -> int | None:
        """The fingerprint of an id."""
        place = self._place(ident)
        return None if place is None else self._marks[place]

    def generation(self, ident: int) -> int | None:
        """The generation of an id."""
        place = self._place(ident)
        return None if place is None else self._generations[place]

    def _place(self, ident: int) -> int | None:
        place = bisect_left(self._ids, ident)
        return place if place < len(self._ids) and self._ids[place] == ident else None


@dataclass(frozen=True, slots=True)
class KnownModel:
    """Fingerprints and generations of a model without its versions and of each version."""

    head: int
    versions: Mapping[int, int]
    downloads: int
    generation: int
    version_generations: Mapping[int, int]


@dataclass(slots=True)
class Known:
    """An earlier snapshot.

    ``missing``: (kind, id) -> generation of what it held before it was damaged.
    """

    path: Path
    digest: str
    generations: list[dict[str, Any]]
    missing: Mapping[tuple[str, int], int] = field(default_factory=dict)
    models: dict[int, KnownModel] = field(default_factory=dict)
    images: Marks = field(default_factory=Marks)
    images_of_version: dict[int, array[int]] = field(default_factory=dict)
    pages: dict[int, bool] = field(default_factory=dict)  # whether it could be read
    gone: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(
        cls, snapshot: Artifact, missing: Mapping[tuple[str, int], int] | None = None
    ) -> Known:
        """Read a snapshot once.

        Raises:
            ArtifactError: it is damaged.
        """
        generations = read_generations(snapshot)
        known = cls(snapshot.path, snapshot.content_digest, generations, missing or {})
        for row in read_rows(snapshot.path, GONE):
            known.gone[row["kind"], row["id"]] = row
        for model in read_rows(snapshot.path, "models"):
            versions = versions_of(model)
            known.models[model["id"]] = KnownModel(
                head=fingerprint(head_of(model)),
                versions={i: fingerprint(v) for i, v in versions.items()},
                downloads=downloads_of(model),
                generation=generation_of(model),
                version_generations={i: generation_of(v) for i, v in versions.items()},
            )
        for image in read_rows(snapshot.path, "images"):
            known._add_image(image)
        for page in read_rows(snapshot.path, "pages"):
            known.pages[page["id"]] = page.get("status") == "ok"
        return known

    @property
    def next_generation(self) -> int:
        """The generation of what is new after this snapshot."""
        return int(self.generations[-1]["generation"]) + 1

    def first(self, kind: str, ident: int, model: int = 0) -> int:
        """The generation of a model, of a version of ``model``, or of an image."""
        found: int | None = None
        if kind == "images":
            found = self.images.generation(ident)
        elif before := self.models.get(ident if kind == "models" else model):
            versions = before.version_generations
            found = before.generation if kind == "models" else versions.get(ident)
        return self.missing.get((kind, ident), self.next_generation) if found is None else found

    def count(self, kind: str) -> int:
        """How many models, versions or images there are."""
        if kind == "versions":
            return sum(len(model.versions) for model in self.models.values())
        return len(self.models if kind == "models" else self.images)

    def has_image(self, ident: int) -> bool:
        """Whether an image is known and not gone."""
        return ident in self.images and ("images", ident) not in self.gone

    def has_model(self, model: Mapping[str, Any]) -> bool:
        """Whether a model and all its versions are known and not gone."""
        before = self.models.get(model["id"])
        return (
            before is not None
            and ("models", model["id"]) not in self.gone
            and all(
                v in before.versions and ("versions", v) not in self.gone
                for v in versions_of(model)
            )
        )

    def _add_image(self, image: dict[str, Any]) -> None:
        self.images.add(image["id"], image_fingerprint(image), generation_of(image))
        versions = image.get("modelVersionIds")
        for version in versions if isinstance(versions, list) else ():
            if type(version) is int:
                self.images_of_version.setdefault(version, array("q")).append(image["id"])


def annotate(kind: str, item: dict[str, Any], known: Known | None) -> None:
    """Write down which crawl took a model with its versions, or an image, in first."""
    item[GENERATION] = known.first(kind, item["id"]) if known else 0
    versions = item.get("modelVersions") if kind == "models" else None
    for version in versions if isinstance(versions, list) else ():
        if isinstance(version, dict):
            ident = whole_number(version.get("id")) or 0
            version[GENERATION] = known.first("versions", ident, item["id"]) if known else 0
