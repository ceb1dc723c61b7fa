"""Loading of the scorers and judges of a configuration, and their local files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffagent.errors import ConfigError
from diffagent.rewards.scorer import Runtime
from diffagent.store import named_files

if TYPE_CHECKING:
    from diffagent.rewards.judge_config import JudgesConfig
    from diffagent.rewards.score_config import RewardsConfig, ScorerConfig
    from diffagent.rewards.scorer import Scorer


def load_scorers(
    config: RewardsConfig, *, device: str = "cpu", compiled: bool = False
) -> list[Scorer]:
    """Loads the scorers of a configuration, in its order.

    Args:
        config: scorers to load.
        device: any torch device.
        compiled: see `diffagent.rewards.scorer.Runtime`.

    Raises:
        ConfigError: a model is unknown, a file is missing or has another hash, or a metric occurs
            twice.
        ScoreError: weights do not fit their architecture.
    """
    _check_names("rewards.scorers", [spec.name for spec in config.scorers])
    runtime = Runtime(device, config.dtype, config.batch_size, compiled)
    return [_load_scorer(spec, runtime) for spec in config.scorers]


def load_judges(
    config: JudgesConfig, *, device: str = "cpu", compiled: bool = False
) -> list[Scorer]:
    """Loads the held-out judges of a configuration, in its order; see `load_scorers`."""
    from diffagent.rewards.judges import AestheticScorer, PickScoreScorer

    _check_names("judges.judges", [spec.name for spec in config.judges])
    runtime = Runtime(device, config.dtype, config.batch_size, compiled)
    return [
        AestheticScorer.load(
            spec.model, spec.weights, head=spec.head, sha256=spec.sha256, runtime=runtime
        )
        if spec.head
        else PickScoreScorer.load(spec.model, spec.weights, sha256=spec.sha256, runtime=runtime)
        for spec in config.judges
    ]


def _check_names(setting: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ConfigError(f"{setting} names a metric twice: {names}; keep one of each")


def reward_files(config: RewardsConfig) -> list[Path]:
    """Returns the local files of a configuration's scorers and of their reference."""
    scorers = [name for spec in config.scorers for name in (spec.model, spec.weights)]
    return named_files(*scorers, config.reference)


def judge_files(config: JudgesConfig) -> list[Path]:
    """Returns the local files of a configuration's judges."""
    return named_files(
        *(n for spec in config.judges for n in (spec.model, spec.weights, spec.head))
    )


def _load_scorer(spec: ScorerConfig, runtime: Runtime) -> Scorer:
    official = spec.backend == "official"
    if spec.name == "clip":
        from diffagent.rewards.clip import ClipScorer

        return ClipScorer.load(spec.model, spec.weights, sha256=spec.sha256, runtime=runtime)
    if spec.name == "hps_v2":
        from diffagent.rewards.hps import HPSScorer

        return HPSScorer.load(
            spec.model, spec.weights, sha256=spec.sha256, official=official, runtime=runtime
        )
    from diffagent.rewards.image_reward import ImageRewardScorer

    return ImageRewardScorer.load(
        spec.model, spec.weights, sha256=spec.sha256, official=official, runtime=runtime
    )
