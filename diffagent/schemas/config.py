"""Run configurations: frozen, bounded, described; all problems are reported at once.

A section is the configuration of one stage and part of that stage's identity.
``RuntimeConfig`` holds what changes how a stage runs but not what it makes.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from diffagent.schemas.yaml_file import YamlError, read_yaml

#: No path, file or terminal can hold these as text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def _check_characters(value: Any) -> None:
    if isinstance(value, str) and (match := _CONTROL.search(value)):
        raise ValueError(f"holds the character {match[0]!r}; leave it out")
    if isinstance(value, list | tuple | dict):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_characters(part)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse control characters and lone surrogates; a section looks at its own settings."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            _check_characters(value)
        return value


class CrawlConfig(_Section):
    """What to ask of the site."""

    site: str = Field(
        default="https://civitai.com",
        description="address of a Civitai API; or records on disk: 'dump:DIR' "
        "(records as JSON lines or parquet, or a snapshot), 'local:DIR' (a folder of model files) "
        "or 'release:DIR' (instruction-API pairs)",
    )
    model_types: tuple[str, ...] = Field(
        default=("Checkpoint", "LORA", "LoCon", "DoRA", "TextualInversion"),
        description="types to list; empty for all of them",
    )
    nsfw: bool = Field(default=False, description="ask for records above PG (filters still apply)")
    image_source: Literal["feed", "versions", "showcase"] = Field(
        default="versions",
        description="'versions': /images of every model version; 'showcase': at most ten pictures "
        "of each by its creator, from /model-versions/:id; 'feed': the whole /images listing",
    )
    max_models: int | None = Field(default=None, ge=1)
    max_images: int | None = Field(default=None, ge=1)
    model_pages: int = Field(
        default=0, ge=0, description="HTML pages to read for recommended settings, most used first"
    )

    @field_validator("site")
    @classmethod
    def _holds_no_secret(cls, site: str) -> str:
        """Refuse what would put a password into manifests, names and logs."""
        if not re.match("https?:", site, re.IGNORECASE):
            return site
        parts = urlsplit(site)
        if "@" in site or "\\" in site or parts.query or parts.fragment:
            raise ValueError(
                "an address has no user name, password or query here, since it is written into "
                "manifests; a token belongs into the environment variable CIVITAI_TOKEN"
            )
        return site


ModelFilter = Literal[
    "model_type", "base_model", "nsfw", "file_availability", "licence", "downloads"
]
RecordFilter = Literal[
    "media_type",
    "image_level",
    "checkpoint_resolved",
    "checkpoint_kept",
    "prompt",
    "parameters_parsed",
    "parameters_in_range",
    "text_to_image",
    "size_stated",
    "networks_complete",
    "reactions",
    "duplicate",
]
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "models": ("model_type", "nsfw", "file_availability"),
    "records": (
        "image_level",
        "checkpoint_resolved",
        "checkpoint_kept",
        "prompt",
        "parameters_parsed",
        "parameters_in_range",
    ),
}


class FilterConfig(_Section):
    """What enters DABench: which filters, in which order, with what limits.

    Names of filters and reasons are those of the drop funnel: an item is dropped by the first
    filter that has a reason. What each filter does is in
    ``diffagent.dabench.filter.model_filters`` and ``diffagent.dabench.filter.record_filters``.
    """

    models: tuple[ModelFilter, ...] = Field(
        default=("model_type", "base_model", "nsfw", "file_availability"),
        description="filters of model versions; also there: licence, downloads",
    )
    records: tuple[RecordFilter, ...] = Field(
        default=(
            "media_type",
            "image_level",
            "checkpoint_resolved",
            "checkpoint_kept",
            "prompt",
            "parameters_parsed",
            "parameters_in_range",
            "duplicate",
        ),
        description="filters of generation records; also there: text_to_image, size_stated, "
        "networks_complete, reactions",
    )
    model_types: tuple[str, ...] = ("Checkpoint", "LORA", "LoCon", "DoRA", "TextualInversion")
    base_models: tuple[str, ...] = Field(
        default=("SD 1.5", "SDXL 1.0"),
        description="as in the paper; Civitai's names, ecosystems ('sdxl', 'flux1') or 'all'",
    )
    allow_nsfw: bool = False
    allow_real_persons: bool = False
    max_image_nsfw_level: int = Field(default=1, ge=1, le=31, description="bit: 1 PG, 2 PG-13, 4 R")
    require_scans: bool = Field(default=True, description="pickle and virus scan must be Success")
    commercial_use: tuple[Literal["yes", "no", "unknown"], ...] = Field(
        default=("yes",), description="'licence': states of commercial use that pass"
    )
    min_downloads: int = Field(default=1, ge=0, description="'downloads': of the version")
    min_reactions: int = Field(default=1, ge=0, description="'reactions': of all kinds")
    min_steps: int = Field(default=1, ge=1)
    max_steps: int = Field(default=150, le=150)
    max_cfg_scale: float = Field(default=30, le=30)
    min_prompt_words: int = Field(default=1, ge=1)
    max_prompt_chars: int = Field(default=4000, ge=1)
    min_confidence: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="of the checkpoint's version. On showcases 0.7 answers 79 % of the pictures, "
        "94 % of them right to the version and 99 % to the model, and 2 % of the pictures whose "
        "checkpoint is not in the snapshot; 0.9 answers 74 %, 95 %, 99 % and none of those",
    )
    use_galleries: bool = Field(
        default=False,
        description="take the gallery that a picture was posted to for weak evidence of what made "
        "it; not where galleries are the truth that something is measured against",
    )
    max_hash_lookups: int = Field(
        default=0, ge=0, description="unknown checkpoint hashes to ask the site for; 0: none"
    )

    @model_validator(mode="after")
    def _check_filters(self) -> Self:
        for name, chosen in (("models", self.models), ("records", self.records)):
            if twice := sorted({x for x in chosen if chosen.count(x) > 1}):
                raise ValueError(f"{name} names {', '.join(twice)} twice")
            if missing := [x for x in _NEEDED[name] if x not in chosen]:
                raise ValueError(
                    f"{name} lacks {', '.join(missing)}, which cannot be left out; their settings "
                    "say what they let pass"
                )
        if "duplicate" in self.records[:-1]:
            raise ValueError("'duplicate' must be the last of records: it compares what is kept")
        return self


class DABenchConfig(_Section):
    """How pairs become a dataset."""

    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    test_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    rows_per_shard: int = Field(default=20_000, ge=1)
    near_duplicate_jaccard: float = Field(
        default=0.6, gt=0, le=1, description="prompts this alike (word pairs) share a split"
    )
    series_jaccard: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="the same for prompts of one creator; off from near_duplicate_jaccard on",
    )
    seed: int = Field(default=0, ge=0)


_BF16 = (
    "products of matrices in bfloat16 (autocast), weights in float32; null: on a GPU that has it. "
    "Worth its while on a CPU with AMX, too"
)
_CHECKPOINTING = (
    "share of the layers, the first ones, whose activations are made again in the backward pass: "
    "less memory for more time; true: all"
)


LRScheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


class _TrainingConfig(_Section):
    """Settings that SFT and RRHF share; names as in transformers and PEFT."""

    lora_rank: int = Field(default=0, ge=0, le=512, description="0 trains all parameters")
    lora_alpha: float | None = Field(
        default=None, gt=0, description="scale of an adapter is alpha / rank; null: twice the rank"
    )
    lora_dropout: float = Field(default=0, ge=0, lt=1, description="of an adapter's input")
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="modules that get an adapter: [q_proj, v_proj], ..."
    )
    bf16: bool | None = Field(default=None, description=_BF16)
    num_train_epochs: float = Field(default=3, gt=0)
    max_steps: int = Field(default=-1, ge=-1, description="-1: by epochs")
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    lr_scheduler_type: LRScheduler = Field(
        default="linear", description="course of the learning rate after the warm-up"
    )
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of the steps")
    max_length: int = Field(default=512, ge=32, description="tokens of prompt + response")
    save_steps: int = Field(
        default=200,
        ge=1,
        description="steps between checkpoints to resume from; with eval_steps they are written "
        "after each evaluation",
    )
    eval_steps: int = Field(
        default=0,
        ge=0,
        description="steps between measurements of the loss on prompts that are not trained on; "
        "the last step is measured too; 0: none",
    )
    load_best_model_at_end: bool = Field(
        default=True,
        description="with eval_steps: the agent is the checkpoint with the lowest loss there, "
        "else the last",
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        adapter = ("lora_alpha", "lora_dropout", "lora_target_modules")
        fields = type(self).model_fields
        idle = [n for n in adapter if getattr(self, n) != fields[n].default]
        if idle and not self.lora_rank:
            raise ValueError(f"{', '.join(idle)}: of adapters, which need a lora_rank above 0")
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules names no module; leave it out for all-linear")
        return self


class SFTConfig(_TrainingConfig):
    """Supervised fine-tuning on (prompt, API) pairs."""

    model: str = Field(
        default="tiny-llama",
        description="any causal LM by path or by name, NAME@REVISION to pin it; 'tiny-llama' "
        "is built from config, 'smollm2-135m' is in a package (extra smollm2)",
    )
    hidden_size: int = Field(default=128, ge=16, description="tiny-llama only")
    num_hidden_layers: int = Field(default=4, ge=1, description="tiny-llama only")
    vocab_size: int = Field(default=2048, ge=300, description="tiny-llama only: byte-level BPE")
    gradient_checkpointing: float = Field(default=0, ge=0, le=1, description=_CHECKPOINTING)
    per_device_train_batch_size: int = Field(default=16, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    batching: Literal["random", "by_length", "packed"] = Field(
        default="random",
        description="'by_length': rows of one batch are about equally long; 'packed': a row of the "
        "batch holds as many examples as fit into max_length, and none sees another",
    )
    eval_prompts: int = Field(
        default=1000, ge=1, description="of the validation split, drawn by the seed"
    )


Decoding = Literal["unconstrained", "constrained"]
_MAX_NEW_TOKENS: Any = Field(
    default=None,
    ge=8,
    description="of an answer; null: the room that the agent's max_length leaves after the prompt",
)


class SamplingConfig(_Section):
    """Candidates for RRHF."""

    num_prompts: int = Field(default=1000, ge=1, description="prompts of the train split")
    num_shards: int = Field(
        default=8,
        ge=1,
        description="parts of the prompts; each is sampled, rendered and scored by itself, best 30 "
        "s of work or more",
    )
    num_candidates: int = Field(default=4, ge=2, le=32, description="k, besides the DABench API")
    temperature: float = Field(default=0.8, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    num_beam_groups: int = Field(
        default=0,
        ge=0,
        description="num_candidates: diverse beam search, one beam a group, instead; 0: sampling",
    )
    diversity_penalty: float = Field(default=1.0, ge=0)
    max_new_tokens: int | None = _MAX_NEW_TOKENS
    batch_size: int = Field(default=16, ge=1, description="prompts per generate call")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="'vllm': for GPUs, with the extra of that name"
    )
    decoding: Decoding = Field(
        default="unconstrained",
        description="'unconstrained' also samples invalid answers, which rank last, as in the "
        "paper; 'constrained' has valid ones alone (transformers)",
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.num_beam_groups not in (0, self.num_candidates):
            raise ValueError(
                f"num_beam_groups must be 0 (sampling) or num_candidates ({self.num_candidates}): "
                "a group has one beam"
            )
        if self.num_beam_groups and self.engine == "vllm":
            raise ValueError("vLLM has no diverse beam search; set num_beam_groups: 0")
        if self.decoding == "constrained" and self.engine == "vllm":
            raise ValueError("vLLM samples unconstrained; set engine: transformers")
        return self


class SampleShard(SamplingConfig):
    """One shard of ``SamplingConfig``: what the stage ``sample`` takes."""

    shard: int = Field(ge=0, description="0 .. num_shards - 1")

    @model_validator(mode="after")
    def _check(self) -> SampleShard:
        if self.shard >= self.num_shards:
            raise ValueError(f"shard {self.shard} of {self.num_shards} does not exist")
        return self


class RenderConfig(_Section):
    """How an API call becomes a picture."""

    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="pictures per call")
    max_pixels: int = Field(default=1024 * 1024, ge=64 * 64, description="larger sizes are refused")
    max_failed_fraction: float = Field(default=0.1, ge=0, le=1)
    backend: Literal["diffusers", "a1111", "comfyui"] = Field(
        default="diffusers", description="what draws; the others are servers: runtime.render_url"
    )
    safety: Literal["off", "flag", "withhold"] = Field(
        default="off",
        description="check of pictures by a classifier (extra safety): 'flag' logs and records "
        "it, 'withhold' makes an unsafe picture a failed row",
    )
    safety_threshold: float = Field(
        default=0.8, gt=0, le=1, description="probability from which a picture is unsafe"
    )


_SHA256 = Field(
    default=None, pattern="^[0-9a-fA-F]{64}$", description="of the weights' file; checked if given"
)
ScorerDtype = Literal["float32", "bfloat16", "float16"]
_DTYPE: Any = Field(
    default="float32",
    description="of matrix products (autocast); bfloat16 moved cosines by up to 1.1e-3",
)


class PartConfig(_Section):
    """One part of a table of candidates: what the stage ``part`` takes."""

    num_parts: int = Field(ge=1)
    part: int = Field(ge=0, description="0 .. num_parts - 1")


class ScorerConfig(_Section):
    """One reward model."""

    name: Literal["clip", "image_reward", "hps_v2"]
    model: str = Field(
        description="open_clip name, 'v1.0' (ImageReward), 'v2' or 'v2.1' (HPS), or a directory"
    )
    weights: str | None = Field(
        default=None, description="local file, or hub id of the release, ID@REVISION to pin it"
    )
    sha256: str | None = _SHA256
    weight: float = Field(default=1.0, ge=0, description="weight in the unified score")
    backend: Literal["default", "official"] = Field(
        default="default",
        exclude_if=lambda backend: backend == "default",  # identities of before it existed
        description="'official': compute with the authors' package (image-reward, hpsv2)",
    )

    @model_validator(mode="after")
    def _check(self) -> ScorerConfig:
        if self.backend == "official" and self.name == "clip":
            raise ValueError("backend: 'clip' is open_clip itself; 'official' is for the others")
        return self


class RewardsConfig(_Section):
    """Which rewards, and how they become one number."""

    scorers: tuple[ScorerConfig, ...] = Field(min_length=1)
    unify: Literal["zscore", "chatgen"] = "zscore"
    reference: str | None = Field(
        default=None, description="'zscore': JSON file with mean and std of each metric"
    )
    invalid_floor: float = Field(default=-10.0, description="unified score of an invalid call")
    dtype: ScorerDtype = _DTYPE
    batch_size: int = Field(default=32, ge=1)


class JudgeConfig(_Section):
    """One held-out judge. Its names are none of `ScorerConfig`'s: it cannot become a reward."""

    name: Literal["pick_score", "aesthetic"]
    model: str = Field(
        description="'pick_score': directory or hub id (ID@REVISION pins it) of a CLIP in "
        "transformers' layout; "
        "'aesthetic': open_clip name or directory of the CLIP under the head"
    )
    weights: str | None = Field(default=None, description="'aesthetic': of a CLIP given by name")
    head: str | None = Field(default=None, description="'aesthetic': file of the head")
    sha256: str | None = _SHA256

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        if (self.name == "aesthetic") != (self.head is not None):
            raise ValueError("head: the file that 'aesthetic' needs, and no other judge has")
        return self


