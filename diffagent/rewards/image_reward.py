"""ImageReward v1.0 (arXiv 2304.05977): BLIP and an MLP, from the ``ImageReward`` package.

The package builds one size only and downloads its parts. Here its own modules are put together
from a description, so that the released weights and tiny instances run through the same code.

Only tokens are shared by the candidates of a prompt: every layer of the text encoder looks at
the picture, the first one after its self-attention, which is a thousandth of the work. So the
work is saved elsewhere: the text encoder reads as many tokens as the longest prompt of a batch
has, where the package always reads 35, and the image encoder's attention is torch's fused one.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from diffagent import compat
from diffagent.errors import ConfigError, ScoreError
from diffagent.rewards.image_batches import Preparation
from diffagent.rewards.scorer import (
    PixelScorer,
    PromptCache,
    Runtime,
    content_digest,
    hub_or_local,
    read_state,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

RELEASE = "v1.0"
REPOSITORY = "THUDM/ImageReward"
RELEASED_FILE = "ImageReward.pt"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the package's preprocessing, CLIP's
_STD = (0.26862954, 0.26130258, 0.27577711)
_MED_CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
}


@dataclass(frozen=True)
class ImageRewardConfig:
    """Size of an instance; the defaults are the release's (447 M parameters).

    Attributes:
        version: which weights, for people.
        image_size: side of the model's input in pixels.
        patch_size: side of a patch in pixels.
        vision_width: of the ViT.
        vision_depth: layers of the ViT.
        vision_heads: attention heads of the ViT.
        embed_dim: of BLIP's contrastive projections, which the reward does not use.
        text: settings of BLIP's BERT; ``med_config.json`` of the release.
        max_length: tokens of a prompt that are read, with [CLS] and [SEP].
        mean: of the raw reward over the authors' data.
        std: of the raw reward over the authors' data.
    """

    version: str = RELEASE
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_depth: int = 24
    vision_heads: int = 16
    embed_dim: int = 256
    text: Mapping[str, Any] = field(default_factory=lambda: dict(_MED_CONFIG))
    max_length: int = 35
    mean: float = 0.16717362830052426
    std: float = 1.0333394966054072


class ImageRewardScorer(PixelScorer):
    """Standardised reward, about N(0, 1) on the authors' pictures."""

    name = "image_reward"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: ImageRewardConfig,
        *,
        digest: str,
        runtime: Runtime,
    ) -> None:
        """Takes a built model; `load` is the usual way.

        Args:
            model: what `build_model` returns.
            tokenizer: BERT's, of the vocabulary that the model was trained with.
            config: what the model was built from.
            digest: sha256 of weights and preprocessing.
            runtime: where and how to compute.
        """
        super().__init__(
            model,
            Preparation((config.image_size, config.image_size), "shortest"),
            mean=_MEAN,
            std=_STD,
            version=config.version,
            digest=digest,
            runtime=runtime,
        )
        import torch

        self.config = config
        self.tokenizer = tokenizer
        self._tokens = PromptCache(self._tokenize)
        encoder = self.model.blip.visual_encoder
        self._encode_image = torch.compile(encoder) if self.compiled else encoder

    @classmethod
    def load(
        cls,
        model: str = RELEASE,
        weights: str | Path | None = None,
        *,
        vocabulary: str | Path | None = None,
        sha256: str | None = None,
        runtime: Runtime | None = None,
    ) -> Self:
        """Loads the release, or a directory with a tiny instance.

        Args:
            model: ``v1.0``, or a directory with ``config.json``, ``model.safetensors`` and
                ``vocab.txt``.
            weights: for the release: the file ``ImageReward.pt`` (read with
                ``weights_only=True``) or its safetensors form, or the hub repository that has
                it (``THUDM/ImageReward`` when not given).
            vocabulary: directory of BERT's tokenizer; for the release ``bert-base-uncased``
                of the hub when not given.
            sha256: of the file of weights, which is checked.
            runtime: where and how to compute; float32 on the CPU when not given.

        Raises:
            ConfigError: no such model or file, or a file of another hash.
            ScoreError: the weights do not fit the architecture.
        """
        directory = Path(model)
        if model == RELEASE:
            config = ImageRewardConfig()
            file = hub_or_local(weights or REPOSITORY, RELEASED_FILE)
            vocabulary = vocabulary or "bert-base-uncased"
        elif directory.is_dir():
            config = read_config(directory)
            file = Path(weights or directory / WEIGHTS)
            vocabulary = vocabulary or directory
        else:
            raise ConfigError(
                f"ImageReward model {model!r} is neither {RELEASE!r} nor a directory with {CONFIG}"
            )
        network = build_model(config)
        load_weights(network, file, sha256)
        return cls(
            network,
            load_tokenizer(vocabulary),
            config,
            digest=content_digest(network, {"scorer": cls.name, **asdict(config)}),
            runtime=runtime or Runtime(),
        )

    def _rewards(
        self, prompts: Sequence[str], pixels: torch.Tensor
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        import torch

        tokens = self._tokens.get(prompts)
        ids = torch.stack([ids for ids, _ in tokens])
        # BERT masks what is padded, so the 35 tokens can be cut to the longest prompt's.
        mask = ids != self.tokenizer.pad_token_id
        length = int(mask.sum(1).max())
        rewards = self.model.rewards(
            ids[:, :length].to(self.device, non_blocking=True),
            mask[:, :length].long().to(self.device, non_blocking=True),
            self._encode_image(pixels),
        )
        return rewards, np.array([cut for _, cut in tokens])

    def _tokenize(self, prompts: Sequence[str]) -> list[tuple[torch.Tensor, bool]]:
        """Token ids (max_length,) of each prompt, and whether it was cut."""
        import torch

        limit = self.config.max_length
        full = self.tokenizer(list(prompts)).input_ids
        padded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=limit
        ).input_ids
        return [
            (torch.tensor(ids), len(whole) > limit) for ids, whole in zip(padded, full, strict=True)
        ]


