"""Index of an earlier snapshot, small enough for memory: ids and fingerprints of contents.

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
    GONE,
    as_dict,
    as_list,
    canonical,
    content,
    generation_of,
    versions_of,
    whole_number,
)
from diffagent.store import Artifact


def fingerprint(item: Mapping[str, Any]) -> int:
    """Return 64 bits of the digest of an item's ``diffagent.schemas.payloads.content``."""
    digest = hashlib.blake2b(canonical(content(item)), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def image_fingerprint(image: Mapping[str, Any]) -> int:
    """Return the fingerprint of an image; its lowest bit: whether it has generation metadata."""
    return fingerprint(image) & ~1 | bool(image.get("meta"))


def has_meta(mark: int) -> bool:
    """Whether the image with this fingerprint has generation metadata."""
    return bool(mark & 1)


def head_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model without its versions."""
    return {key: value for key, value in model.items() if key != "modelVersions"}


def downloads_of(model: Mapping[str, Any]) -> int:
    """Return a model's number of downloads; 0 where it states none."""
    return whole_number(as_dict(model.get("stats")).get("downloadCount")) or 0


def creator_of(model: Mapping[str, Any]) -> str | None:
    """Return the name of a model's creator; None for a deleted user."""
    name = as_dict(model.get("creator")).get("username")
    return name if isinstance(name, str) else None


class FingerprintTable:
    """Table of fingerprints and generations by id, added in the order of the ids."""

    def __init__(self) -> None:
        self._ids, self._marks, self._generations = array("q"), array("Q"), array("I")

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __contains__(self, ident: int) -> bool:
        return self.get(ident) is not None

    def add(self, ident: int, mark: int, generation: int = 0) -> None:
        """Add an id larger than all others."""
        self._ids.append(ident)
        self._marks.append(mark)
        self._generations.append(generation)

    def get(self, ident: int) -> int | None:
        """Return the fingerprint of an id."""
        place = self._place(ident)
        return None if place is None else self._marks[place]

    def generation(self, ident: int) -> int | None:
        """Return the generation of an id."""
        place = self._place(ident)
        return None if place is None else self._generations[place]

    def _place(self, ident: int) -> int | None:
        place = bisect_left(self._ids, ident)
        return place if place < len(self._ids) and self._ids[place] == ident else None


@dataclass(frozen=True, slots=True)
class IndexedModel:
    """Fingerprints and generations of a model without its versions and of each version."""

    head: int
    versions: Mapping[int, int]
    downloads: int
    generation: int
    version_generations: Mapping[int, int]


@dataclass(slots=True)
class SnapshotIndex:
    """Index of an earlier snapshot.

    Attributes:
        missing: (kind, id) -> generation of the items that were lost when it was damaged.
        pages: model -> whether its page could be read.
        gone: (kind, id) -> tombstone.
    """

    path: Path
    digest: str
    generations: list[dict[str, Any]]
    missing: Mapping[tuple[str, int], int] = field(default_factory=dict)
    models: dict[int, IndexedModel] = field(default_factory=dict)
    images: FingerprintTable = field(default_factory=FingerprintTable)
    images_of_version: dict[int, array[int]] = field(default_factory=dict)
    pages: dict[int, bool] = field(default_factory=dict)
    gone: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(
        cls, snapshot: Artifact, missing: Mapping[tuple[str, int], int] | None = None
    ) -> SnapshotIndex:
        """Read a snapshot.

        Raises:
            ArtifactError: the snapshot is damaged.
        """
        generations = read_generations(snapshot)
        index = cls(snapshot.path, snapshot.content_digest, generations, missing or {})
        for row in read_rows(snapshot.path, GONE):
            index.gone[row["kind"], row["id"]] = row
        for model in read_rows(snapshot.path, "models"):
            versions = versions_of(model)
            index.models[model["id"]] = IndexedModel(
                head=fingerprint(head_of(model)),
                versions={i: fingerprint(v) for i, v in versions.items()},
                downloads=downloads_of(model),
                generation=generation_of(model),
                version_generations={i: generation_of(v) for i, v in versions.items()},
            )
        for image in read_rows(snapshot.path, "images"):
            index._add_image(image)
        for page in read_rows(snapshot.path, "pages"):
            index.pages[page["id"]] = page.get("status") == "ok"
        return index

    @property
    def next_generation(self) -> int:
        """Generation of items that this snapshot lacks."""
        return int(self.generations[-1]["generation"]) + 1

    def generation(self, kind: str, ident: int, model: int = 0) -> int:
        """Return the generation of a model, of a version of ``model``, or of an image."""
        number: int | None = None
        if kind == "images":
            number = self.images.generation(ident)
        elif before := self.models.get(ident if kind == "models" else model):
            versions = before.version_generations
            number = before.generation if kind == "models" else versions.get(ident)
        if number is None:
            return self.missing.get((kind, ident), self.next_generation)
        return number

    def count(self, kind: str) -> int:
        """Return the number of models, versions or images."""
        if kind == "versions":
            return sum(len(model.versions) for model in self.models.values())
        return len(self.models if kind == "models" else self.images)

    def has_image(self, ident: int) -> bool:
        """Whether the snapshot has an image that is not gone."""
        return ident in self.images and ("images", ident) not in self.gone

    def has_model(self, model: Mapping[str, Any]) -> bool:
        """Whether the snapshot has a model and all its versions, none of them gone."""
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
        for version in as_list(image.get("modelVersionIds")):
            if type(version) is int:
                self.images_of_version.setdefault(version, array("q")).append(image["id"])