class JudgesConfig(_Section):
    """Who judges the pictures of an evaluation, beside the rewards that agents are trained on."""

    judges: tuple[JudgeConfig, ...] = ()
    dtype: ScorerDtype = _DTYPE
    batch_size: int = Field(default=32, ge=1)


class RRHFConfig(_TrainingConfig):
    """Training on ranked candidates: RRHF, equations 1 to 4 of arXiv 2304.05302, and others."""

    loss: Literal["rrhf", "dpo", "simpo", "gspo"] = Field(
        default="rrhf",
        description="ranking term: see diffagent.train.losses.ranking_loss; for the others as "
        "published set pairs: mean and sft_weight: 0",
    )
    formulation: Literal["packed", "padded"] = Field(
        default="packed",
        description="'packed': the candidates of a prompt share one pass over it, where the model "
        "can; 'padded': one row a candidate. The loss is the same",
    )
    gradient_checkpointing: float = Field(default=0.3, ge=0, le=1, description=_CHECKPOINTING)
    per_device_train_batch_size: int = Field(default=4, ge=1, description="prompts per step")
    eval_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="with eval_steps: share of the ranked prompts that is measured, not trained on",
    )
    rank_weight: float = Field(default=1.0, ge=0, description="weight of the ranking term")
    sft_weight: float = Field(default=1.0, ge=0, description="weight of L_ft")
    length_normalization: bool = Field(
        default=True, description="'rrhf': equation 1 divides by |y|; 'simpo' always does"
    )
    pairs: Literal["sum", "mean"] = Field(
        default="sum", description="equation 2 over the pairs of a prompt; 'sum' in the paper"
    )
    margin: float = Field(default=0.0, ge=0, description="0 as in the paper; 'simpo': its gamma")
    beta: float = Field(default=0.1, gt=0, description="'dpo', 'simpo': sharpness; 2 in SimPO")
    clip: float = Field(default=0.2, gt=0, description="'gspo': bound of the likelihood ratio")


