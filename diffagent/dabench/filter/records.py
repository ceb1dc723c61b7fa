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
from diffagent.t2i.catalogue import int64
from diffagent.t2i.metadata import PARSER_VERSION, Generation

DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that is not kept: which filter, and why."""

    filter: str
    reason: str


@dataclass(frozen=True, slots=True)
class Built:
    """What a record gives."""

    row: dict[str, Any] | Dropped  # of RECORDS
    fingerprint: dict[str, Any] | None = None  # of PRINTS: see `fingerprint`
    digest: int = 0  # 64 bits of what the pair teaches; equal for duplicates
    loras: Sequence[str] = ()  # what became of those in the metadata: see Resolver.loras


class PairBuilder:
    """Turns records into rows of ``diffagent.schemas.tables.RECORDS``.

    Args:
        config: which filters, and their limits.
        resolver: knows the versions of the snapshot.
        dates: the day of each generation, see
        `diffagent.dabench.filter.snapshot_rows.read_generations`.
    """

    def __init__(
        self, config: FilterConfig, resolver: Resolver, dates: Mapping[int, str] | None = None
    ) -> None:
        self._config, self._resolver, self._dates = config, resolver, dates or {}
        self._checks = [(x, RECORD_FILTERS[x]) for x in config.records if x != DUPLICATE]

    def build(self, item: Mapping[str, Any] | None) -> Built:
        """What a record gives. Never raises, whatever the JSON."""
        if item is None:
            return Built(Dropped("record", "not an object with an id"))
        gallery = _ids(item.get("modelVersionIds")) if self._config.use_galleries else ()
        record = Record(item, self._resolver, gallery)
        for name, check in self._checks:
            if reason := check(record, self._config):
                return Built(Dropped(name, reason), fingerprint(record, kept=False))
        api = make_api(record)
        return Built(
            self.row(record, api),
            fingerprint(record, kept=True),
            _digest(record.generation.prompt, api),
            record.loras.outcomes,
        )

    def row(self, record: Record, api: T2IAPI) -> dict[str, Any]:
        """The row of ``diffagent.schemas.tables.RECORDS`` of a record that passed the filters."""
        item, made, found, entry = record.item, record.generation, record.found, record.entry
        assert entry and not isinstance(found, str)
        level, level_source = record.level
        counts = reaction_counts(item)
        return {
            "id": item["id"],
            "prompt": made.prompt,
            "prompt_raw": made.prompt_raw,
            "negative_prompt_raw": made.negative_prompt_raw,
            "api": api.to_json(),
            "model": entry.model,
            "version": entry.version,
            "base_model": entry.base_model,
            "model_id": entry.model_id,
            "version_id": entry.version_id,
            "resolved_via": found.best.via,
            "confidence": found.best.confidence,
            "candidates": [
                {"version_id": x.version.version_id, "via": x.via, "confidence": x.confidence}
                for x in found.candidates
            ],
            "sampler_raw": made.sampler_raw,
            "loras_dropped": record.loras.dropped,
            "embeddings_dropped": sum(networks.dropped for networks in record.embeddings),
            "embeddings_raw": _embeddings(made),
            "size_from_image": made.size_from_image,
            "from_image": made.from_image,
            "form": made.form,
            "parser": PARSER_VERSION,
            "creator": _text(item.get("username")),
            "post_id": int64(item.get("postId")),
            "url": _text(item.get("url")),
            "created_at": _text(item.get("createdAt")),
            "nsfw_level": highest(level),
            "nsfw_source": level_source,
            "reactions": sum(counts.values()),
            "reaction_counts": counts,
            "generation": record.crawl,
            "first_seen": self._dates.get(record.crawl),
        }


def fingerprint(record: Record, *, kept: bool) -> dict[str, Any] | None:
    """What ``diffagent.schemas.tables.PRINTS`` has of a record, with the prompt in place of its
    shingles.

    None without a prompt or a known checkpoint.
    """
    found = record.found
    if isinstance(found, str) or not record.named.prompt.text:
        return None
    return {
        "id": record.item["id"],
        "generation": record.crawl,
        "post_id": int64(record.item.get("postId")),
        "creator": _text(record.item.get("username")),
        "base_model": found.first.base_model,
        "kept": kept,
        "prompt": record.named.prompt.text,
    }


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


def _embeddings(made: Generation) -> list[dict[str, Any]]:
    return [
        {"name": x.name, "hash": x.hash, "weight": x.weight, "negative": negative}
        for references, negative in ((made.embeddings, False), (made.negative_embeddings, True))
        for x in references
    ]


def _ids(value: object) -> list[int]:
    return [item for item in value if type(item) is int] if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
