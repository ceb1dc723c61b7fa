"""All versions of a snapshot by id, by the hashes of their files and by every spelling of a name.

Made for 100,000 versions and millions of questions: a hash or a name is 8 bytes of a sorted
array, 40 bits of it the key and 24 the version, so that an index of a million keys takes 8 MB and
a question is one binary search. Two of a million different keys share their 40 bits about once;
an unknown hash is taken for a known one less than once in a million.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from sys import intern
from typing import Any, Literal, get_args

from diffagent.dabench.filter.name_words import NameWords
from diffagent.errors import ArtifactError
from diffagent.schemas.payloads import generation_of
from diffagent.t2i import names
from diffagent.t2i.base_models import ecosystem
from diffagent.t2i.catalogue import CHECKPOINT, WEIGHT_TYPES
from diffagent.t2i.metadata.values import file_hash

#: How a name can mean a version, the most telling first.
NameVia = Literal[
    "file name",
    "model and version name",
    "version name",
    "model name",
    "most words of a name",
    "half of the words of a name",
]
NAME_VIAS: tuple[NameVia, ...] = get_args(NameVia)

_KEY_DIGITS = 10  # hexadecimal: 40 bits
_SHORT = 8  # digits of AutoV1 and CRC32, which are no prefix of anything
_POSITION_BITS = 24
_MIN_NAME = 3  # characters
_MOST, _HALF = 0.7, 0.5  # similarity of words
_MIN_VERSION_NAME = 6  # "v1" and "fp16" are the version names of thousands
_NO_DATE = "9999"  # a version without a date comes after those with one
_EMPTY = hashlib.sha256().hexdigest().upper()  # AutoV1 of any file under 1 MB is its beginning

_root = lru_cache(maxsize=1024)(ecosystem)


@dataclass(frozen=True, slots=True)
class KnownVersion:
    """What is kept of every version of the snapshot. ``dropped``: why, '' when kept."""

    version_id: int
    model_id: int
    type: str
    base_model: str
    published: str
    dropped: str
    generation: int

    @property
    def ecosystem(self) -> str:
        """Root ecosystem of its base model."""
        return _root(self.base_model)

    @property
    def base(self) -> str | None:
        """The same, None where the base model says nothing."""
        return told_base(self.base_model)


def told_base(base_model: str | None) -> str | None:
    """Root ecosystem of a base model that says something, which "Other" does not."""
    root = _root(base_model) if base_model else "other"
    return None if root in ("other", "none") else root


class _Postings:
    """A multimap from 40-bit keys to positions."""

    def __init__(self) -> None:
        self._rows = array("Q")
        self._sorted = True

    def add(self, key: int, position: int) -> None:
        self._rows.append(key << _POSITION_BITS | position)
        self._sorted = False

    def find(self, first: int, last: int) -> list[int]:
        """Positions of the keys from ``first`` to ``last``."""
        if not self._sorted:
            self._rows = array("Q", sorted(set(self._rows)))
            self._sorted = True
        rows, end = self._rows, (last + 1) << _POSITION_BITS
        at = bisect_left(rows, first << _POSITION_BITS)
        found = []
        while at < len(rows) and rows[at] < end:
            found.append(rows[at] & ((1 << _POSITION_BITS) - 1))
            at += 1
        return found


class VersionIndex:
    """Versions by id, hash and name. What comes back never depends on the order of ``add``."""

    def __init__(self) -> None:
        self._versions: list[KnownVersion] = []
        self._by_id: dict[int, int] = {}
        self._short, self._long, self._names = _Postings(), _Postings(), _Postings()
        self._words = NameWords()  # of checkpoints

    def add(self, model: Mapping[str, Any], version: Mapping[str, Any], dropped: str) -> bool:
        """Take in a version with the hashes and names of its files; False: it was known."""
        version_id, model_id = version.get("id"), model.get("id")
        if type(version_id) is not int or version_id in self._by_id:
            return False
        position = len(self._versions)
        if position >> _POSITION_BITS:
            raise ArtifactError(f"more than {position} versions; the index holds no more of them")
        self._by_id[version_id] = position
        published = version.get("publishedAt") or version.get("createdAt") or _NO_DATE
        self._versions.append(
            KnownVersion(
                version_id,
                model_id if type(model_id) is int else -1,
                intern(str(model.get("type"))),
                intern(str(version.get("baseModel"))),
                str(published),
                intern(dropped),
                generation_of(version),
            )
        )
        files = version.get("files")
        weights = [
            file
            for file in (files if isinstance(files, list) else ())
            if isinstance(file, dict) and file.get("type") in WEIGHT_TYPES
        ]
        for digest in {digest for file in weights for digest in _hashes(file)}:
            short = len(digest) == _SHORT
            (self._short if short else self._long).add(int(digest[:_KEY_DIGITS], 16), position)
        stems = {names.file_stem(file["name"]) for file in weights if _is_text(file.get("name"))}
        models, versions = names.titles(model.get("name")), names.titles(version.get("name"))
        for via, key in set(_version_keys(models, versions, stems)):
            self._names.add(_name_key(via, key), position)
        if self._versions[-1].type == CHECKPOINT:
            both = (f"{name} {title}" for name in models[:2] for title in versions[:2])
            self._words.add(position, self._versions[-1].model_id, (*stems, *models, *both))
        return True

    def by_id(self, version_id: int) -> KnownVersion | None:
        """The version of an id."""
        position = self._by_id.get(version_id)
        return None if position is None else self._versions[position]

    def by_hash(self, digest: str, types: Collection[str]) -> tuple[KnownVersion, ...]:
        """Versions with a file of this hash, of any kind, or whose hash begins with it.

        Args:
            digest: 8 to 64 hexadecimal digits in upper case. Of more than 10 the first 10 count.
            types: the model types wanted.
        """
        if _EMPTY.startswith(digest):
            return ()
        found = []
        if len(digest) == _SHORT:
            found = self._short.find(int(digest, 16), int(digest, 16))
        if not found:
            key = digest[:_KEY_DIGITS]
            first, last = (int(key.ljust(_KEY_DIGITS, filler), 16) for filler in "0F")
            found = self._long.find(first, last)
        return self._of_types(found, types)

    def by_name(
        self, name: str, types: Collection[str]
    ) -> Iterator[tuple[NameVia, tuple[KnownVersion, ...]]]:
        """Versions that a name may mean, by every way in which it means any, best first."""
        key = names.exact_key(names.file_stem(name))
        for via in NAME_VIAS[:4] if len(key) >= _MIN_NAME else ():
            code = _name_key(via, key)
            if found := self._of_types(self._names.find(code, code), types):
                yield via, found

    def by_words(self, name: str) -> Iterator[tuple[NameVia, tuple[KnownVersion, ...]]]:
        """Checkpoints whose names share the most words with a name, if that is half or more."""
        similarity, positions = self._words.find(names.file_stem(name), _HALF)
        if positions:
            via = NAME_VIAS[4 if similarity >= _MOST else 5]
            yield via, self._of_types(positions, (CHECKPOINT,))

    def _of_types(
        self, positions: Iterable[int], types: Collection[str]
    ) -> tuple[KnownVersion, ...]:
        found = (self._versions[position] for position in positions)
        wanted = (version for version in found if version.type in types)
        return tuple(sorted(wanted, key=lambda version: (version.published, version.version_id)))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _hashes(file: Mapping[str, Any]) -> Iterator[str]:
    hashes = file.get("hashes")
    for value in hashes.values() if isinstance(hashes, dict) else ():
        digest = file_hash(value)
        if digest and not _EMPTY.startswith(digest):
            yield digest


def _version_keys(
    models: Iterable[str], versions: Iterable[str], stems: Iterable[str]
) -> Iterator[tuple[NameVia, str]]:
    """Under which keys a version is found."""
    for stem in stems:
        yield "file name", names.exact_key(stem)
    for model in models:
        yield "model name", names.exact_key(model)
        for version in versions:
            yield "model and version name", names.exact_key(f"{model} {version}")
    for version in versions:
        key = names.exact_key(version)
        if len(key) >= _MIN_VERSION_NAME:
            yield "version name", key


def _name_key(via: NameVia, key: str) -> int:
    digest = hashlib.blake2b(f"{via}\0{key}".encode(), digest_size=_KEY_DIGITS // 2).digest()
    return int.from_bytes(digest, "big")
