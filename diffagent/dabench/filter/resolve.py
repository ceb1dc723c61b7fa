"""From what metadata says of a model to the versions that it may mean, each with a confidence.

All versions of a snapshot are known here, also those that the filters dropped: a picture made
with a dropped checkpoint is dropped for that reason, not because its checkpoint is unknown.

Evidence comes in the order of ``VIAS``. The first that finds a version of the wanted type
decides; weaker evidence agrees with it, and chooses among versions that share a file, or it
contradicts it. A confidence is the probability that the picture was made with that version of all
versions of the site; what the candidates leave to 1 belongs to those that are none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Literal

from diffagent.dabench.filter.version_index import NAME_VIAS, KnownVersion, VersionIndex, told_base
from diffagent.t2i.catalogue import CHECKPOINT, EMBEDDING, LORA_TYPES, Catalogue, Entry
from diffagent.t2i.metadata import Reference

#: Answers of the site's by-hash route: version id, or None for an unknown hash.
Lookup = Callable[[str], int | None]

#: What says that a version was used, the best evidence first. Eight digits are AutoV1 or CRC32;
#: AutoV1 reads 64 kB of a file and is shared by files that have nothing else in common.
#: 'gallery': the picture was posted to the version's gallery.
VIAS = ("civitaiResources", "hash", "by-hash", "hash of 8 digits", *NAME_VIAS, "gallery")

#: What else is known. 'alone': nothing; 'shared': nothing, and several versions are left;
#: 'agrees': weaker evidence means the same; 'contradicts': weaker evidence means another version,
#: or the record also has an id that no version has or, of a name, a hash that no file has.
Standing = Literal["alone", "shared", "agrees", "contradicts"]

#: Probability that the picture's version is among those that the evidence leaves. Measured as
#: (right + 1) / (all + 2) on the showcases of half of the checkpoints of the records of 2023, by
#: ``python benchmarks/bench_resolve.py --fit DIR``.
CONFIDENCE: Mapping[tuple[str, Standing], float] = MappingProxyType(
    {
        ("hash", "alone"): 0.947,  # 3588 of 3788
        ("hash", "shared"): 0.9524,  # 19 of 19
        ("hash", "agrees"): 0.9787,  # 1699 of 1735
        ("hash", "contradicts"): 0.8,  # 35 of 43
        ("hash of 8 digits", "alone"): 0.9757,  # 361 of 369
        ("hash of 8 digits", "shared"): 0.859,  # 133 of 154
        ("hash of 8 digits", "agrees"): 0.9351,  # 71 of 75
        ("hash of 8 digits", "contradicts"): 0.006,  # 0 of 166
        ("file name", "alone"): 0.9466,  # 920 of 971
        ("file name", "shared"): 0.8,  # 3 of 3
        ("file name", "contradicts"): 0.8929,  # 49 of 54
        ("model and version name", "alone"): 0.963,  # 25 of 25
        ("model and version name", "shared"): 0.4,  # 1 of 3
        ("version name", "alone"): 0.9331,  # 306 of 327
        ("version name", "shared"): 0.9231,  # 11 of 11
        ("version name", "contradicts"): 0.9167,  # 10 of 10
        ("model name", "alone"): 0.9794,  # 569 of 580
        ("model name", "shared"): 0.9788,  # 184 of 187
        ("model name", "contradicts"): 0.9271,  # 88 of 94
        ("most words of a name", "alone"): 0.9014,  # 1096 of 1215
        ("most words of a name", "shared"): 0.8984,  # 335 of 372
        ("most words of a name", "contradicts"): 0.8452,  # 141 of 166
        ("half of the words of a name", "alone"): 0.8288,  # 391 of 471
        ("half of the words of a name", "shared"): 0.9213,  # 163 of 176
        ("half of the words of a name", "contradicts"): 0.6727,  # 73 of 108
    }
)
#: Kinds of evidence that those records have no truth for, and what they are taken for: the
#: generator's own list and the site's index are at least as good as a hash in a picture's text;
#: whose gallery a picture is in was not checked but for creators, so it counts as the weakest.
_TAKEN_FOR: Mapping[str, str] = MappingProxyType(
    {"civitaiResources": "hash", "by-hash": "hash", "gallery": NAME_VIAS[-1]}
)
#: How often a model's name without a version means the first of several (same command).
FIRST_VERSION = 0.8047  # 172 of 213
#: How much rarer it is that a LoRA's base model speaks against the right checkpoint than against
#: any other (same command). The picture's own base model is taken for as good.
BASE_MODEL_ODDS = 0.0576  # 0 of 180 against 0.0954

MAX_LORAS, MAX_EMBEDDINGS, MAX_WEIGHT = 8, 8, 4.0  # of diffagent.schemas.api
_CHECKPOINT, _LORA, _EMBEDDING = (CHECKPOINT,), tuple(LORA_TYPES), (EMBEDDING,)
_WORDS = NAME_VIAS[4:]
_NETWORK_NAMES = ("file name", "model and version name")
_CACHED = 1 << 14  # a few thousand checkpoints make nearly all pictures

Found = tuple[str, tuple[KnownVersion, ...]]  # via, versions by date


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that metadata may mean."""

    version: KnownVersion
    via: str  # of VIAS
    confidence: float


