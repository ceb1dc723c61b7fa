"""Unified score of several metrics: ChatGen's formula, or a weighted mean of z-scores.

DiffAgent's own formula was never published. ChatGen's (arXiv 2411.17176) is derived from its
table 4, of which it reproduces all ten rows; per picture, that is without FID,

    U = (CLIP + 10 (HPS - 15) + IR) / 3

with CLIP = 100 * 2.5 * cosine, HPS = 100 * cosine and IR = 100 * reward. The other form is the
mean of the standardised metrics, (x_m - mean_m) / std_m. Both are means with weights, which are
equal in the published formula and configurable here:

    U = sum_m w_m u_m / sum_m w_m,    u = CLIP, 10 (HPS - 15), IR    or    u_m = z-score of m

with mean and deviation measured once on a fixed reference set, so that scores of all runs are
comparable. RRHF uses only the order of the scores within a prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from diffagent.errors import ConfigError, ScoreError
from diffagent.rewards.scorer import Scorer

if TYPE_CHECKING:
    from diffagent.rewards.score_config import RewardsConfig

log = logging.getLogger(__name__)

CHATGEN_METRICS = ("clip", "hps_v2", "image_reward")
FLOOR_GAP = 1e-3
"""Smallest distance of a valid call's score from the floor of invalid calls."""

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MetricReference:
    """Distribution of one metric over the reference set, and the scorer that measured it."""

    mean: float
    std: float
    digest: str