def read_config(directory: Path) -> ImageRewardConfig:
    """The description of an instance out of its directory.

    Raises:
        ConfigError: the file is missing or does not describe one.
    """
    try:
        fields = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        return ImageRewardConfig(**fields)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{str(directory / CONFIG)!r} is not usable: {error}") from error


@functools.cache
def _model_class() -> type[Any]:
    """A class of the package's parts; made on first use because torch is imported then."""
    compat.install()
    import torch
    from ImageReward.ImageReward import MLP
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer
    from torch import nn

    class Blip(nn.Module):
        """The parts of the package's ``BLIP_Pretrain``, under the same names."""

        def __init__(self, config: ImageRewardConfig) -> None:
            super().__init__()
            self.visual_encoder = VisionTransformer(
                img_size=config.image_size,
                patch_size=config.patch_size,
                embed_dim=config.vision_width,
                depth=config.vision_depth,
                num_heads=config.vision_heads,
            )
            bert = BertConfig(
                **config.text, encoder_width=config.vision_width, add_cross_attention=True
            )
            for block in self.visual_encoder.blocks:
                block.attn.forward = MethodType(_attend, block.attn)
            self.text_encoder = BertModel(config=bert, add_pooling_layer=False)
            self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
            self.text_proj = nn.Linear(bert.hidden_size, config.embed_dim)

    class Model(nn.Module):
        """The package's ``ImageReward`` at any size, with the same names of parameters."""

        def __init__(self, config: ImageRewardConfig) -> None:
            super().__init__()
            self.blip = Blip(config)
            self.mlp = MLP(config.text["hidden_size"])
            self.mean = config.mean
            self.std = config.std

        def rewards(
            self, ids: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor
        ) -> torch.Tensor:
            """The package's ``score_gard`` of image features (B, N, D): rewards (B,) float32."""
            states = self.blip.text_encoder(
                ids,
                attention_mask=mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(
                    seen.shape[:-1], dtype=torch.long, device=seen.device
                ),
                return_dict=True,
            ).last_hidden_state
            with torch.autocast(seen.device.type, enabled=False):
                raw: torch.Tensor = self.mlp(states[:, 0].float())[:, 0]
            return (raw - self.mean) / self.std

    return Model


def _attend(attention: Any, x: torch.Tensor, register_hook: bool = False) -> torch.Tensor:
    """The package's ``vit.Attention.forward`` without its hooks, fused."""
    from torch.nn.functional import scaled_dot_product_attention

    count, tokens, width = x.shape
    heads = attention.qkv(x).reshape(count, tokens, 3, attention.num_heads, -1)
    query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = scaled_dot_product_attention(query, key, value, scale=attention.scale)
    projected: torch.Tensor = attention.proj(mixed.transpose(1, 2).reshape(count, tokens, width))
    return projected


def build_model(config: ImageRewardConfig) -> Any:
    """The network of a description, with random weights, in float32 on the CPU."""
    return _model_class()(config)


def load_weights(network: Any, file: Path, sha256: str | None = None) -> None:
    """Loads a released checkpoint or a safetensors file into a built network.

    Raises:
        ConfigError: there is no such file, or it has another hash than ``sha256``.
        ScoreError: parameters are missing or of another shape.
    """
    state = read_state(file, sha256)
    try:
        result = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ScoreError(f"{str(file)!r} does not fit this ImageReward: {error}") from error
    # Position numbers are a constant buffer; old releases of transformers did not save it.
    missing = [name for name in result.missing_keys if not name.endswith("position_ids")]
    if missing:
        raise ScoreError(
            f"{str(file)!r} lacks {len(missing)} parameters of ImageReward, such as "
            f"{missing[0]!r}; it belongs to another model"
        )
    if result.unexpected_keys:
        log.warning("%s: ignored unknown parameters %s", file, result.unexpected_keys)


def load_tokenizer(vocabulary: str | Path) -> Any:
    """BLIP's tokenizer over a BERT vocabulary; see `ImageRewardScorer.load`.

    Raises:
        ConfigError: neither a directory with ``vocab.txt`` nor a name that the hub knows.
    """
    _model_class()
    from ImageReward.models.BLIP.blip import init_tokenizer

    try:
        return init_tokenizer(str(vocabulary))
    except OSError as error:
        raise ConfigError(
            f"no BERT vocabulary at {str(vocabulary)!r}: {error}; give a directory with vocab.txt"
        ) from error