class RatingsConfig(_Section):
    """Ratings that people gave to pictures: what the stage ``ratings`` takes."""

    path: str = Field(description="JSON file: see diffagent.train.ratings.read_ratings")


FittedSelector = Literal[
    "neighbours", "bm25", "embeddings", "cards", "card-embeddings", "model-token", "combined"
]
Selector = Literal["popular", "random", "nearest", "sft", "rrhf", "reranked"] | FittedSelector


class FitConfig(_Section):
    """A selector that is fitted, and kept: what the stage ``fit`` takes."""

    selector: FittedSelector = "combined"
    encoder: str = Field(
        default="",
        description="sentence encoder: 'minilm', a directory, a hub's NAME or NAME@REVISION, '' "
        "for none",
    )
    seed: int = Field(default=0, ge=0)


class RerankConfig(_Section):
    """A fitted selector that proposes, for an agent that chooses: what ``rerank`` takes."""

    retrieval: FittedSelector = "combined"
    encoder: str = Field(default="", description="as in FitConfig")
    candidates: int = Field(default=20, ge=2, description="models that are proposed")
    num_prompts: int = Field(
        default=500, ge=1, description="of the validation split, by which both are weighed"
    )
    seed: int = Field(default=0, ge=0)


class SelectConfig(_Section):
    """One selector's answers to held-out prompts: what the stage ``select`` takes."""

    selector: Selector
    split: Literal["validation", "test"] = "test"
    num_prompts: int = Field(default=200, ge=1)
    max_new_tokens: int | None = _MAX_NEW_TOKENS
    decoding: Decoding = Field(
        default="unconstrained",
        description="of an agent: 'unconstrained' shows what it hallucinates; 'constrained' has "
        "valid answers alone",
    )
    encoder: str = Field(
        default="",
        description="of fitted selectors: as in FitConfig; '' is MiniLM for those that need one",
    )
    seed: int = Field(
        default=0, ge=0, description="of the prompts drawn, of 'random' and of what is fitted"
    )


