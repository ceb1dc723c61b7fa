"""From a generation record to an (instruction, API) pair, or to the reason why not.

The record-level filters, in their order: the record itself, media type, image level, prompt,
parameters parsed, parameters in range, checkpoint resolved, checkpoint kept, duplicates.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from diffagent.dabench.catalogue import Entry, int64
from diffagent.dabench.metadata import Generation, parse_generation
from diffagent.dabench.resolve import Candidate, Resolution, Resolver
from diffagent.render.samplers import SAMPLERS
from schemas.api import T2IAPI, LoRA, Params
from schemas.civitai import X, level_of
from schemas.config import FilterConfig

RECORD_FILTERS = (
    "record",
    "media_type",
    "image_level",
    "prompt",
    "parameters_parsed",
    "parameters_in_range",
    "checkpoint_resolved",
    "checkpoint_kept",
    "duplicate",
)

MAX_NEGATIVE_CHARS = 4000  # of schemas.api.T2IAPI
_REACTIONS = ("like", "heart", "laugh", "cry")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that is not kept: which filter, and why."""

    filter: str
    reason: str


def media_type(item: Mapping[str, Any]) -> str | None:
    """Pictures only; records of 2023 have no type and are pictures."""
    kind = item.get("type")
    if kind in (None, "image"):
        return None
    return kind if kind in ("video", "audio") else "not an image"


def image_bits(item: Mapping[str, Any]) -> int:
    """Browsing level of a picture as a bitmask, from any of the shapes it has had; 0 unknown."""
    for value in (item.get("browsingLevel"), item.get("nsfwLevel"), item.get("nsfw")):
        if value is True:  # 2023: anything above Soft; today: above PG. The worst is assumed.
            return X
        if (level := level_of(value)) is not None:
            return level
    return 0


def image_level(item: Mapping[str, Any], config: FilterConfig) -> str | None:
    """The picture's own level, whatever its model's; unknown is not allowed."""
    if item.get("minor") is True:
        return "minor"
    if item.get("poi") is True and not config.allow_real_persons:
        return "real person"
    bits = image_bits(item)
    if not bits:
        return "level unknown"
    return "level above the limit" if _highest(bits) > config.max_image_nsfw_level else None


def _highest(bits: int) -> int:
    return 1 << (bits.bit_length() - 1)


def prompt_present(item: Mapping[str, Any], generation: Generation, limit: int) -> str | None:
    """There is a prompt to learn from, of at most ``limit`` characters."""
    if not item.get("meta"):
        return "no metadata"
    if not generation.prompt:
        return "no prompt"
    return "prompt too long" if len(generation.prompt) > limit else None


def parameters_parsed(generation: Generation) -> str | None:
    """All that it takes to run the model is known."""
    if generation.sampler_raw is None:
        return "no sampler"
    if generation.sampler is None:
        return "unknown sampler"
    if not SAMPLERS[generation.sampler].renderable:
        return "sampler without a diffusers scheduler"
    if generation.steps is None:
        return "no steps"
    if generation.cfg_scale is None:
        return "no cfg_scale"
    return None if generation.width and generation.height else "no size"


def parameters_in_range(generation: Generation, config: FilterConfig) -> Params | str:
    """The parameters of the API, or the first one that is out of range."""
    steps, cfg_scale = generation.steps or 0, generation.cfg_scale or 0.0
    if not config.min_steps <= steps <= config.max_steps:
        return "steps"
    if cfg_scale > config.max_cfg_scale:
        return "cfg_scale"
    try:
        return Params(
            sampler=generation.sampler or "",
            steps=steps,
            cfg_scale=round(cfg_scale, 4),
            width=generation.width or 0,
            height=generation.height or 0,
            clip_skip=generation.clip_skip,
            seed=generation.seed,
        )
    except ValidationError as error:
        return str(error.errors()[0]["loc"][0])


