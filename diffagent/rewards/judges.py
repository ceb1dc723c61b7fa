"""Held-out judges: models that score pictures and that no training ever uses.

A reward that an agent was trained on flatters it. Judges score only the answers of an evaluation: a
configuration names them in ``judges``, ``rewards.scorers`` accepts none of their names, the stage
``judge`` runs only for evaluated selectors, and ``train_rrhf`` does not read its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from diffagent import compat
from diffagent.errors import ConfigError, ScoreError
from diffagent.pretrained import load_model
from diffagent.rewards.clip import ClipScorer, load_open_clip
from diffagent.rewards.image_batches import Preparation
from diffagent.rewards.scorer import Runtime, Scorer, content_digest
from diffagent.rewards.weight_files import check_sha256, hub_or_local, read_state

if TYPE_CHECKING:
    import torch

PICK_SCORE = "yuvalkirstain/PickScore_v1"
AESTHETIC_CLIP = ("ViT-L-14-quickgelu", "openai")
_VOCABULARY_SIZE = 49408


class PickScoreScorer(ClipScorer):
    """PickScore (arXiv 2305.01569): a CLIP-H tuned on Pick-a-Pic; cosine times its sharpness.

    The published model scores about 15 to 25; differences of a point within one prompt matter.
    """

    name = "pick_score"

    @classmethod
    def load(
        cls,
        model: str = PICK_SCORE,
        weights: str | Path | None = None,
        *,
        sha256: str | None = None,
        runtime: Runtime | None = None,
    ) -> Self:
        """Loads a CLIP in transformers' layout.

        Args:
            model: directory with ``config.json`` and ``model.safetensors``, or a repository of
                the hub that has them (perhaps NAME@REVISION).
            weights: none; the directory holds them.
            sha256: of ``model.safetensors``, which is checked.
            runtime: where and how to compute; by default in float32 on the CPU.

        Raises:
            ConfigError: no such model, a file of another hash, or not CLIP's vocabulary.
            ScoreError: the weights do not fit the description.
        """
        compat.install()
        import open_clip
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        if weights is not None:
            raise ConfigError(f"pick_score's model holds its own weights; remove {weights!r}")
        network = _load_transformers_clip(_local_directory(model, sha256))
        text, vision = network.clip.config.text_config, network.clip.config.vision_config
        if text.vocab_size != _VOCABULARY_SIZE:
            raise ConfigError(f"{model!r} has {text.vocab_size} tokens, CLIP has 49408")
        preparation = Preparation((vision.image_size, vision.image_size), "shortest")
        scorer = cls(
            network,
            open_clip.SimpleTokenizer(context_length=text.max_position_embeddings),
            preparation,
            mean=OPENAI_DATASET_MEAN,
            std=OPENAI_DATASET_STD,
            version=model.rstrip("/").rsplit("/", 1)[-1],
            digest=content_digest(network, {"scorer": cls.name, **asdict(preparation)}),
            runtime=runtime or Runtime(),
        )
        scorer.scale = float(network.clip.logit_scale.exp())
        return scorer


def _local_directory(model: str, sha256: str | None) -> Path:
    """Returns the directory of a model, downloaded if it is not local; checks its weights."""
    directory = Path(model)
    names = ("config.json", "model.safetensors")
    if not directory.is_dir():
        directory = [hub_or_local(model, name) for name in names][-1].parent
    for name in names:
        if not (directory / name).is_file():
            raise ConfigError(
                f"{str(directory)!r} has no {name}; a judge is read from safetensors only"
            )
    check_sha256(directory / names[-1], sha256)
    return directory


def _load_transformers_clip(directory: Path) -> Any:
    """Returns transformers' CLIP behind the two methods of open_clip's."""
    import torch
    from transformers import CLIPModel

    class TransformersClip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip, report = load_model(
                CLIPModel, directory, output_loading_info=True, dtype=torch.float32
            )
            if report["missing_keys"] or report["mismatched_keys"]:
                wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
                raise ScoreError(
                    f"model.safetensors in {str(directory)!r} does not fit config.json: {wrong[0]} "
                    "is missing or of another shape"
                )

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.clip.get_image_features(pixels).pooler_output
            return features

        def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
            # As in CLIP, a token attends only to those before it: cut the padding off.
            length = int(ids.argmax(-1).max()) + 1
            features: torch.Tensor = self.clip.get_text_features(ids[:, :length]).pooler_output
            return features

    return TransformersClip()


class AestheticScorer(Scorer):
    """LAION's aesthetic predictor: a linear head on CLIP ViT-L/14's features, without the prompt.

    The published head was fitted to people's ratings from 1 to 10.
    """

    name = "aesthetic"

    @classmethod
    def load(
        cls,
        model: str = AESTHETIC_CLIP[0],
        weights: str | Path | None = None,
        *,
        head: str | Path,
        sha256: str | None = None,
        runtime: Runtime | None = None,
    ) -> Self:
        """Loads a CLIP of open_clip and a head.

        Args:
            model: of open_clip, or a directory: see `ClipScorer.load`.
            weights: of the CLIP; default ``openai`` for a name.
            head: ``sac+logos+ava1-l14-linearMSE.pth`` or its safetensors form.
            sha256: of the head's file, which is checked.
            runtime: where and how to compute; by default in float32 on the CPU.

        Raises:
            ConfigError: no such model or file, or a file of another hash.
            ScoreError: the weights do not fit.
        """
        import torch

        if weights is None and not Path(model).is_dir():
            weights = AESTHETIC_CLIP[1]
        clip, _, version = load_open_clip(model, weights)
        config = dict(clip.visual.preprocess_cfg)
        network = torch.nn.ModuleDict({"visual": clip.visual, "head": _load_head(head, sha256)})
        return cls(
            network,
            Preparation.from_open_clip(config),
            mean=config["mean"],
            std=config["std"],
            version=f"{Path(head).stem} on {version}",
            digest=content_digest(network, {"scorer": cls.name, **config}),
            runtime=runtime or Runtime(),
        )

    def _rewards(
        self, prompts: Sequence[str], pixels: torch.Tensor
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        import torch

        features = torch.nn.functional.normalize(self.model["visual"](pixels).float(), dim=-1)
        with torch.autocast(features.device.type, enabled=False):
            scores = self.model["head"](features)[:, 0]
        return scores, np.zeros(len(prompts), np.bool_)


def _load_head(file: str | Path, sha256: str | None) -> torch.nn.Module:
    """Returns the head of a checkpoint: linear layers in the order of their numbers.

    The published head (christophschuhmann/improved-aesthetic-predictor) has ``layers.0`` (768 to
    1024), 2, 4, 6 and 7, with dropout between some and no activation.
    """
    import torch

    state = read_state(Path(file), sha256)
    head = torch.nn.Sequential()
    try:
        for number in sorted({int(name.split(".")[1]) for name in state}):
            outputs, inputs = state[f"layers.{number}.weight"].shape
            head.add_module(str(number), torch.nn.Linear(inputs, outputs))
        head.load_state_dict({name.removeprefix("layers."): v for name, v in state.items()})
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ScoreError(f"{str(file)!r} is no head of linear layers: {error}") from error
    return head
