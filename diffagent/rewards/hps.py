"""HPS v2 and v2.1 (arXiv 2306.09341): OpenCLIP ViT-H-14 fine-tuned on human preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from diffagent.errors import ConfigError
from diffagent.rewards.clip import ClipScorer, load_open_clip
from diffagent.rewards.image_batches import Preparation
from diffagent.rewards.scorer import Runtime
from diffagent.rewards.weight_files import check_sha256, hub_or_local

RELEASES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
REPOSITORY = "xswu/HPSv2"
ARCHITECTURE = "ViT-H-14"


class HPSScorer(ClipScorer):
    """Cosine of the fine-tuned features; papers print it times 100.

    Pictures are prepared as in the package: the longest side is resized and the rest padded, where
    CLIP would crop. Scores of v2 and v2.1 are not comparable, and scores are meaningful only among
    pictures of one prompt.
    """

    name = "hps_v2"

    @classmethod
    def load(
        cls,
        model: str,
        weights: str | Path | None = None,
        *,
        sha256: str | None = None,
        official: bool = False,
        runtime: Runtime | None = None,
    ) -> Self:
        """Loads a release or a directory; see `ClipScorer.load`.

        Args:
            model: a release, ``v2`` or ``v2.1``, or a directory in open_clip's layout.
            weights: of a release: its file or a repository of the hub; default ``xswu/HPSv2``.
            sha256: of the file of weights, which is checked.
            official: compute with the network of the package hpsv2.
            runtime: where and how to compute.
        """
        network, tokenizer, version = _load_network(model, weights, sha256)
        if official:
            from diffagent.rewards.official import to_hpsv2

            network = to_hpsv2(network, None if model in RELEASES else Path(model))
        return cls.from_network(network, tokenizer, version, runtime)

    @staticmethod
    def _preparation(config: dict[str, Any]) -> tuple[Preparation, dict[str, Any]]:
        settings = {**config, "resize_mode": "hpsv2 1.2.0: longest side, padded"}
        return Preparation.from_open_clip(config, "hps"), settings


def _load_network(
    model: str, weights: str | Path | None, sha256: str | None
) -> tuple[Any, Any, str]:
    """Returns network, tokenizer and version; see `load_open_clip`."""
    if model in RELEASES:
        file = hub_or_local(weights or REPOSITORY, RELEASES[model])
        if file.name in RELEASES.values() and file.name != RELEASES[model]:
            raise ConfigError(
                f"{str(file)!r} is not HPS {model} but another release with other scores; "
                f"give {RELEASES[model]!r}, or the model that belongs to the file"
            )
        check_sha256(file, sha256)
        network, tokenizer, _ = load_open_clip(ARCHITECTURE, file)
        return network, tokenizer, model
    if not Path(model).is_dir():
        raise ConfigError(
            f"HPS model {model!r} is neither one of {sorted(RELEASES)} nor a directory"
        )
    return load_open_clip(model, weights, sha256)