@dataclass(frozen=True)
class Unifier:
    """Definition of the unified score, and its computation from the metrics of pictures.

    Attributes:
        method: ``chatgen`` or ``zscore``.
        weights: of each metric; the published ``chatgen`` has three metrics of equal weights.
        invalid_floor: score of an invalid call.
        reference: of each metric; ``zscore`` only.
        reference_set: description of the measured pictures, for people; ``zscore`` only.
    """

    method: Literal["zscore", "chatgen"]
    weights: Mapping[str, float]
    invalid_floor: float
    reference: Mapping[str, MetricReference] = field(default_factory=dict)
    reference_set: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method == "chatgen" and set(self.weights) != set(CHATGEN_METRICS):
            raise ConfigError(
                f"rewards.unify 'chatgen' needs the scorers {CHATGEN_METRICS}, "
                f"not {tuple(self.weights)}; add them or use 'zscore'"
            )
        if not sum(self.weights.values()) > 0:
            raise ConfigError("the weights of all scorers are 0; set at least one above 0")
        if self.method == "zscore":
            missing = sorted(set(self.weights) - set(self.reference))
            if missing:
                raise ConfigError(f"rewards.reference lacks the metrics {missing}")
            flat = [name for name in self.weights if not self.reference[name].std > 0]
            if flat:
                raise ConfigError(f"rewards.reference has no positive std for {flat}")

    @classmethod
    def from_config(cls, config: RewardsConfig, scorers: Sequence[Scorer]) -> Self:
        """Returns the unifier of a configuration, checked against the scorers in use.

        Raises:
            ConfigError: the reference is missing, unreadable or does not cover the metrics.
            ScoreError: the reference was measured with other weights than these scorers have.
        """
        weights: dict[str, float] = {spec.name: spec.weight for spec in config.scorers}
        reference: Mapping[str, MetricReference] = {}
        about: Mapping[str, Any] = {}
        if config.unify == "zscore":
            if config.reference is None:
                raise ConfigError("rewards.reference is needed for unify: zscore")
            reference, about = read_reference(config.reference)
        unifier = cls(config.unify, weights, config.invalid_floor, reference, about)
        for scorer in scorers if reference else ():
            expected = reference[scorer.name].digest
            if expected != scorer.digest:
                raise ScoreError(
                    f"reference {config.reference!r} was measured with {scorer.name} "
                    f"{expected[:12]}, but {scorer.version!r} is {scorer.digest[:12]}; "
                    "measure it anew with these weights, or load the weights it belongs to"
                )
        return unifier

    def unify(
        self,
        metrics: Mapping[str, npt.ArrayLike],
        valid: npt.NDArray[np.bool_] | None = None,
    ) -> Scores:
        """Returns one score for each picture.

        Args:
            metrics: metric -> raw scores, (B,) each.
            valid: (B,), False where the call was invalid and no picture exists, whose metrics are
                not read; None: all are valid.

        Returns:
            (B,) float64; `invalid_floor` where invalid, and higher than that elsewhere.

        Raises:
            ScoreError: a metric is missing, of another length, or not finite for a valid call.
        """
        columns = self._columns(metrics)
        size = len(next(iter(columns.values())))
        mask = np.ones(size, np.bool_) if valid is None else np.asarray(valid, np.bool_)
        self._check(columns, mask, size)
        with np.errstate(invalid="ignore"):
            terms = chatgen_terms(**columns) if self.method == "chatgen" else self._z(columns)
            weighted = [self.weights[name] * values for name, values in terms.items()]
            combined = np.sum(weighted, axis=0) / sum(self.weights.values())
        lowest = self.invalid_floor + FLOOR_GAP
        below = int(np.count_nonzero(mask & (combined < lowest)))
        if below:
            log.warning("%d valid scores were raised to %g, above invalid calls", below, lowest)
        return np.where(mask, np.maximum(combined, lowest), self.invalid_floor)

    def definition(self) -> dict[str, Any]:
        """Returns the definition that is stored with scores."""
        return {
            "method": self.method,
            "weights": dict(self.weights),
            "invalid_floor": self.invalid_floor,
            "reference": {name: vars(self.reference[name]) for name in sorted(self.reference)},
            "reference_set": dict(self.reference_set),
        }

    @property
    def digest(self) -> str:
        """sha256 of `definition`: scores of different digests are not comparable."""
        return hashlib.sha256(json.dumps(self.definition(), sort_keys=True).encode()).hexdigest()

    def _columns(self, metrics: Mapping[str, npt.ArrayLike]) -> dict[str, Scores]:
        missing = sorted(set(self.weights) - set(metrics))
        if missing:
            raise ScoreError(f"no scores of {missing}; the unified score needs {[*self.weights]}")
        return {name: np.asarray(metrics[name], np.float64) for name in self.weights}

    @staticmethod
    def _check(columns: Mapping[str, Scores], mask: npt.NDArray[np.bool_], size: int) -> None:
        for name, values in columns.items():
            if values.shape != (size,) or mask.shape != (size,):
                raise ScoreError(
                    f"{name} has shape {values.shape} and `valid` {mask.shape}; both must be "
                    f"({size},), one entry a picture"
                )
            bad = np.flatnonzero(mask & ~np.isfinite(values))
            if bad.size:
                raise ScoreError(
                    f"{name} is {values[bad[0]]} for picture {bad[0]} ({bad.size} such); "
                    "leave out rows that could not be scored, or mark them invalid"
                )

    def _z(self, columns: Mapping[str, Scores]) -> dict[str, Scores]:
        return {
            name: (values - self.reference[name].mean) / self.reference[name].std
            for name, values in columns.items()
        }


def chatgen_terms(clip: Scores, hps_v2: Scores, image_reward: Scores) -> dict[str, Scores]:
    """Returns the terms (B,) of ChatGen's mean without FID, from raw cosines and rewards (B,)."""
    return {
        "clip": 250 * clip,
        "hps_v2": 10 * (100 * hps_v2 - 15),
        "image_reward": 100 * image_reward,
    }


def read_reference(
    path: str | Path,
) -> tuple[dict[str, MetricReference], dict[str, Any]]:
    """Reads mean and deviation of each metric, and the description of the measured pictures.

    Args:
        path: file that `diffagent.rewards.reference` wrote.

    Raises:
        ConfigError: the file is missing or has another form.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        metrics = {
            name: MetricReference(float(m["mean"]), float(m["std"]), str(m["digest"]))
            for name, m in data["metrics"].items()
        }
        return metrics, {key: value for key, value in data.items() if key != "metrics"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"rewards.reference {str(path)!r} is not usable ({type(error).__name__}: {error}); it "
            'must be JSON: {"metrics": {NAME: {"mean": 0.0, "std": 1.0, "digest": SHA256}}}'
        ) from error