class EvaluationConfig(_Section):
    """What is compared, and on what."""

    selectors: tuple[Selector, ...] = ("popular", "random", "nearest", "combined", "sft", "rrhf")
    split: Literal["validation", "test"] = "test"
    num_prompts: int = Field(default=200, ge=2)
    max_new_tokens: int | None = _MAX_NEW_TOKENS
    decoding: Decoding = Field(default="unconstrained", description="as in SelectConfig")
    encoder: str = Field(default="", description="as in SelectConfig")
    num_shards: int = Field(
        default=1,
        ge=1,
        description="parts that each selector's answers are rendered and scored in; best 30 s of "
        "work or more each",
    )
    bootstrap_samples: int = Field(default=2000, ge=100)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    report_prompts: int = Field(default=12, ge=0, description="prompts shown with pictures")
    note: str = Field(default="", description="warning at the top of the report")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if self.num_shards > self.num_prompts:
            raise ValueError(f"{self.num_shards} num_shards are more than num_prompts")
        return self


class RuntimeConfig(_Section):
    """How stages run on this machine; never part of an identity."""

    store: str = Field(
        default="store",
        description="directory of artefacts, or an fsspec URI (s3://BUCKET/PREFIX); credentials "
        "and the endpoint are the environment's (AWS_*)",
    )
    cache: str | None = Field(
        default=None,
        description="of a store that is a URI: directory where its artefacts are built and read; "
        "$DIFFAGENT_CACHE or ~/.cache/diffagent",
    )
    cache_gb: float = Field(
        default=100,
        gt=0,
        description="GB of finished artefacts kept there; what was not used for longest goes first",
    )
    models: str | None = Field(
        default=None, description="cache of model files; 'models' in the store or in its cache"
    )
    models_max_gb: float | None = Field(
        default=None,
        gt=0,
        description="limit of that cache in 10^9 bytes: what was not used for the longest time "
        "goes, but nothing that is pinned or in use; no limit",
    )
    model_folders: tuple[str, ...] = Field(
        default=(),
        description="folders of model files, or installations of A1111 or ComfyUI, that are read "
        "in place before anything is downloaded",
    )
    max_downloads: int = Field(
        default=2, ge=1, le=32, description="of model files at once, by all processes"
    )
    device: str = Field(default="auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    workers: int = Field(default=2, ge=1, description="concurrent tasks of a flow")
    runner: Literal["threads", "ray", "workers"] = Field(
        default="threads",
        description="where a flow's samples, answers, renders and scores are made: in its own "
        "process, on Ray (extra ray; RAY_ADDRESS), or by Prefect workers (deployment run-stage)",
    )
    ray_gpus: float = Field(
        default=0, ge=0, description="GPUs that Ray reserves for a task that loads a network"
    )
    lost_after_seconds: float = Field(
        default=60,
        gt=0,
        description="a Prefect worker that was not heard of for so long has lost its stage",
    )
    requests_per_second: float | None = Field(
        default=None, gt=0, description="to the site; default 1, unlimited to a loopback address"
    )
    crawl_threads: int = Field(
        default=4, ge=1, le=64, description="calls to the site at once; all share one rate limit"
    )
    crawl_budget_seconds: float | None = Field(
        default=None, gt=0, description="a crawl stops after so long; the next one goes on"
    )
    refresh_share: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="part of the unchanged versions whose pictures a refresh asks for, those first "
        "that were not looked at for the longest",
    )
    reconcile: bool = Field(
        default=False,
        description="a refresh walks whole listings again and reports what it had missed (recall)",
    )
    faults: Literal["none", "flaky", "hostile"] = Field(
        default="none",
        description="faults of a local server that then serves the records of crawl.site; not for "
        "a web site",
    )
    render_url: str | None = Field(
        default=None,
        description="address of the server of render.backend a1111 or comfyui; credentials are "
        "$DIFFAGENT_RENDER_AUTH, USER:PASSWORD or 'Bearer TOKEN'",
    )
    render_timeout_seconds: float = Field(
        default=900, gt=0, description="that a server may take for a picture, loading included"
    )
    server_models: dict[str, str] = Field(
        default={},
        description="SHA256 -> file name on that server, of models that it has under other names",
    )
    decode_threads: int = Field(default=4, ge=1, le=64, description="that read pictures to score")
    compile_scorers: bool = Field(
        default=False, description="torch.compile: a minute at the start, faster batches after it"
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=(),
        description="where training logs its steps as it goes, beside the log in the agent; "
        "'tensorboard' (extra tensorboard) writes to logs/STAGE/IDENTITY in the local store",
    )
    stage_timeout_seconds: float = Field(default=6 * 3600, gt=0)

    @field_validator("*", mode="before")
    @classmethod
    def _check_lines(cls, value: Any) -> Any:
        """Refuse text of several lines: paths and addresses are printed a line each."""
        if isinstance(value, str) and "\n" in value:
            raise ValueError("holds a line end; leave it out")
        return value

    @property
    def models_directory(self) -> Path:
        """Where the cache of model files is."""
        return Path(self.models) if self.models else self.local_store / "models"

    @property
    def models_max_bytes(self) -> int | None:
        """The limit of that cache."""
        return None if self.models_max_gb is None else round(self.models_max_gb * 1e9)

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("store")
    @classmethod
    def _check_store(cls, store: str) -> str:
        if "://" in store and ("@" in store or "?" in store):
            raise ValueError("credentials and options of a store come from the environment alone")
        return store

    @property
    def remote(self) -> str | None:
        """The store's URI; None when it is a directory."""
        return self.store.rstrip("/") if "://" in self.store else None

    @property
    def local_store(self) -> Path:
        """Where artefacts are built and read: the store itself, or the cache of a remote one."""
        if self.remote is None:
            return Path(self.store)
        cache = self.cache or os.environ.get("DIFFAGENT_CACHE") or "~/.cache/diffagent"
        name = hashlib.sha256(self.remote.encode()).hexdigest()[:16]
        return Path(cache).expanduser() / name


