"""From a generation record to an (instruction, API) pair, or to the reason why not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.record_filters import RECORD_FILTERS, Record, highest, reaction_counts
from diffagent.dabench.filter.resolve import MAX_EMBEDDINGS, Resolver
from diffagent.schemas.api import T2IAPI, Embedding, LoRA, Params
from diffagent.schemas.tables import CandidateVersion, EmbeddingReference, ReactionCounts, RecordRow
from diffagent.t2i.catalogue import int64
from diffagent.t2i.metadata import PARSER_VERSION, Generation

DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Dropped:
    """Filter that dropped a record, and its reason."""

    filter: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Columns of ``diffagent.schemas.tables.PRINTS``, with the prompt in place of its shingles."""

    id: int
    generation: int
    post_id: int | None
    creator: str | None
    base_model: str
    kept: bool
    prompt: str


@dataclass(frozen=True, slots=True)
class BuiltPair:
    """Result of one record: its row, or the reason why it has none.

    Attributes:
        row: the pair, or the filter that dropped it.
        fingerprint: see `fingerprint`.
        digest: 64 bits of prompt and response; equal for duplicates.
        loras: outcome of each LoRA of the metadata, see `Resolver.loras`.
    """

    row: RecordRow | Dropped
    fingerprint: Fingerprint | None = None
    digest: int = 0
    loras: Sequence[str] = ()


class PairBuilder:
    """Builder of (instruction, API) pairs from the records of a snapshot.

    Args:
        config: filters and their limits.
        resolver: of the model versions of the snapshot.
        dates: generation -> its day, see
            `diffagent.dabench.filter.snapshot_rows.read_generations`.
    """

    def __init__(
        self, config: FilterConfig, resolver: Resolver, dates: Mapping[int, str] | None = None
    ) -> None:
        self._config, self._resolver, self._dates = config, resolver, dates or {}
        self._checks = [(x, RECORD_FILTERS[x]) for x in config.records if x != DUPLICATE]

    def build(self, item: Mapping[str, Any] | None) -> BuiltPair:
        """Builds the pair of a record. Never raises, whatever the JSON."""
        if item is None:
            return BuiltPair(Dropped("record", "not an object with an id"))
        gallery = _ids(item.get("modelVersionIds")) if self._config.use_galleries else ()
        record = Record(item, self._resolver, gallery)
        for name, check in self._checks:
            if reason := check(record, self._config):
                return BuiltPair(Dropped(name, reason), fingerprint(record, kept=False))
        api = make_api(record)
        return BuiltPair(
            self.row(record, api),
            fingerprint(record, kept=True),
            _digest(record.generation.prompt, api),
            record.loras.outcomes,
        )

    def row(self, record: Record, api: T2IAPI) -> RecordRow:
        """Returns the row of a record that passed the filters."""
        item, generation, entry = record.item, record.generation, record.entry
        resolution = record.found
        assert entry and not isinstance(resolution, str)
        level, level_source = record.level
        counts = reaction_counts(item)
        return RecordRow(
            id=item["id"],
            prompt=generation.prompt,
            prompt_raw=generation.prompt_raw or "",
            negative_prompt_raw=generation.negative_prompt_raw,
            api=api.to_json(),
            model=entry.model,
            version=entry.version,
            base_model=entry.base_model,
            model_id=entry.model_id,
            version_id=entry.version_id,
            resolved_via=resolution.best.via,
            confidence=resolution.best.confidence,
            candidates=tuple(
                CandidateVersion(
                    version_id=x.version.version_id, via=x.via, confidence=x.confidence
                )
                for x in resolution.candidates
            ),
            sampler_raw=generation.sampler_raw or "",
            loras_dropped=record.loras.dropped,
            embeddings_dropped=sum(networks.dropped for networks in record.embeddings),
            embeddings_raw=_embeddings(generation),
            size_from_image=generation.size_from_image,
            from_image=generation.from_image,
            form=generation.form,
            parser=PARSER_VERSION,
            creator=_text(item.get("username")),
            post_id=int64(item.get("postId")),
            url=_text(item.get("url")),
            created_at=_text(item.get("createdAt")),
            nsfw_level=highest(level),
            nsfw_source=level_source,
            reactions=sum(counts.values()),
            reaction_counts=ReactionCounts(**counts),
            generation=record.crawl,
            first_seen=self._dates.get(record.crawl),
        )


def fingerprint(record: Record, *, kept: bool) -> Fingerprint | None:
    """Returns the fingerprint of a record; None without a prompt or a known checkpoint."""
    found = record.found
    if isinstance(found, str) or not record.named.prompt.text:
        return None
    return Fingerprint(
        id=record.item["id"],
        generation=record.crawl,
        post_id=int64(record.item.get("postId")),
        creator=_text(record.item.get("username")),
        base_model=found.first.base_model,
        kept=kept,
        prompt=record.named.prompt.text,
    )


def make_api(record: Record) -> T2IAPI:
    """The full API record of a call: what an agent writes, and what the catalogue knows."""
    entry, params = record.entry, record.params
    assert entry and isinstance(params, Params)  # filters.records has what makes sure of both
    return T2IAPI(
        model=entry.model,
        version=entry.version,
        base_model=entry.base_model,
        air=entry.air,
        loras=tuple(
            LoRA(model=lora.model, version=lora.version, weight=weight)
            for lora, weight in record.loras.kept
        ),
        embeddings=tuple(
            Embedding(model=x.model, version=x.version, weight=weight, negative=negative)
            for negative, networks in enumerate(record.embeddings)
            for x, weight in networks.kept
        )[:MAX_EMBEDDINGS],
        params=params,
        negative_prompt=record.generation.negative_prompt,
        description=entry.description[:500] or None,
    )


def _digest(prompt: str, api: T2IAPI) -> int:
    """64 bits of what a pair teaches: the prompt and the response, without seed."""
    networks = [list(vars(x).values()) for x in (*api.loras, *api.embeddings)]
    params = [value for name, value in vars(api.params).items() if name != "seed"]
    call = (api.model, api.version, len(api.loras), networks, params, api.negative_prompt)
    text = f"{prompt.casefold()}\0{call}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _embeddings(generation: Generation) -> tuple[EmbeddingReference, ...]:
    return tuple(
        EmbeddingReference(name=x.name, hash=x.hash, weight=x.weight, negative=negative)
        for references, negative in (
            (generation.embeddings, False),
            (generation.negative_embeddings, True),
        )
        for x in references
    )


def _ids(value: object) -> list[int]:
    return [item for item in value if type(item) is int] if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
