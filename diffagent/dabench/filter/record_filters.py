"""The filters of generation records: each gives its reason, or None to let pass.

``filters.records`` says which apply, and in which order. A `Record` reads its metadata only as far
as somebody asks: most records of the site name a checkpoint that is not in the snapshot, and those
cost no more than the lookup of a hash.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from diffagent.dabench.filter.filter_config import FilterConfig, RecordFilter
from diffagent.dabench.filter.resolve import Networks, Resolution, Resolver
from diffagent.schemas.api import Params
from diffagent.schemas.payloads import X, generation_of, level_of
from diffagent.t2i.catalogue import Entry
from diffagent.t2i.metadata import (
    NOTHING_NAMED,
    Generation,
    Named,
    checkpoints,
    read_keys,
    read_metadata,
    read_named,
)
from diffagent.t2i.samplers import SAMPLERS

MAX_NEGATIVE_CHARS = 4000  # of diffagent.schemas.api.T2IAPI
_LEVELS = ("browsingLevel", "nsfwLevel", "nsfw")


class Record:
    """An item of the site's pictures, and what its metadata says, read when it is asked for."""

    def __init__(
        self, item: Mapping[str, Any], resolver: Resolver, gallery: Collection[int] = ()
    ) -> None:
        self.item = item
        #: The metadata in the site's keys; None when there is none.
        self.reading = read_metadata(item.get("meta"))
        self._resolver = resolver
        #: The checkpoints that may have been used, or why none is known.
        self.found: Resolution | str = "no metadata"
        #: The likeliest in the catalogue; None when none is known, or it was not kept.
        self.entry: Entry | None = None
        if self.reading is not None:
            self._checkpoints = checkpoints(self.reading)
            base_model, created_at = item.get("baseModel"), item.get("createdAt")
            self.found = resolver.checkpoint(
                self._checkpoints,
                base_model=base_model if isinstance(base_model, str) else None,
                loras=(lora for _ in range(1) for lora in self.named.loras),  # when asked
                created_at=created_at if isinstance(created_at, str) else None,
                gallery=gallery,
            )
            if not isinstance(self.found, str) and not self.found.best.version.dropped:
                self.entry = resolver.entry(self.found.best.version)

    @cached_property
    def named(self) -> Named:
        """What of the metadata names models."""
        return read_named(self.reading, self._checkpoints) if self.reading else NOTHING_NAMED

    @cached_property
    def generation(self) -> Generation:
        """What the metadata says."""
        if self.reading is None:
            return Generation()
        item = self.item
        return read_keys(self.reading, item.get("width"), item.get("height"), self.named)

    @cached_property
    def loras(self) -> Networks:
        """The LoRAs that fit the checkpoint."""
        return self._resolver.loras(self.generation.loras, self.entry) if self.entry else Networks()

    @cached_property
    def embeddings(self) -> tuple[Networks, Networks]:
        """The embeddings of the prompt and of the negative prompt that fit the checkpoint."""
        if not self.entry:
            return Networks(), Networks()
        made = self.generation
        return (
            self._resolver.embeddings(made.embeddings, self.entry),
            self._resolver.embeddings(made.negative_embeddings, self.entry),
        )

    @cached_property
    def params(self) -> Params | str:
        """The parameters of the API, or the first one that an API cannot have."""
        made = self.generation
        try:
            return Params(
                sampler=made.sampler or "",
                steps=made.steps or 0,
                cfg_scale=round(made.cfg_scale or 0.0, 4),
                width=made.width or 0,
                height=made.height or 0,
                clip_skip=made.clip_skip,
                seed=made.seed,
            )
        except ValidationError as error:
            return str(error.errors()[0]["loc"][0])

    @property
    def level(self) -> tuple[int, str | None]:
        """Browsing level as a bitmask (0: unknown), and the field of the item that says so."""
        for name in _LEVELS:
            value = self.item.get(name)
            # 2023: anything above Soft; today: above PG. The worst is assumed.
            level = X if value is True else level_of(value)
            if level is not None:
                return level, name
        return 0, None

    @property
    def crawl(self) -> int:
        """The generation of the snapshot that has both the picture and its checkpoint first."""
        own = generation_of(self.item)
        return own if isinstance(self.found, str) else max(own, self.found.first.generation)


def media_type(record: Record, config: FilterConfig) -> str | None:
    """Pictures only; records of 2023 have no type and are pictures."""
    kind = record.item.get("type")
    if kind in (None, "image"):
        return None
    return kind if kind in ("video", "audio") else "not an image"


