"""Stages ``score`` and ``judge``: every picture scored against its prompt.

``score`` computes the rewards that agents are trained on, and unifies them to one number; ``judge``
has the held-out judges score the pictures of an evaluation.
"""

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

from diffagent.device import resolve_device
from diffagent.rewards.image_batches import load_pictures
from diffagent.rewards.judge_config import JudgesConfig
from diffagent.rewards.load import judge_files, load_judges, load_scorers, reward_files
from diffagent.rewards.score_config import RewardsConfig
from diffagent.rewards.scorer import Scorer
from diffagent.rewards.scores import define, write_scores
from diffagent.rewards.unified import Unifier
from diffagent.schemas.manifest import Funnel, FunnelStep
from diffagent.schemas.tables import JUDGEMENTS, SCORES, TRUNCATED
from diffagent.store import Artifact, Progress, StageContext, StageResult, stage

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

#: Prompt, and digest of the recipe of a picture.
Pair = tuple[str, str]


@dataclass
class PictureScores:
    """Scores of N pictures.

    Attributes:
        metrics: scorer -> (N,) float64; NaN where it returned no finite number.
        failures: index of a picture -> reason why it has no score.
        truncated: scorer -> number of prompts of which it read only the beginning.
        seconds: total time, decoding included.
    """

    metrics: dict[str, npt.NDArray[np.float64]]
    failures: dict[int, str] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def report(self, scorers: Sequence[Scorer]) -> dict[str, Any]:
        """Returns the scorers and their speed, for a manifest."""
        pictures = len(next(iter(self.metrics.values()), ()))
        return {
            "pictures": pictures,
            "pictures_per_second": round(pictures / self.seconds, 3) if self.seconds else None,
            "scorers": {
                scorer.name: {
                    "version": scorer.version,
                    "digest": scorer.digest,
                    "truncated_prompts": self.truncated[scorer.name],
                }
                for scorer in scorers
            },
        }


@stage("score", version=3, config=RewardsConfig, files=reward_files)
def score(config: RewardsConfig, context: StageContext) -> StageResult:
    """Scores the pictures of a ``render`` artifact.

    Input: ``renders``. File: scores.parquet (``diffagent.schemas.tables.SCORES``), one row per row
    of renders.parquet in the same order. The unified score of a hallucination is
    ``invalid_floor``; of a truncated answer and a failed picture it is null.

    Raises:
        ConfigError: the scorers or their reference are not usable.
        ScoreError: the reference was measured with other scorers.
    """
    runtime = context.runtime
    scorers = load_scorers(
        config, device=str(resolve_device(runtime.device)), compiled=runtime.scoring.compile
    )
    unifier = Unifier.from_config(config, scorers)
    rows, pairs, scores = _score_renders(scorers, context, config.batch_size)
    table = to_table(rows, pairs, scores, SCORES, unifier)
    definition = define(scorers, config.dtype, unifier)
    write_scores(table, context.out / "scores.parquet", definition)
    return StageResult(
        rows={"scores.parquet": table.num_rows},
        funnels=(_funnel(table),),
        metrics={
            **scores.report(scorers),
            "unified": definition["unified"],
            "unified_digest": definition["unified_digest"],
        },
    )


@stage("judge", version=1, config=JudgesConfig, files=judge_files)
def judge(config: JudgesConfig, context: StageContext) -> StageResult:
    """Scores the pictures of a ``render`` artifact with the held-out judges.

    Input: ``renders``. File: judgements.parquet (``diffagent.schemas.tables.JUDGEMENTS``), one row
    per row of renders.parquet in the same order; null without a picture or for a judge that is
    not configured.

    Raises:
        ConfigError: a judge cannot be loaded.
        ScoreError: weights do not fit their architecture.
    """
    runtime = context.runtime
    judges = load_judges(
        config, device=str(resolve_device(runtime.device)), compiled=runtime.scoring.compile
    )
    rows, pairs, scores = _score_renders(judges, context, config.batch_size)
    table = to_table(rows, pairs, scores, JUDGEMENTS)
    write_scores(table, context.out / "judgements.parquet", define(judges, config.dtype))
    return StageResult(
        rows={"judgements.parquet": table.num_rows},
        funnels=(_funnel(table),),
        metrics=scores.report(judges),
    )


def _score_renders(
    scorers: Sequence[Scorer], context: StageContext, batch_size: int
) -> tuple[list[dict[str, Any]], list[Pair], PictureScores]:
    """Returns the rows of renders.parquet, their distinct pairs, and the scores of the pairs."""
    renders: Artifact = context.one("renders")
    rows = pq.read_table(renders.file("renders.parquet")).to_pylist()
    pairs = sorted({(row["prompt"], row["recipe"]) for row in rows if row["status"] == "ok"})
    scores = score_pictures(
        scorers,
        [prompt for prompt, _ in pairs],
        [renders.file(f"images/{recipe}.png") for _, recipe in pairs],
        batch_size=batch_size,
        threads=context.runtime.scoring.decode_threads,
        progress=context.progress,
    )
    return rows, pairs, scores


