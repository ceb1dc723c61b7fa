"""CLIP score: the cosine of CLIP's text and image features, through open_clip."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from diffagent import compat
from diffagent.errors import ConfigError, ScoreError
from diffagent.pretrained import no_remote_code
from diffagent.rewards.image_batches import Preparation
from diffagent.rewards.scorer import PromptCache, Runtime, Scorer, batches, content_digest
from diffagent.rewards.weight_files import check_sha256, hub_file

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
VOCABULARY = "bpe_vocabulary.txt.gz"


class ClipScorer(Scorer):
    """Cosine of text and image features, in -1 to 1 (about 0.15 to 0.35 with real models)."""

    name = "clip"
    scale = 1.0
    """Factor of the cosine."""

    def __init__(self, model: Any, tokenizer: Any, preparation: Preparation, **options: Any):
        """Wraps a loaded network; `load` is the usual way.

        Args:
            model: has ``encode_image`` and ``encode_text``, as an open_clip model.
            tokenizer: texts to (B, L) int64, with ``encode`` or a wrapped ``tokenizer``.
            preparation: resizing that the network expects.
            options: see `diffagent.rewards.scorer.Scorer`.
        """
        super().__init__(model, preparation, **options)
        import torch

        self.tokenizer = tokenizer
        self._text = PromptCache(self._encode_texts)
        self._encode_image = torch.compile(model.encode_image) if self.compiled else None

    @classmethod
    def load(
        cls,
        model: str,
        weights: str | Path | None = None,
        *,
        sha256: str | None = None,
        runtime: Runtime | None = None,
    ) -> Self:
        """Loads a model of open_clip.

        Args:
            model: an open_clip name such as ``ViT-L-14``, or a directory with
                ``open_clip_config.json``, ``open_clip_model.safetensors`` and, where the
                vocabulary is not CLIP's, ``bpe_vocabulary.txt.gz``.
            weights: for a name: an open_clip tag such as ``openai``, or a file. OpenAI's
                weights were trained with QuickGELU: their tag sets it, for their file name
                the ``-quickgelu`` architecture.
            sha256: of the file of weights, which is checked.
            runtime: where and how to compute; by default in float32 on the CPU.

        Raises:
            ConfigError: no such model, tag or file, or a file of another hash.
            ScoreError: the weights do not fit the architecture.
        """
        return cls.from_network(*load_open_clip(model, weights, sha256), runtime)

    @classmethod
    def from_network(
        cls, network: Any, tokenizer: Any, version: str, runtime: Runtime | None
    ) -> Self:
        """Wraps a network of open_clip as `load_open_clip` returns it."""
        config = dict(network.visual.preprocess_cfg)
        preparation, settings = cls._preparation(config)
        return cls(
            network,
            tokenizer,
            preparation,
            mean=config["mean"],
            std=config["std"],
            version=version,
            digest=content_digest(network, {"scorer": cls.name, **settings}),
            runtime=runtime or Runtime(),
        )

    @staticmethod
    def _preparation(config: dict[str, Any]) -> tuple[Preparation, dict[str, Any]]:
        """Returns the preparation of a ``preprocess_cfg``, and its settings for the digest."""
        return Preparation.from_open_clip(config), config

    def _rewards(
        self, prompts: Sequence[str], pixels: torch.Tensor
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        import torch

        texts = self._text.get(prompts)
        text_features = torch.stack([features for features, _ in texts])
        encode = self._encode_image or self.model.encode_image
        image_features = torch.nn.functional.normalize(encode(pixels).float(), dim=-1)
        cosines = (text_features * image_features).sum(-1)
        return self.scale * cosines, np.array([truncated for _, truncated in texts])

    def _encode_texts(self, prompts: Sequence[str]) -> list[tuple[torch.Tensor, bool]]:
        """Returns unit-length features (D,) float32 of each prompt, and whether it was cut."""
        import torch

        encoded: list[tuple[torch.Tensor, bool]] = []
        for part in batches(prompts, self.batch_size):
            features = encode_text(self.model, self.tokenizer(list(part)), self.device)
            unit = torch.nn.functional.normalize(features.float(), dim=-1)
            cut = [self._is_truncated(prompt) for prompt in part]
            encoded.extend(zip(unit, cut, strict=True))
        return encoded

    def _is_truncated(self, prompt: str) -> bool:
        limit = self.tokenizer.context_length
        if hasattr(self.tokenizer, "encode"):  # open_clip's own BPE: start and end are added
            return bool(len(self.tokenizer.encode(prompt)) + 2 > limit)
        return bool(len(self.tokenizer.tokenizer(prompt).input_ids) > limit)


def encode_text(network: Any, ids: torch.Tensor, device: str) -> torch.Tensor:
    """Returns text features (B, D) of token ids (B, L), without computing the padding.

    In CLIP's own text tower a token attends only to those before it, and the features are those of
    the end token, which has the highest id: the zeros after it change nothing and are cut off.
    Other towers get all tokens.
    """
    import torch
    from open_clip.model import CLIP

    causal = isinstance(network, CLIP) and network.attn_mask is not None
    if not (causal and network.text_pool_type == "argmax"):
        return network.encode_text(ids.to(device))  # type: ignore[no-any-return]
    ends = ids.argmax(-1)
    length = int(ends.max()) + 1
    states = network.token_embedding(ids[:, :length].to(device))
    states = network.transformer(
        states + network.positional_embedding[:length],
        attn_mask=network.attn_mask[:length, :length],
    )
    last: torch.Tensor = network.ln_final(states[torch.arange(len(ids)), ends])
    projection = network.text_projection
    if projection is None:
        return last
    projected: torch.Tensor = projection(last) if callable(projection) else last @ projection
    return projected


def load_open_clip(
    model: str, weights: str | Path | None, sha256: str | None = None
) -> tuple[Any, Any, str]:
    """Returns an open_clip network in float32 on the CPU, its tokenizer, and its version's name.

    Raises:
        ConfigError: no such model, tag or file, or a file of another hash.
        ScoreError: the weights do not fit the architecture.
    """
    compat.install()
    import open_clip

    directory = Path(model)
    if directory.is_dir():
        return _load_directory(directory, weights, sha256)
    if weights is None or open_clip.get_model_config(model) is None:
        raise ConfigError(
            f"scorer model {model!r} with weights {weights!r} cannot be loaded: give a directory "
            f"with {CONFIG} and {WEIGHTS}, or an open_clip architecture (open_clip.list_models()) "
            "together with a pretrained tag or a file"
        )
    tag = open_clip.get_pretrained_cfg(model, str(weights))
    if not tag and not Path(weights).is_file():
        raise ConfigError(
            f"weights {str(weights)!r} of {model!r} are neither a file nor one of the tags "
            f"{open_clip.list_pretrained_tags_by_model(model)}"
        )
    file = _download(tag) if tag else Path(weights)
    check_sha256(file, sha256)
    try:
        with no_remote_code(model):
            network = open_clip.create_model(
                model,
                pretrained=str(file),
                force_quick_gelu=bool(tag and tag.get("quick_gelu")),
                force_preprocess_cfg=tag or None,
                weights_only=True,
            )
            tokenizer = open_clip.get_tokenizer(model)
    except RuntimeError as error:
        raise ScoreError(f"{str(weights)!r} does not fit {model!r}: {error}") from error
    return network, tokenizer, f"{model}/{Path(weights).stem}"


def _download(tag: Mapping[str, Any]) -> Path:
    """Returns the file of weights of an open_clip tag.

    Raises:
        ConfigError: it cannot be downloaded.
    """
    import open_clip

    repository, _, name = tag.get("hf_hub", "").rpartition("/")
    if repository:
        names = (name,) if name else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return hub_file(repository, *names)
    try:
        return Path(open_clip.download_pretrained(tag))
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"cannot download {tag.get('url')!r}: {error}; download it elsewhere and set its path "
            "as `weights`"
        ) from error


def _load_directory(
    directory: Path, weights: str | Path | None, sha256: str | None
) -> tuple[Any, Any, str]:
    import open_clip

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ConfigError(f"scorer directory {str(directory)!r} has no {name}")
    if weights is not None:
        raise ConfigError(
            f"scorer directory {str(directory)!r} holds its own weights; remove weights={weights!r}"
        )
    check_sha256(directory / WEIGHTS, sha256)
    try:
        with no_remote_code(directory):
            network = open_clip.create_model(f"local-dir:{directory}", weights_only=True)
    except RuntimeError as error:
        raise ScoreError(
            f"{WEIGHTS} in {str(directory)!r} does not fit {CONFIG}: {error}"
        ) from error
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    return network, directory_tokenizer(directory), config.get("version", directory.name)


def directory_tokenizer(directory: Path) -> Any:
    """Returns the tokenizer of a scorer directory: of its BPE vocabulary, or of its config."""
    compat.install()
    import open_clip

    if not (directory / VOCABULARY).is_file():
        with no_remote_code(directory):
            return open_clip.get_tokenizer(f"local-dir:{directory}")
    text = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    return open_clip.SimpleTokenizer(
        bpe_path=str(directory / VOCABULARY), context_length=text["context_length"]
    )