def image_level(record: Record, config: FilterConfig) -> str | None:
    """The picture's own level, whatever its model's; unknown is not allowed."""
    if record.item.get("minor") is True:
        return "minor"
    if record.item.get("poi") is True and not config.allow_real_persons:
        return "real person"
    bits, _ = record.level
    if not bits:
        return "level unknown"
    return "level above the limit" if highest(bits) > config.max_image_nsfw_level else None


def highest(bits: int) -> int:
    """The highest level of a bitmask that is not empty."""
    return 1 << (bits.bit_length() - 1)


def checkpoint_resolved(record: Record, config: FilterConfig) -> str | None:
    """It is known, surely enough, which checkpoint made the picture."""
    if isinstance(record.found, str):
        return record.found
    return record.found.doubt(config.min_confidence)


def checkpoint_kept(record: Record, config: FilterConfig) -> str | None:
    """That checkpoint passed the filters of models."""
    return None if isinstance(record.found, str) else record.found.best.version.dropped or None


def prompt(record: Record, config: FilterConfig) -> str | None:
    """There is a prompt to learn from, of bounded length."""
    text = record.generation.prompt
    if not text:
        return "no prompt"
    if len(text) > config.max_prompt_chars:
        return "prompt too long"
    return "too few words" if len(text.split()) < config.min_prompt_words else None


def parameters_parsed(record: Record, config: FilterConfig) -> str | None:
    """All that it takes to run the model is known."""
    made = record.generation
    if made.sampler_raw is None:
        return "no sampler"
    if made.sampler is None:
        return "unknown sampler"
    if not SAMPLERS[made.sampler].renderable:
        return "sampler without a diffusers scheduler"
    if made.steps is None:
        return "no steps"
    if made.cfg_scale is None:
        return "no cfg_scale"
    if made.not_known:
        return f"{made.not_known[0]} not known"
    return None if made.width and made.height else "no size"


def parameters_in_range(record: Record, config: FilterConfig) -> str | None:
    """Parameters that an API can have, within the limits of the configuration."""
    made = record.generation
    if not config.min_steps <= (made.steps or 0) <= config.max_steps:
        return "steps"
    if (made.cfg_scale or 0.0) > config.max_cfg_scale:
        return "cfg_scale"
    if isinstance(record.params, str):
        return record.params
    return "negative_prompt" if len(made.negative_prompt) > MAX_NEGATIVE_CHARS else None


def text_to_image(record: Record, config: FilterConfig) -> str | None:
    """Pictures that began with noise: no img2img, no inpainting."""
    return "began with a picture" if record.generation.from_image else None


def size_stated(record: Record, config: FilterConfig) -> str | None:
    """The metadata has the size; else the picture's own stands in, unless it was scaled."""
    return "size of the picture only" if record.generation.size_from_image else None


def networks_complete(record: Record, config: FilterConfig) -> str | None:
    """Every LoRA and embedding that the metadata names is in the API."""
    if record.loras.dropped:
        return "a LoRA that the catalogue lacks"
    if any(networks.dropped for networks in record.embeddings):
        return "an embedding that the catalogue lacks"
    return None


def reactions(record: Record, config: FilterConfig) -> str | None:
    """Pictures that people reacted to."""
    few = sum(reaction_counts(record.item).values()) < config.min_reactions
    return "too few reactions" if few else None


RECORD_FILTERS: Mapping[RecordFilter, Callable[[Record, FilterConfig], str | None]] = {
    "media_type": media_type,
    "image_level": image_level,
    "checkpoint_resolved": checkpoint_resolved,
    "checkpoint_kept": checkpoint_kept,
    "prompt": prompt,
    "parameters_parsed": parameters_parsed,
    "parameters_in_range": parameters_in_range,
    "text_to_image": text_to_image,
    "size_stated": size_stated,
    "networks_complete": networks_complete,
    "reactions": reactions,
}


def reaction_counts(item: Mapping[str, Any]) -> dict[str, int]:
    """Returns the count of each of the site's four reactions; 0 where the record states none."""
    stats = item.get("stats")
    if not isinstance(stats, dict):
        stats = {}
    counts = {}
    for name in ("like", "heart", "laugh", "cry"):
        value = stats.get(f"{name}Count", stats.get(name))
        counts[name] = value if type(value) is int and 0 < value < 2**31 else 0
    return counts