def score_pictures(
    scorers: Sequence[Scorer],
    prompts: Sequence[str],
    pictures: Sequence[Path | Image],
    *,
    batch_size: int = 32,
    threads: int = 4,
    progress: Progress = lambda fraction, text: None,
) -> PictureScores:
    """Scores picture i against prompt i with every scorer.

    Each picture is decoded once, ahead of the scorers, and resized once for all scorers with the
    same preparation. On a GPU no score is waited for until the last batch is under way. Equal
    prompts in a row are encoded once, even if there are more prompts than a scorer caches.

    Args:
        scorers: reward models, on one device.
        prompts: one per picture.
        pictures: files, or pictures in memory.
        batch_size: pictures per batch.
        threads: number of threads that decode.
        progress: called after each batch.

    Returns:
        Scores in the order of the pictures; an unreadable picture is a failure.
    """
    started = time.monotonic()
    scores: dict[str, list[Any]] = {scorer.name: [] for scorer in scorers}
    cut: dict[str, set[str]] = {scorer.name: set() for scorer in scorers}
    failures: dict[int, str] = {}
    done = 0
    for batch in load_pictures(
        pictures,
        [scorer.preparation for scorer in scorers],
        batch_size=batch_size,
        threads=threads,
        pin=any(scorer.device.startswith("cuda") for scorer in scorers),
    ):
        failures |= batch.failures
        texts = [prompts[number] for number in batch.numbers]
        # Scorers with equal preparations share the copy on the device too.
        pixels = {
            scorer.preparation: batch.pixels[scorer.preparation].to(
                scorer.device, non_blocking=True
            )
            for scorer in scorers
        }
        for scorer in scorers:
            rewards, truncated = scorer.score_pixels(texts, pixels[scorer.preparation])
            scores[scorer.name].append(rewards)
            cut[scorer.name] |= {texts[row] for row in np.flatnonzero(truncated)}
        done += len(batch.numbers)
        progress(done / len(pictures), f"{done} of {len(pictures)} pictures")
    metrics = {name: _to_numpy(parts) for name, parts in scores.items()}
    for number, reason in failures.items():
        log.warning("picture %s cannot be read: %s", pictures[number], reason)
    for name, values in metrics.items():
        values[list(failures)] = np.nan
        for number in np.flatnonzero(~np.isfinite(values)).tolist():
            failures.setdefault(number, f"score-not-finite: {name}")
    truncated_prompts = {name: len(texts) for name, texts in cut.items()}
    return PictureScores(metrics, failures, truncated_prompts, time.monotonic() - started)


def _to_numpy(parts: Sequence[Any]) -> npt.NDArray[np.float64]:
    import torch

    joined: npt.NDArray[np.float64] = torch.cat([torch.zeros(0), *(p.cpu() for p in parts)]).numpy()
    return joined.astype(np.float64)


def to_table(
    rows: Iterable[Mapping[str, Any]],
    pairs: Sequence[Pair],
    scores: PictureScores,
    schema: pa.Schema,
    unifier: Unifier | None = None,
) -> pa.Table:
    """Returns the rows of a render table with their scores.

    Args:
        rows: of ``diffagent.schemas.tables.RENDERS``.
        pairs: scored prompts and pictures, in the order of ``scores``.
        scores: of the pairs.
        schema: ``SCORES`` or ``JUDGEMENTS``.
        unifier: adds the unified score.
    """
    usable = [i for i in range(len(pairs)) if i not in scores.failures]
    columns = {name: values[usable] for name, values in scores.metrics.items()}
    if unifier and usable:
        columns["unified"] = unifier.unify(columns)
    scored = {
        pairs[i]: {name: float(values[row]) for name, values in columns.items()}
        for row, i in enumerate(usable)
    }
    failed = {pairs[i]: reason.partition(":")[0] for i, reason in scores.failures.items()}
    floor = {"unified": unifier.invalid_floor} if unifier else {}
    return pa.Table.from_pylist(list(_rows(rows, scored, failed, floor, schema)), schema=schema)


def _rows(
    rows: Iterable[Mapping[str, Any]],
    scored: Mapping[Pair, Mapping[str, float]],
    failed: Mapping[Pair, str],
    floor: Mapping[str, float],
    schema: pa.Schema,
) -> Iterator[dict[str, Any]]:
    for row in rows:
        result = {name: row.get(name) for name in schema.names}
        pair = row["prompt"], row["recipe"]
        if row["status"] == "invalid":
            result.update({} if row["reason"] == TRUNCATED else floor)
        elif pair in failed:
            result.update(status="failed", reason=failed[pair])
        elif row["status"] == "ok":
            result.update(scored[pair])
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
