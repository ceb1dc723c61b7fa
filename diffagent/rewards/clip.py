"""CLIP score: the cosine of CLIP's text and image features, through open_clip."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from diffagent import compat
from diffagent.errors import ConfigError, ScoreError
from diffagent.rewards.base import (
    PromptCache,
    ScoreBatch,
    batches,
    check_lengths,
    content_digest,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

log = logging.getLogger(__name__)

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
VOCABULARY = "bpe_vocabulary.txt.gz"


class ClipScorer:
    """Cosine of text and image features, in -1 to 1 (about 0.15 to 0.35 with real models)."""

    name = "clip"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocess: Callable[[Image.Image], torch.Tensor],
        *,
        version: str,
        digest: str,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        """Takes a loaded open_clip model; `load` is the usual way.

        Args:
            model: an open_clip model.
            tokenizer: texts to (B, L) int64, with ``encode`` or a wrapped ``tokenizer``.
            preprocess: picture to (3, H, W) float.
            version: which weights, for people.
            digest: sha256 of weights and preprocessing.
            device: any torch device.
            dtype: of weights and activations.
            batch_size: pictures, or prompts, a forward pass.
        """
        self.version = version
        self.digest = digest
        self.device = device
        self.dtype = torch_dtype(dtype)
        self.batch_size = batch_size
        self.model = model.to(device, self.dtype).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self._text = PromptCache(self._encode_texts)

    @classmethod
    def load(
        cls,
        model: str,
        weights: str | Path | None = None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> Self:
        """Loads a model of open_clip.

        Args:
            model: an open_clip name such as ``ViT-L-14``, or a directory with
                ``open_clip_config.json``, ``open_clip_model.safetensors`` and, where the
                vocabulary is not CLIP's, ``bpe_vocabulary.txt.gz``.
            weights: for a name: an open_clip tag such as ``openai``, or a file. OpenAI's
                weights were trained with QuickGELU: their tag sets it, for their file name
                the ``-quickgelu`` architecture.
            device: any torch device.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            batch_size: pictures, or prompts, a forward pass.

        Raises:
            ConfigError: no such model, tag or file.
            ScoreError: the weights do not fit the architecture.
        """
        network, tokenizer, version = cls._network(model, weights)
        preprocess, settings = cls._preprocessing(network)
        return cls(
            network,
            tokenizer,
            preprocess,
            version=version,
            digest=content_digest(network, {"scorer": cls.name, **settings}),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )

    @staticmethod
    def _network(model: str, weights: str | Path | None) -> tuple[Any, Any, str]:
        return load_open_clip(model, weights)

    @staticmethod
    def _preprocessing(
        network: Any,
    ) -> tuple[Callable[[Image.Image], torch.Tensor], dict[str, Any]]:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        config = network.visual.preprocess_cfg
        return image_transform_v2(PreprocessCfg(**config), is_train=False), dict(config)

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> ScoreBatch:
        """Scores picture i against prompt i; see `diffagent.rewards.base.Scorer`."""
        import torch

        check_lengths(self.name, prompts, images)
        if not prompts:
            return ScoreBatch(np.zeros(0, np.float32), np.zeros(0, np.bool_))
        texts = self._text.get(prompts)
        text_features = torch.stack([features for features, _ in texts])
        image_features = torch.cat(
            [self._encode_images(part) for part in batches(images, self.batch_size)]
        )
        cosines = (text_features * image_features).sum(-1).cpu().numpy()
        return ScoreBatch(cosines, np.array([truncated for _, truncated in texts]))

    def _encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit-length features, (B, D) float32."""
        import torch

        pixels = torch.stack([self.preprocess(image) for image in images])
        with torch.inference_mode():
            features = self.model.encode_image(pixels.to(self.device, self.dtype))
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def _encode_texts(self, prompts: Sequence[str]) -> list[tuple[torch.Tensor, bool]]:
        """Unit-length features (D,) float32 of each prompt, and whether it was cut."""
        import torch

        encoded: list[tuple[torch.Tensor, bool]] = []
        for part in batches(prompts, self.batch_size):
            ids = self.tokenizer(list(part)).to(self.device)
            with torch.inference_mode():
                features = self.model.encode_text(ids)
            unit = torch.nn.functional.normalize(features.float(), dim=-1)
            cut = [self._is_truncated(prompt) for prompt in part]
            encoded.extend(zip(unit, cut, strict=True))
        return encoded

    def _is_truncated(self, prompt: str) -> bool:
        limit = self.tokenizer.context_length
        if hasattr(self.tokenizer, "encode"):  # open_clip's own BPE: start and end are added
            return bool(len(self.tokenizer.encode(prompt)) + 2 > limit)
        return bool(len(self.tokenizer.tokenizer(prompt).input_ids) > limit)


def load_open_clip(model: str, weights: str | Path | None) -> tuple[Any, Any, str]:
    """An open_clip network in float32 on the CPU, its tokenizer, and the version's name.

    Raises:
        ConfigError: no such model, tag or file.
        ScoreError: the weights do not fit the architecture.
    """
    compat.install()
    import open_clip

    directory = Path(model)
    if directory.is_dir():
        return _load_directory(directory, weights)
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
    try:
        network = open_clip.create_model(
            model,
            pretrained=str(weights),
            force_quick_gelu=bool(tag and tag.get("quick_gelu")),
            weights_only=True,
        )
    except RuntimeError as error:
        raise ScoreError(f"{str(weights)!r} does not fit {model!r}: {error}") from error
    return network, open_clip.get_tokenizer(model), f"{model}/{Path(weights).stem}"


def _load_directory(directory: Path, weights: str | Path | None) -> tuple[Any, Any, str]:
    import open_clip

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ConfigError(f"scorer directory {str(directory)!r} has no {name}")
    if weights is not None:
        raise ConfigError(
            f"scorer directory {str(directory)!r} holds its own weights; remove weights={weights!r}"
        )
    try:
        network = open_clip.create_model(f"local-dir:{directory}")
    except RuntimeError as error:
        raise ScoreError(
            f"{WEIGHTS} in {str(directory)!r} does not fit {CONFIG}: {error}"
        ) from error
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    return network, directory_tokenizer(directory), config.get("version", directory.name)


def directory_tokenizer(directory: Path) -> Any:
    """The tokenizer of a scorer directory: its own BPE vocabulary, or what its config names."""
    compat.install()
    import open_clip

    if not (directory / VOCABULARY).is_file():
        return open_clip.get_tokenizer(f"local-dir:{directory}")
    text = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    return open_clip.SimpleTokenizer(
        bpe_path=str(directory / VOCABULARY), context_length=text["context_length"]
    )