class PipelineConfig(_Section):
    """The whole run."""

    crawl: CrawlConfig = CrawlConfig()
    filters: FilterConfig = FilterConfig()
    dabench: DABenchConfig = DABenchConfig()
    sft: SFTConfig = SFTConfig()
    sampling: SamplingConfig = SamplingConfig()
    render: RenderConfig = RenderConfig()
    rewards: RewardsConfig
    rrhf: RRHFConfig = RRHFConfig()
    judges: JudgesConfig = JudgesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _check(self) -> PipelineConfig:
        if self.dabench.validation_fraction + self.dabench.test_fraction >= 1:
            raise ValueError("dabench: validation_fraction + test_fraction must be below 1")
        if self.rewards.unify == "zscore" and not self.rewards.reference:
            raise ValueError("rewards.reference is needed for unify: zscore")
        return self


def _told(value: Any) -> str:
    """A value for a message: the start of it, without what a URI has of credentials."""
    text = re.sub("//.*@", "//***@", repr(value))
    text = re.sub("(//[^?]*[?]).*", r"\1***", text)
    return f"{text:.60}"


def _key(loc: tuple[int | str, ...]) -> str:
    """A dotted key as a person wrote it, on one line."""
    names = (
        part if re.fullmatch(r"[\w-]{1,60}", part) else f"{part!r:.60}" for part in map(str, loc)
    )
    return ".".join(names) or "config"


