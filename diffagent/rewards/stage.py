"""Stage ``score``: every picture judged against its prompt, and the rewards made one number."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.artifacts import Artifact, StageContext, StageResult, stage
from diffagent.device import resolve_device
from diffagent.rewards.base import Scorer, batches
from diffagent.rewards.load import load_scorers, reward_files
from diffagent.rewards.unified import Unifier
from schemas.config import RewardsConfig
from schemas.dabench import SCORES
from schemas.manifest import Funnel, FunnelStep

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

METRICS = ("clip", "image_reward", "hps_v2")

#: A prompt and the digest of the recipe of a picture.
Pair = tuple[str, str]


@dataclass
class Judged:
    """Scores of pictures: metric -> (N,) float64, N as in ``pairs``; NaN where a scorer failed."""

    pairs: Sequence[Pair]
    metrics: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    truncated: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)


@stage("score", version=1, config=RewardsConfig, files=reward_files)
def score(config: RewardsConfig, context: StageContext) -> StageResult:
    """Score the pictures of a ``render`` artefact.

    Input: ``renders``. File: scores.parquet (``schemas.dabench.SCORES``), one row a row of
    renders.parquet in the same order. The unified score of an invalid answer is
    ``invalid_floor``; of a failed picture it is null, and so are its rewards.

    Raises:
        ConfigError: the scorers or their reference are not usable.
        ScoreError: the reference was measured with other scorers.
    """
    renders = context.one("renders")
    rows = pq.read_table(renders.file("renders.parquet")).to_pylist()
    pairs = sorted({(row["prompt"], row["recipe"]) for row in rows if row["status"] == "ok"})
    scorers = load_scorers(config, device=str(resolve_device(context.runtime.device)))
    unifier = Unifier.from_config(config, scorers)
    judged = judge(scorers, pairs, renders, config.batch_size)
    table = to_table(rows, judged, unifier)
    pq.write_table(table, context.out / "scores.parquet", compression="zstd")
    return StageResult(
        rows={"scores.parquet": table.num_rows},
        funnels=(_funnel(table),),
        metrics={
            "pictures": len(pairs),
            "unified": unifier.definition(),
            "unified_digest": unifier.digest,
            "scorers": {
                scorer.name: {
                    "version": scorer.version,
                    "digest": scorer.digest,
                    "truncated_prompts": judged.truncated[scorer.name],
                    "seconds": round(judged.seconds[scorer.name], 3),
                }
                for scorer in scorers
            },
        },
    )


def judge(
    scorers: Sequence[Scorer], pairs: Sequence[Pair], renders: Artifact, batch_size: int
) -> Judged:
    """Score each (prompt, picture) once with every scorer.

    Args:
        scorers: the reward models.
        pairs: distinct ones; the picture is images/DIGEST.png of ``renders``.
        renders: the artefact that has the pictures.
        batch_size: pictures decoded at a time, shared by the scorers.
    """
    judged = Judged(pairs)
    judged.metrics = {scorer.name: np.full(len(pairs), np.nan) for scorer in scorers}
    judged.seconds = {scorer.name: 0.0 for scorer in scorers}
    for numbers in batches(range(len(pairs)), batch_size):
        prompts = [pairs[i][0] for i in numbers]
        images = [_open(renders.file(f"images/{pairs[i][1]}.png")) for i in numbers]
        for scorer in scorers:
            started = time.monotonic()
            batch = scorer.score(prompts, images)
            judged.seconds[scorer.name] += time.monotonic() - started
            for offset, reason in batch.failures().items():
                log.warning("%s: %s for %r", scorer.name, reason, prompts[offset])
            judged.metrics[scorer.name][numbers] = batch.scores
            judged.truncated[scorer.name] += int(batch.truncated.sum())
    return judged


def _open(path: Path) -> Image:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def to_table(rows: Iterable[Mapping[str, Any]], judged: Judged, unifier: Unifier) -> pa.Table:
    """The rows of a render table with their scores, as ``schemas.dabench.SCORES``."""
    usable = np.ones(len(judged.pairs), np.bool_)
    for values in judged.metrics.values():
        usable &= np.isfinite(values)
    metrics = {name: values[usable] for name, values in judged.metrics.items()}
    unified = iter(unifier.unify(metrics) if usable.any() else ())
    scored: dict[Pair, dict[str, float]] = {
        pair: {
            **{name: float(values[i]) for name, values in judged.metrics.items()},
            "unified": float(next(unified)),
        }
        for i, pair in enumerate(judged.pairs)
        if usable[i]
    }
    return pa.Table.from_pylist(list(_rows(rows, scored, unifier)), schema=SCORES)


def _rows(
    rows: Iterable[Mapping[str, Any]], scored: Mapping[Pair, Mapping[str, float]], unifier: Unifier
) -> Iterator[dict[str, Any]]:
    kept = ("prompt_id", "source", "candidate", "seed", "recipe", "status", "reason")
    for row in rows:
        result = {**dict.fromkeys((*METRICS, "unified")), **{name: row[name] for name in kept}}
        if row["status"] == "invalid":
            result["unified"] = unifier.invalid_floor
        elif row["status"] == "ok":
            values = scored.get((row["prompt"], row["recipe"]))
            if values:
                result.update(values)
            else:
                result.update(status="failed", reason="score-not-finite")
        yield result


def _funnel(table: pa.Table) -> Funnel:
    reasons = table.column("reason").to_pylist()
    counts = Counter(zip(table.column("status").to_pylist(), reasons, strict=True))
    steps = tuple(
        FunnelStep(filter=status, reason=reason or "", dropped=n)
        for (status, reason), n in sorted(counts.items(), key=str)
        if status != "ok"
    )
    return Funnel(unit="scores", seen=counts.total(), kept=counts[("ok", None)], steps=steps)