@dataclass(frozen=True)
class Resolution:
    """All versions that metadata may mean, the likeliest first; never empty."""

    candidates: tuple[Candidate, ...]
    via: str  # the best evidence; a candidate of weaker evidence may still be likelier
    standing: Standing  # of that evidence

    @property
    def best(self) -> Candidate:
        """The likeliest."""
        return self.candidates[0]

    @cached_property
    def first(self) -> KnownVersion:
        """The one that was known first. Later crawls bring other candidates, but none before."""
        versions = (candidate.version for candidate in self.candidates)
        return min(versions, key=lambda v: (v.generation, v.published, v.version_id))

    def doubt(self, min_confidence: float) -> str | None:
        """Why the best candidate is not sure enough, or None."""
        if self.best.confidence >= min_confidence:
            return None
        if self.standing != "shared":
            return "confidence below the limit"
        kind = "name" if self.via in NAME_VIAS else "hash" if "hash" in self.via else self.via
        return f"{kind} of several versions"


@dataclass(frozen=True, slots=True)
class Networks:
    """What references to LoRAs or embeddings become.

    An outcome is 'kept by id or hash', 'kept by file name' or the reason why a reference is not.
    """

    kept: tuple[tuple[Entry, float], ...] = ()  # with weights
    outcomes: tuple[str, ...] = ()  # one a reference

    @property
    def dropped(self) -> int:
        """How many references mean nothing that the checkpoint can be called with."""
        return len(self.outcomes) - len(self.kept)


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What references find: ids and hashes by ``VIAS``, and every way to read the name."""

    found: tuple[Found, ...]
    names: tuple[Found, ...]
    stranger: bool  # an id that no version has, or a hash that no file has and names stand in for
    reason: str  # why there is nothing

    @property
    def nothing(self) -> bool:
        """Whether nothing was found."""
        return not self.found and not self.names

    @property
    def several(self) -> bool:
        """Whether any of it means more than one version."""
        return any(len(versions) > 1 for _, versions in (*self.found, *self.names))


class Resolver:
    """Finds what metadata means among the versions of a snapshot."""

    def __init__(self, lookup: Lookup | None = None) -> None:
        self._lookup = lookup
        self._index = VersionIndex()
        self._entries: dict[int, Entry] = {}
        self._cache()

    def _cache(self) -> None:
        self._evidence = lru_cache(_CACHED)(self._gather)
        self._resolution = lru_cache(_CACHED)(self._weigh)
        self._network_found = lru_cache(_CACHED)(self._find_network)
        self._base_of_lora = lru_cache(_CACHED)(self._find_base_of_lora)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process needs: the versions and entries, no cached answers."""
        return {name: getattr(self, name) for name in ("_lookup", "_index", "_entries")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache()

    def add(self, model: Mapping[str, Any], version: Mapping[str, Any], dropped: str) -> None:
        """Take in a version of the snapshot; ``dropped`` is '' when the filters kept it."""
        self._index.add(model, version, dropped)
        self.forget()

    def forget(self) -> None:
        """Forget answers, not versions."""
        for cache in (self._evidence, self._resolution, self._network_found, self._base_of_lora):
            cache.cache_clear()

    def use(self, catalogue: Catalogue) -> None:
        """Take the entries (and so the names) of the kept versions from ``catalogue``."""
        self._entries = {entry.version_id: entry for entry in catalogue.entries}

    def entry(self, version: KnownVersion) -> Entry:
        """The catalogue's entry of a version that the filters kept."""
        return self._entries[version.version_id]

    def checkpoint(
        self,
        references: Iterable[Reference],
        *,
        base_model: str | None = None,
        loras: Iterable[Reference] = (),
        created_at: str | None = None,
        gallery: Collection[int] = (),
    ) -> Resolution | str:
        """The checkpoints that a record may mean, or why there is none.

        Args:
            references: what its metadata says of the checkpoint.
            base_model: the picture's own, as the site gives it.
            loras: what its metadata says of LoRAs, whose base model must be the checkpoint's.
            created_at: ISO date of the picture; of candidates that are as likely, those that
                were published by then come first.
            gallery: ids of the versions to whose galleries it was posted; never give these where
                a gallery is the truth that is asked for.
        """
        references = tuple(references)
        evidence = self._evidence(references, _CHECKPOINT)
        posted = self._posted(gallery) if gallery else ()
        if evidence.nothing and not posted:
            return evidence.reason
        if not evidence.several:
            created_at = None  # orders ties alone, and would fill the cache
        bases = {told_base(base_model), self.base_of_loras(loras)} - {None}
        base = bases.pop() if len(bases) == 1 else None
        return self._resolution(references, base, base_model, created_at, posted)

    def loras(self, references: Iterable[Reference], checkpoint: Entry) -> Networks:
        """The LoRAs of the catalogue that references mean and that fit the checkpoint."""
        return self._networks(references, checkpoint, _LORA, MAX_LORAS)

    def embeddings(self, references: Iterable[Reference], checkpoint: Entry) -> Networks:
        """The textual inversions that references mean and that fit the checkpoint."""
        return self._networks(references, checkpoint, _EMBEDDING, MAX_EMBEDDINGS)

    def _networks(
        self,
        references: Iterable[Reference],
        checkpoint: Entry,
        types: tuple[str, ...],
        limit: int,
    ) -> Networks:
        kept: dict[int, tuple[Entry, float]] = {}
        outcomes: list[str] = []
        for reference in references:
            entry, outcome = self._network(reference, checkpoint, types)
            if entry is None:
                outcomes.append(outcome)
            elif abs(reference.weight) > MAX_WEIGHT:
                outcomes.append("weight out of range")
            elif entry.version_id in kept:
                outcomes.append("named twice")
            elif len(kept) == limit:
                outcomes.append(f"more than {limit}")
            else:
                outcomes.append(outcome)
                kept[entry.version_id] = (entry, reference.weight)
        return Networks(tuple(kept.values()), tuple(outcomes))

    def _network(
        self, reference: Reference, checkpoint: Entry, types: tuple[str, ...]
    ) -> tuple[Entry | None, str]:
        """A file under several versions is one network: the first published stands for it."""
        found = self._network_found(reference.version_id, reference.hash, reference.name, types)
        if isinstance(found, str):
            return None, found
        via, versions = found
        fitting = [v for v in versions if v.ecosystem == checkpoint.ecosystem]
        kind = "file name" if via in NAME_VIAS else "hash"
        if len(fitting) > 1 and via not in ("hash", "civitaiResources"):
            return None, f"{kind} of several"
        version = (fitting or versions)[0]
        if version.dropped:
            return None, version.dropped
        if not fitting:
            return None, "made for another base model"
        return self.entry(version), f"kept by {'id or hash' if kind == 'hash' else kind}"

    def lora_versions(self, reference: Reference) -> tuple[KnownVersion, ...]:
        """The LoRAs that a reference may mean, by date."""
        found = self._network_found(reference.version_id, reference.hash, reference.name, _LORA)
        return () if isinstance(found, str) else found[1]

    def _find_network(
        self,
        version_id: int | None,
        digest: str | None,
        name: str | None,
        types: tuple[str, ...],
    ) -> Found | str:
        evidence = self._gather((Reference(version_id, digest, name),), types)
        names = [found for found in evidence.names if found[0] in _NETWORK_NAMES][:1]
        # A LoRA's hash is its file's; an embedding's is that of its vectors, which no site lists.
        if types == _LORA and not evidence.found and version_id is None and digest:
            return "hash not in the snapshot"  # which says: another file than the name's
        if not evidence.found and not names:
            return "file name unknown" if version_id is None and name else evidence.reason
        via, versions, _, _ = _narrow([*evidence.found, *names])
        return via, versions

    def base_of_loras(self, references: Iterable[Reference]) -> str | None:
        """Root ecosystem of the LoRAs that ids and hashes prove, when it is one."""
        bases = {self._base_of_lora(lora.version_id, lora.hash) for lora in references} - {None}
        return bases.pop() if len(bases) == 1 else None

    def _find_base_of_lora(self, version_id: int | None, digest: str | None) -> str | None:
        found = self._network_found(version_id, digest, None, _LORA)
        bases = set() if isinstance(found, str) else {version.base for version in found[1]}
        return bases.pop() if len(bases) == 1 else None

    def _posted(self, gallery: Collection[int]) -> tuple[int, ...]:
        versions = map(self._index.by_id, gallery)
        return tuple(sorted({v.version_id for v in versions if v and v.type == CHECKPOINT}))

    def _gather(self, references: tuple[Reference, ...], types: tuple[str, ...]) -> _Evidence:
        """Everything that references find."""
        found: dict[str, list[tuple[KnownVersion, ...]]] = {}
        reason, strangers, unlisted = "nothing names a model", [], False
        for reference in references:
            if reference.version_id is not None:
                version = self._index.by_id(reference.version_id)
                if version is None:
                    reason, unlisted = "version not in the snapshot", True
                elif version.type not in types:
                    reason = f"version is not a {types[0]}"
                else:
                    found.setdefault("civitaiResources", []).append((version,))
            elif reference.hash is not None:
                if versions := self._index.by_hash(reference.hash, types):
                    via = "hash of 8 digits" if len(reference.hash) == 8 else "hash"
                    found.setdefault(via, []).append(versions)
                else:
                    strangers.append(reference.hash)
                    reason = "hash not in the snapshot"
        if strangers and not found and types == _CHECKPOINT:
            found = self._ask(strangers)
        merged = tuple((via, _merge(found[via])) for via in VIAS if via in found)
        name = next((r.name for r in references if r.name), None)
        names: tuple[Found, ...] = ()
        if name and (found or not unlisted):  # an id means another version than its name would
            reason = f"{'hash and ' if strangers else ''}name not in the snapshot"
            names = tuple(self._index.by_name(name, types))
            if types == _CHECKPOINT and not _sure(merged):
                names = (*names, *self._index.by_words(name))
        return _Evidence(merged, names, unlisted or bool(strangers and not found), reason)

    def _ask(self, digests: Iterable[str]) -> dict[str, list[tuple[KnownVersion, ...]]]:
        if self._lookup is not None:
            for digest in digests:
                version = self._index.by_id(self._lookup(digest) or -1)
                if version is not None and version.type == CHECKPOINT:
                    return {"by-hash": [(version,)]}
        return {}

    def _weigh(
        self,
        references: tuple[Reference, ...],
        base: str | None,
        base_model: str | None,
        created_at: str | None,
        posted: tuple[int, ...],
    ) -> Resolution:
        """Probabilities of all candidates, by what the evidence is and by the base model."""
        evidence = self._evidence(references, _CHECKPOINT)
        found = [*evidence.found, *_fitting_name(evidence.names, base)]
        if posted:
            shown = (self._index.by_id(version_id) for version_id in posted)
            found.append(("gallery", tuple(version for version in shown if version is not None)))
        via, versions, agrees, rivals = _narrow(found)
        standing: Standing = "alone" if len(versions) == 1 else "shared"
        if rivals or evidence.stranger:
            standing = "contradicts"
        elif agrees:
            standing = "agrees"
        prior = _confidence(via, standing)
        weights = {v: (via, prior * share) for v, share in _shares(via, versions)}
        for rival, others in rivals:
            rest = (1 - prior) * _confidence(rival, "alone") / len(rivals)
            for version, share in _shares(rival, others):
                weights[version] = (rival, weights.get(version, ("", 0.0))[1] + rest * share)
        elsewhere = 1 - sum(weight for _, weight in weights.values())
        if base is not None:
            for version, (how, weight) in weights.items():
                if version.base not in (None, base):
                    weights[version] = (how, weight * BASE_MODEL_ODDS)
        total = elsewhere + sum(weight for _, weight in weights.values())
        candidates = [Candidate(v, how, round(w / total, 4)) for v, (how, w) in weights.items()]
        candidates.sort(key=lambda candidate: _rank(candidate, base_model, created_at))
        return Resolution(tuple(candidates), via, standing)


def _sure(found: tuple[Found, ...]) -> bool:
    """Whether words in common could neither choose among the versions nor speak against them."""
    return bool(found) and len(found[0][1]) == 1 and found[0][0] != "hash of 8 digits"


def _merge(found: list[tuple[KnownVersion, ...]]) -> tuple[KnownVersion, ...]:
    """What several references of one kind mean: what all of them do, else each one's."""
    common = set(found[0]).intersection(*found[1:])
    versions = dict.fromkeys(version for versions in found for version in versions)
    return tuple(version for version in versions if version in common or not common)


def _fitting_name(names: Iterable[Found], base: str | None) -> list[Found]:
    """The best way to read a name that gives a version of the base model, else the best way."""
    readings = list(names)
    for via, versions in readings:
        if base is None or any(v.base in (None, base) for v in versions):
            return [(via, versions)]
    return readings[:1]


def _narrow(
    found: Iterable[Found],
) -> tuple[str, tuple[KnownVersion, ...], bool, list[Found]]:
    """(via, versions) of the best evidence, whether weaker evidence agrees, and what does not.

    A gallery contradicts nothing: pictures are posted to those of LoRAs and of other versions.
    Common words contradict only what is as weak, a hash of eight digits.
    """
    (via, versions), *others = found
    agrees, rivals = False, []
    for other, meant in others:
        common = tuple(version for version in versions if version in meant)
        if common:
            versions, agrees = common, True
        elif other != "gallery" and (via == "hash of 8 digits" or other not in _WORDS):
            rivals.append((other, meant))
    return via, versions, agrees, rivals


def _confidence(via: str, standing: Standing) -> float:
    """Of ``CONFIDENCE``; what was never seen of a name counts as it does of a file's name."""
    kind = _TAKEN_FOR.get(via, via)
    like = "file name" if kind in NAME_VIAS else kind
    known = CONFIDENCE.get((kind, standing)) or CONFIDENCE.get((like, standing))
    return known or CONFIDENCE[kind, "alone"]


def _shares(via: str, versions: tuple[KnownVersion, ...]) -> Iterator[tuple[KnownVersion, float]]:
    """How the probability of a set falls on its versions, which are in the order of their dates."""
    rest = len(versions) - 1
    for place, version in enumerate(versions):
        if via == "model name" and rest:
            yield version, FIRST_VERSION if place == 0 else (1 - FIRST_VERSION) / rest
        else:
            yield version, 1 / len(versions)


def _rank(
    candidate: Candidate, base_model: str | None, created_at: str | None
) -> tuple[float, bool, bool, str, int]:
    """The likeliest first; then what fits better, then as the site's by-hash route chooses."""
    version = candidate.version
    return (
        -candidate.confidence,
        base_model is not None and version.base_model != base_model,
        created_at is not None and version.published > created_at,
        version.published,
        version.version_id,
    )
