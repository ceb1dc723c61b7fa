"""ImageReward v1.0 (arXiv 2304.05977): BLIP and an MLP, on timm's ViT and transformers' BLIP text.

Both keep the parameter names of the authors' code, so that the released checkpoint loads without a
key map and a digest of scores does not depend on who wrote the modules. ``backend: official``
(`diffagent.rewards.official`) builds the same network from the package image-reward.

Nothing but tokens is shared by the candidates of a prompt: every layer of the text encoder attends
to the picture, the first one after its self-attention, which is a thousandth of the work. The work
is saved elsewhere: the text encoder reads as many tokens as the longest prompt of a batch has,
where the package always reads 35, and the image encoder's attention is torch's fused one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from diffagent import compat
from diffagent.errors import ConfigError, ScoreError
from diffagent.rewards.image_batches import Preparation
from diffagent.rewards.scorer import PromptCache, Runtime, Scorer, content_digest
from diffagent.rewards.weight_files import hub_or_local, read_state

if TYPE_CHECKING:
    import torch
    from torch import nn

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
    """Sizes of an instance; the defaults are the release's (447 M parameters).

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


class ImageRewardScorer(Scorer):
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
        """Wraps a built network; `load` is the usual way.

        Args:
            model: of `build_model`.
            tokenizer: BERT's, of the vocabulary that the model was trained with.
            config: description that the model was built from.
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
        official: bool = False,
        runtime: Runtime | None = None,
    ) -> Self:
        """Loads the release, or a directory with a tiny instance.

        Args:
            model: ``v1.0``, or a directory with ``config.json``, ``model.safetensors`` and
                ``vocab.txt``.
            weights: for the release: the file ``ImageReward.pt`` (read with
                ``weights_only=True``) or its safetensors form, or the hub repository that has
                it (default ``THUDM/ImageReward``).
            vocabulary: directory of BERT's tokenizer; for the release ``bert-base-uncased``
                of the hub by default.
            sha256: of the file of weights, which is checked.
            official: compute with the modules of the package image-reward.
            runtime: where and how to compute; by default in float32 on the CPU.

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
        if official:
            from diffagent.rewards.official import build_image_reward

            network = build_image_reward(config)
        else:
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
        # BERT masks padding, so the 35 tokens can be cut to the length of the longest prompt.
        mask = ids != self.tokenizer.pad_token_id
        length = int(mask.sum(1).max())
        rewards = self.model.rewards(
            ids[:, :length].to(self.device, non_blocking=True),
            mask[:, :length].long().to(self.device, non_blocking=True),
            self._encode_image(pixels),
        )
        return rewards, np.array([cut for _, cut in tokens])

    def _tokenize(self, prompts: Sequence[str]) -> list[tuple[torch.Tensor, bool]]:
        """Returns token ids (max_length,) of each prompt, and whether it was cut."""
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
    """Reads the description of an instance from its directory.

    Raises:
        ConfigError: the file is missing or does not describe one.
    """
    try:
        fields = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        return ImageRewardConfig(**fields)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{str(directory / CONFIG)!r} is not usable: {error}") from error


def build_model(config: ImageRewardConfig) -> Any:
    """Returns the network of a description, with random weights, in float32 on the CPU."""
    compat.install()
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
        num_classes=0,
        global_pool="",  # features of all tokens
    )
    sizes = BlipTextConfig(
        **config.text, encoder_hidden_size=config.vision_width, is_decoder=True, bos_token_id=None
    )
    text = BlipTextModel(sizes, add_pooling_layer=False)
    # The released file holds the constant numbers of positions, and so do digests of scorers.
    positions = text.embeddings.position_ids.clone()
    del text.embeddings.position_ids
    text.embeddings.register_buffer("position_ids", positions)
    layers = nn.Sequential(
        nn.Linear(sizes.hidden_size, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    return join_parts(config, vision, text, layers)


def join_parts(
    config: ImageRewardConfig, vision: nn.Module, text: nn.Module, layers: nn.Module
) -> Any:
    """Returns one network of BLIP's encoders and the layers of the MLP, under the authors' names.

    Its ``rewards``, the package's ``score_gard``, maps token ids and mask (B, L) and image features
    (B, N, D) to rewards (B,) float32.
    """
    import torch
    from torch import nn

    class ImageRewardNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blip: Any = nn.Module()
            self.blip.visual_encoder = vision
            self.blip.text_encoder = text
            self.blip.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
            self.blip.text_proj = nn.Linear(config.text["hidden_size"], config.embed_dim)
            self.mlp: Any = nn.Module()
            self.mlp.layers = layers

        def rewards(
            self, ids: torch.Tensor, mask: torch.Tensor, image_features: torch.Tensor
        ) -> torch.Tensor:
            states = self.blip.text_encoder(
                ids,
                attention_mask=mask,
                encoder_hidden_states=image_features,
                return_dict=True,
            ).last_hidden_state
            with torch.autocast(states.device.type, enabled=False):
                raw: torch.Tensor = self.mlp.layers(states[:, 0].float())[:, 0]
            return (raw - config.mean) / config.std

    return ImageRewardNetwork()


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
    # Position numbers are a constant buffer, which old releases of transformers did not save.
    missing = [name for name in result.missing_keys if not name.endswith("position_ids")]
    if missing:
        raise ScoreError(
            f"{str(file)!r} lacks {len(missing)} parameters of ImageReward, such as "
            f"{missing[0]!r}; it belongs to another model"
        )
    if result.unexpected_keys:
        log.warning("%s: ignored unknown parameters %s", file, result.unexpected_keys)


def load_tokenizer(vocabulary: str | Path) -> Any:
    """Returns BLIP's tokenizer: BERT's with [DEC] and [ENC] appended.

    Args:
        vocabulary: directory of a saved tokenizer, or a name on the Hugging Face hub.

    Raises:
        ConfigError: it is neither.
    """
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(str(vocabulary))
    except OSError as error:
        raise ConfigError(
            f"no BERT vocabulary at {str(vocabulary)!r}: {error}; give a directory with vocab.txt"
        ) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer
