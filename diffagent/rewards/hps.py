"""HPS v2 and v2.1 (arXiv 2306.09341): OpenCLIP ViT-H-14 fine-tuned on human preferences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagent import compat
from diffagent.errors import ConfigError
from diffagent.rewards.base import hub_or_local
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

    `load` takes a release (``v2``, ``v2.1``) as its model, with the release's file or the hub
    repository that has it as its weights (``xswu/HPSv2`` when not given); or a directory in
    open_clip's layout.
    """

    name = "hps_v2"

    @staticmethod
    def _network(model: str, weights: str | Path | None) -> tuple[Any, Any, str]:
        if model in RELEASES:
            file = hub_or_local(weights or REPOSITORY, RELEASES[model])
            network, tokenizer, _ = load_open_clip(ARCHITECTURE, file)
            return network, tokenizer, model
        if not Path(model).is_dir():
            raise ConfigError(
                f"HPS model {model!r} is neither one of {sorted(RELEASES)} nor a directory"
            )
        return load_open_clip(model, weights)

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