def _suggestion(error: Any) -> str:
    """The key that an unknown one was meant to be, where one is like it."""
    *parents, key = error["loc"] or ("",)
    if error["type"] != "extra_forbidden":
        return ""
    names = _keys_at(PipelineConfig, [part for part in parents if isinstance(part, str)])
    like = difflib.get_close_matches(str(key), names, n=1, cutoff=0.6)
    if like:
        return f"; did you mean {like[0]!r}?"
    elsewhere = [
        f"{section}.{key}"
        for section in PipelineConfig.model_fields
        if key in _keys_at(PipelineConfig, [section])
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; there are: {', '.join(sorted(names))}" if names else ""


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the section that ``path`` leads to; none where it leads elsewhere."""
    for name in path:
        field = model.model_fields.get(name)
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)


class ConfigFileError(ValueError):
    """A configuration file is wrong; the message lists every problem."""


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> PipelineConfig:
    """Read a YAML file; ``overrides`` maps dotted keys ('runtime.store') to values.

    Raises:
        ConfigFileError: the file is missing or not YAML, or any field is wrong (all are listed).
    """
    try:
        data = read_yaml(Path(path))
    except OSError as error:
        raise ConfigFileError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (YamlError, ValueError) as error:  # a path with a NUL is a ValueError
        raise ConfigFileError(f"{str(path)!r} cannot be read as YAML: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise ConfigFileError(f"{str(path)!r} must be a mapping of sections, got {data!r:.80}")
    return configure(data or {}, overrides, path)


def configure(
    data: dict[str, Any], overrides: dict[str, Any] | None, path: str | Path
) -> PipelineConfig:
    """Check settings, changed by ``overrides``; ``path`` is their name in messages.

    Raises:
        ConfigFileError: a field is wrong (all are listed).
    """
    for dotted, value in (overrides or {}).items():
        *parents, leaf = dotted.split(".")
        target = data
        for key in parents:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise ConfigFileError(f"cannot set {dotted!r}: {key!r} is {_told(target)}")
        target[leaf] = value
    try:
        return PipelineConfig.model_validate(data)
    except ValidationError as error:
        problems = [
            f"  {_key(e['loc'])}: {e['msg']} (got {_told(e['input'])}){_suggestion(e)}"
            for e in error.errors()
        ]
        raise ConfigFileError(
            "\n".join([f"{str(path)!r}: {len(problems)} problem(s)", *problems])
        ) from None
