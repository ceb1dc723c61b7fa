"""A recipe: everything that determines a picture, in no renderer's terms.

Models are named by the SHA256 of their files, not by names that a site may reuse, so that equal
recipes are equal pictures in any run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from diffagent.errors import RenderError
from diffagent.schemas.api import T2IAPI, Network
from diffagent.store import canonical_json
from diffagent.t2i.metadata.a1111 import shortest
from diffagent.t2i.samplers import SAMPLERS, normalise

if TYPE_CHECKING:
    from diffagent.t2i.catalogue import Catalogue, Entry

#: Ecosystems whose checkpoints the diffusers backend reads from a single file.
SUPPORTED = frozenset({"sd1", "sd2", "sdxl"})


#: Base model of a file of one's own that does not state it: drawing decides whether it fits.
UNKNOWN_BASE_MODEL = "unknown"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoRAUse(_Frozen):
    """A LoRA file and its strength."""

    sha256: str
    weight: float


class EmbeddingUse(_Frozen):
    """A textual inversion's file, in front of one of the prompts."""

    sha256: str
    weight: float
    negative: bool


class Recipe(_Frozen):
    """One picture to be made. ``loras`` are sorted by hash, each file once."""

    prompt: str
    negative_prompt: str
    checkpoint: str = Field(description="SHA256 of the checkpoint's file, lower case")
    vae: str | None = Field(default=None, description="SHA256 of another VAE; None: its own")
    loras: tuple[LoRAUse, ...] = ()
    embeddings: tuple[EmbeddingUse, ...] = ()
    sampler: str = Field(description="a key of diffagent.t2i.samplers.SAMPLERS")
    steps: int
    cfg_scale: float
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    clip_skip: int = Field(description="1 = last layer of CLIP")
    seed: int

    @property
    def digest(self) -> str:
        """SHA256 of the canonical JSON, without what is unset: the picture's name."""
        told = self.model_dump(mode="json", exclude_none=True)
        return hashlib.sha256(canonical_json(told)).hexdigest()

    def text(
        self,
        words: Mapping[str, str],
        *,
        negative: bool,
        write_weight: Callable[[float], str] = lambda weight: shortest(round(weight, 4)),
    ) -> str:
        """Return a prompt with its embeddings in front, as one writes them in the WebUI.

        Args:
            words: SHA256 of an embedding's file -> its word in the prompt.
            negative: the negative prompt instead of the prompt.
            write_weight: spelling of a weight other than 1, as in ``(WORD:1.2)``.
        """
        prompt = self.negative_prompt if negative else self.prompt
        used = [
            words[use.sha256]
            if use.weight == 1
            else f"({words[use.sha256]}:{write_weight(use.weight)})"
            for use in self.embeddings
            if use.negative == negative
        ]
        return ", ".join([*used, prompt] if prompt else used)


def resolve(api: T2IAPI, prompt: str, seed: int, catalogue: Catalogue) -> Recipe:
    """The recipe of an API call.

    Args:
        api: the call; its own seed is not used, so that all answers are drawn with the same.
        prompt: the text to draw.
        seed: of the initial noise.
        catalogue: what the names mean.

    Raises:
        RenderError: the call cannot be rendered; ``reason`` is one of 'unknown-model',
            'unknown-lora', 'unknown-embedding', 'unsupported-base-model', 'lora-base-mismatch',
            'embedding-base-mismatch', 'no-hash', 'unsupported-sampler'.
    """
    checkpoint = catalogue.checkpoint(api.model, api.version)
    if checkpoint is None:
        raise RenderError(
            f"the catalogue has no checkpoint {api.model!r}, {api.version!r}",
            reason="unknown-model",
        )
    if checkpoint.ecosystem not in SUPPORTED and checkpoint.base_model != UNKNOWN_BASE_MODEL:
        raise RenderError(
            f"{api.model!r} is based on {checkpoint.base_model!r}, which is not supported",
            reason="unsupported-base-model",
        )
    weights: dict[str, float] = {}
    for lora in api.loras:
        entry = catalogue.lora(lora.model, lora.version)
        sha256 = _fitting("lora", lora, entry, checkpoint)
        weights[sha256] = weights.get(sha256, 0.0) + lora.weight
    return Recipe(
        prompt=prompt,
        negative_prompt=api.negative_prompt,
        checkpoint=_hash(checkpoint),
        loras=tuple(LoRAUse(sha256=sha, weight=weights[sha]) for sha in sorted(weights)),
        embeddings=tuple(
            EmbeddingUse(
                sha256=_fitting(
                    "embedding", item, catalogue.embedding(item.model, item.version), checkpoint
                ),
                weight=item.weight,
                negative=item.negative,
            )
            for item in api.embeddings
        ),
        sampler=_sampler(api.params.sampler),
        seed=seed,
        **api.params.model_dump(include={"steps", "cfg_scale", "width", "height", "clip_skip"}),
    )


def _fitting(kind: str, network: Network, entry: Entry | None, checkpoint: Entry) -> str:
    """The hash of a network's file."""
    if entry is None:
        raise RenderError(
            f"the catalogue has no {kind} {network.model!r}, {network.version!r}",
            reason=f"unknown-{kind}",
        )
    is_known = UNKNOWN_BASE_MODEL not in {entry.base_model, checkpoint.base_model}
    if is_known and entry.ecosystem != checkpoint.ecosystem:
        raise RenderError(
            f"{kind} {network.model!r} is for {entry.base_model!r}, "
            f"{checkpoint.model!r} is {checkpoint.base_model!r}",
            reason=f"{kind}-base-mismatch",
        )
    return _hash(entry)


def _hash(entry: Entry) -> str:
    if entry.sha256 is None:
        raise RenderError(
            f"{entry.model!r}, {entry.version!r} has no SHA256, so its file cannot be verified",
            reason="no-hash",
        )
    return entry.sha256.lower()


def _sampler(raw: str) -> str:
    name = normalise(raw)
    if name is None or not SAMPLERS[name].renderable:
        raise RenderError(f"no scheduler for sampler {raw!r}", reason="unsupported-sampler")
    return name


def by_hash(catalogue: Catalogue) -> Mapping[str, Entry]:
    """The catalogue's entries by the hash of their file; the first of equal ones."""
    index: dict[str, Entry] = {}
    for entry in catalogue.entries:
        if entry.sha256:
            index.setdefault(entry.sha256.lower(), entry)
    return index