class PairBuilder:
    """Turns records into rows of ``schemas.dabench.RECORDS``; remembers what it has seen."""

    def __init__(self, config: FilterConfig, resolver: Resolver) -> None:
        self._config = config
        self._resolver = resolver
        self._seen: set[int] = set()
        self.loras: Counter[str] = Counter()  # what became of those in metadata: see Resolver.loras

    def build(self, item: Mapping[str, Any] | None) -> dict[str, Any] | Dropped:
        """The row of a record, or why there is none. Never raises, whatever the JSON."""
        if item is None:
            return Dropped("record", "not an object with an id")
        if reason := media_type(item):
            return Dropped("media_type", reason)
        if reason := image_level(item, self._config):
            return Dropped("image_level", reason)
        generation = parse_generation(
            item.get("meta"), image_width=item.get("width"), image_height=item.get("height")
        )
        if reason := prompt_present(item, generation, self._config.max_prompt_chars):
            return Dropped("prompt", reason)
        if reason := parameters_parsed(generation):
            return Dropped("parameters_parsed", reason)
        params = parameters_in_range(generation, self._config)
        if isinstance(params, str):
            return Dropped("parameters_in_range", params)
        if len(generation.negative_prompt) > MAX_NEGATIVE_CHARS:
            return Dropped("parameters_in_range", "negative_prompt")
        found = self._resolve(item, generation)
        if isinstance(found, str):
            return Dropped("checkpoint_resolved", found)
        if found.best.version.dropped:
            return Dropped("checkpoint_kept", found.best.version.dropped)
        return self._row(item, generation, params, found)

    def _resolve(self, item: Mapping[str, Any], generation: Generation) -> Resolution | str:
        """The checkpoint that is sure enough, or why there is none."""
        base_model, created_at = item.get("baseModel"), item.get("createdAt")
        found = self._resolver.checkpoint(
            generation.checkpoints,
            base_model=base_model if isinstance(base_model, str) else None,
            loras=generation.loras,
            created_at=created_at if isinstance(created_at, str) else None,
            gallery=_ids(item.get("modelVersionIds")) if self._config.use_galleries else (),
        )
        if isinstance(found, str):
            return found
        return found.doubt(self._config.min_confidence) or found

    def _row(
        self, item: Mapping[str, Any], generation: Generation, params: Params, found: Resolution
    ) -> dict[str, Any] | Dropped:
        entry = self._resolver.entry(found.best.version)
        loras, outcomes = self._resolver.loras(generation.loras, entry)
        api = make_api(entry, loras, params, generation.negative_prompt)
        digest = _digest(generation.prompt, api)
        if digest in self._seen:
            return Dropped("duplicate", "same prompt and API")
        self._seen.add(digest)
        self.loras.update(outcomes)
        creator, url, post_id = item.get("username"), item.get("url"), item.get("postId")
        return {
            "id": item["id"],
            "prompt": generation.prompt,
            "prompt_raw": generation.prompt_raw,
            "api": api.to_json(),
            "model": entry.model,
            "version": entry.version,
            "base_model": entry.base_model,
            "model_id": entry.model_id,
            "version_id": entry.version_id,
            "resolved_via": found.best.via,
            "confidence": found.best.confidence,
            "candidates": [_candidate(candidate) for candidate in found.candidates],
            "sampler_raw": generation.sampler_raw,
            "loras_dropped": len(outcomes) - len(loras),
            "form": generation.form,
            "creator": creator if isinstance(creator, str) else None,
            "post_id": int64(post_id),
            "url": url if isinstance(url, str) else None,
            "nsfw_level": _highest(image_bits(item)),
            "reactions": _reactions(item.get("stats")),
        }


def make_api(
    entry: Entry, loras: list[tuple[Entry, float]], params: Params, negative_prompt: str
) -> T2IAPI:
    """The full API record of a call: what an agent writes, and what the catalogue knows."""
    return T2IAPI(
        model=entry.model,
        version=entry.version,
        base_model=entry.base_model,
        air=entry.air,
        loras=tuple(
            LoRA(model=lora.model, version=lora.version, weight=weight) for lora, weight in loras
        ),
        params=params,
        negative_prompt=negative_prompt,
        description=entry.description[:500] or None,
    )


def _ids(value: object) -> list[int]:
    return [item for item in value if type(item) is int] if isinstance(value, list) else []


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "version_id": candidate.version.version_id,
        "via": candidate.via,
        "confidence": candidate.confidence,
    }


def _digest(prompt: str, api: T2IAPI) -> int:
    """64 bits of what a pair teaches: the prompt and the response, without seed."""
    text = f"{prompt.casefold()}\0{api.response().to_json()}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _reactions(stats: object) -> int:
    if not isinstance(stats, dict):
        return 0
    counts = (int64(stats.get(f"{name}Count", stats.get(name))) or 0 for name in _REACTIONS)
    return sum(count for count in counts if 0 < count < 2**31)
