"""From a configuration to scorers, and to the files behind them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagent.artifacts import named_files
from diffagent.errors import ConfigError

if TYPE_CHECKING:
    from diffagent.rewards.base import Scorer
    from schemas.config import RewardsConfig, ScorerConfig

SANDBOX = "sandbox"
"""Name of the committed tiny scorers and of their reference; they know the toy world only."""
REFERENCE_FILE = "reference.json"
"""Beside the sandbox's scorers."""


def load_scorers(
    config: RewardsConfig, *, device: str = "cpu", dtype: str = "float32"
) -> list[Scorer]:
    """Loads the scorers of a configuration, in its order.

    Args:
        config: which scorers; a model named ``sandbox`` is the committed tiny one.
        device: any torch device.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ConfigError: a model is not known, a file is missing, or a metric is named twice.
        ScoreError: weights do not fit their architecture.
    """
    names = [spec.name for spec in config.scorers]
    if len(set(names)) != len(names):
        raise ConfigError(f"rewards.scorers names a metric twice: {names}; keep one of each")
    return [
        _load_scorer(spec, device=device, dtype=dtype, batch_size=config.batch_size)
        for spec in config.scorers
    ]


def reward_files(config: RewardsConfig) -> list[Path]:
    """The local files behind a configuration's scorers and their reference."""
    scorers = [name for spec in config.scorers for name in (_model(spec), spec.weights)]
    return named_files(*scorers, config.reference and reference_file(config.reference))


def reference_file(name: str | Path) -> Path:
    """The file that ``rewards.reference`` names."""
    return sandbox_directory() / REFERENCE_FILE if str(name) == SANDBOX else Path(name)


def _model(spec: ScorerConfig) -> str:
    return str(sandbox_directory() / spec.name) if spec.model == SANDBOX else spec.model


def _load_scorer(spec: ScorerConfig, **runtime: Any) -> Scorer:
    model = _model(spec)
    if spec.name == "clip":
        from diffagent.rewards.clip import ClipScorer

        return ClipScorer.load(model, spec.weights, **runtime)
    if spec.name == "hps_v2":
        from diffagent.rewards.hps import HPSScorer

        return HPSScorer.load(model, spec.weights, **runtime)
    from diffagent.rewards.image_reward import ImageRewardScorer

    return ImageRewardScorer.load(model, spec.weights, **runtime)


def sandbox_directory() -> Path:
    """Where the sandbox's scorers and their reference lie."""
    return Path(str(resources.files("diffagent.sandbox"))) / "weights" / "scorers"
