"""HPS v2 and v2.1 (arXiv 2306.09341): OpenCLIP ViT-H-14 fine-tuned on human preferences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diffagent import compat
from diffagent.errors import ConfigError
from diffagent.rewards.base import content_digest, hub_or_local
from diffagent.rewards.clip import ClipScorer, load_open_clip

if TYPE_CHECKING:
    import torch
    from PIL import Image

RELEASES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
REPOSITORY = "xswu/HPSv2"
ARCHITECTURE = "ViT-H-14"


class HPSScorer(ClipScorer):
    """Cosine of the fine-tuned features; papers print it times 100.

    The pictures are prepared by the package's own code: the longest side is resized and the
    rest padded, where CLIP would crop. Scores of v2 and v2.1 are not comparable, and scores
    mean something only among pictures of one prompt.
    """

    name = "hps_v2"

    @classmethod
    def load(
        cls,
        model: str = "v2",
        weights: str | Path | None = None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> Self:
        """Loads a release of HPS, or a directory as `ClipScorer.load` does.

        Args:
            model: ``v2``, ``v2.1``, or a directory in open_clip's layout.
            weights: for a release: its file, or the hub repository that has it
                (``xswu/HPSv2`` when not given).
            device: any torch device.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            batch_size: pictures, or prompts, a forward pass.

        Raises:
            ConfigError: no such model or file.
            ScoreError: the weights do not fit the architecture.
        """
        if model in RELEASES:
            file = hub_or_local(weights or REPOSITORY, RELEASES[model])
            network, tokenizer, _ = load_open_clip(ARCHITECTURE, file)
            version = model
        elif Path(model).is_dir():
            network, tokenizer, version = load_open_clip(model, weights)
        else:
            raise ConfigError(
                f"HPS model {model!r} is neither one of {sorted(RELEASES)} nor a directory"
            )
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
    def _preprocessing(
        network: Any,
    ) -> tuple[Callable[[Image.Image], torch.Tensor], dict[str, Any]]:
        compat.install()
        from hpsv2.src.open_clip.transform import image_transform

        config = network.visual.preprocess_cfg
        transform = image_transform(
            config["size"],
            is_train=False,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            resize_longest_max=True,
        )

        def preprocess(image: Image.Image) -> torch.Tensor:
            # The package lets an alpha channel through, which its own model then rejects.
            pixels: torch.Tensor = transform(image.convert("RGB"))
            return pixels

        return preprocess, {**config, "resize_mode": "hpsv2 1.2.0: longest side, padded"}
