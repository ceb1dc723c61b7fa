"""Stages ``score`` and ``judge``: every picture scored against its prompt.

``score`` makes the rewards that agents are trained on, and one number of them; ``judge`` asks the
held-out judges about the pictures of an evaluation.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from diffagent.device import resolve_device
from diffagent.rewards.image_batches import load_pictures
from diffagent.rewards.load import judge_files, load_judges, load_scorers, reward_files
from diffagent.rewards.scorer import Scorer
from diffagent.rewards.scores import define, write_scores
from diffagent.rewards.unified import Unifier
from diffagent.schemas.config import JudgesConfig, RewardsConfig
from diffagent.schemas.manifest import Funnel, FunnelStep
from diffagent.schemas.tables import (
    JUDGEMENT_TABLE,
    RENDER_TABLE,
    SCORE_TABLE,
    TRUNCATED,
    JudgementRow,
    RenderRow,
    ScoreRow,
)
from diffagent.store.artifacts import Artifact, Progress, StageContext, StageResult, stage

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

#: A prompt and the digest of the recipe of a picture.
Pair = tuple[str, str]

#: Row of the table that a stage writes.
ScoredRow = TypeVar("ScoredRow", ScoreRow, JudgementRow)


@dataclass
class Judged:
    """Scores of N pictures.

    Attributes:
        metrics: scorer -> (N,) float64; NaN where it gave no number.
        failures: number of a picture -> why it has no score.
        truncated: scorer -> how many of the prompts it read the beginning of only.
        seconds: for all of it, decoding included.
    """

    metrics: dict[str, npt.NDArray[np.float64]]
    failures: dict[int, str] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def report(self, scorers: Sequence[Scorer]) -> dict[str, Any]:
        """For a manifest: who scored, and how fast."""
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
    """Score the pictures of a ``render`` artefact.

    Input: ``renders``. File: scores.parquet (``diffagent.schemas.tables.ScoreRow``), one row a row
    of renders.parquet in the same order. The unified score of a hallucination is
    ``invalid_floor``; of a truncated answer and a failed picture it is null.

    Raises:
        ConfigError: the scorers or their reference are not usable.
        ScoreError: the reference was measured with other scorers.
    """
    runtime = context.runtime
    scorers = load_scorers(
        config, device=str(resolve_device(runtime.device)), compiled=runtime.compile_scorers
    )
    unifier = Unifier.from_config(config, scorers)
    rows, pairs, judged = _judge_renders(scorers, context, config.batch_size)
    scored = score_rows(rows, pairs, judged, ScoreRow, unifier)
    definition = define(scorers, config.dtype, unifier)
    write_scores(SCORE_TABLE, context.out / "scores.parquet", scored, definition)
    return StageResult(
        rows={"scores.parquet": len(scored)},
        funnels=(_funnel(scored),),
        metrics={
            **judged.report(scorers),
            "unified": definition["unified"],
            "unified_digest": definition["unified_digest"],
        },
    )


@stage("judge", version=1, config=JudgesConfig, files=judge_files)
def judge(config: JudgesConfig, context: StageContext) -> StageResult:
    """Have the held-out judges score the pictures of a ``render`` artefact.

    Input: ``renders``. File: judgements.parquet (``diffagent.schemas.tables.JudgementRow``), one
    row a row of renders.parquet in the same order; null where there is no picture or no such judge.

    Raises:
        ConfigError: a judge cannot be loaded.
        ScoreError: weights do not fit their architecture.
    """
    runtime = context.runtime
    judges = load_judges(
        config, device=str(resolve_device(runtime.device)), compiled=runtime.compile_scorers
    )
    rows, pairs, judged = _judge_renders(judges, context, config.batch_size)
    scored = score_rows(rows, pairs, judged, JudgementRow)
    definition = define(judges, config.dtype)
    write_scores(JUDGEMENT_TABLE, context.out / "judgements.parquet", scored, definition)
    return StageResult(
        rows={"judgements.parquet": len(scored)},
        funnels=(_funnel(scored),),
        metrics=judged.report(judges),
    )


def _judge_renders(
    scorers: Sequence[Scorer], context: StageContext, batch_size: int
) -> tuple[list[RenderRow], list[Pair], Judged]:
    """Rows of renders.parquet, their distinct (prompt, picture), and the scores of these."""
    renders: Artifact = context.one("renders")
    rows = RENDER_TABLE.read(renders.file("renders.parquet"))
    pairs = sorted({(row.prompt, row.recipe) for row in rows if row.recipe and row.status == "ok"})
    judged = score_pictures(
        scorers,
        [prompt for prompt, _ in pairs],
        [renders.file(f"images/{recipe}.png") for _, recipe in pairs],
        batch_size=batch_size,
        threads=context.runtime.decode_threads,
        progress=context.progress,
    )
    return rows, pairs, judged


def score_pictures(
    scorers: Sequence[Scorer],
    prompts: Sequence[str],
    pictures: Sequence[Path | Image],
    *,
    batch_size: int = 32,
    threads: int = 4,
    progress: Progress = lambda fraction, text: None,
) -> Judged:
    """Score picture i against prompt i with every scorer.

    Each picture is decoded once, ahead of the scorers, and resized once for all of them that
    want the same. On a GPU nothing waits for a score until the last batch is under way. Prompts
    that stand together share their features even where they are more than a scorer remembers.

    Args:
        scorers: the reward models, on one device.
        prompts: one a picture.
        pictures: files, or pictures in memory.
        batch_size: pictures at a time.
        threads: that decode.
        progress: called after each batch.

    Returns:
        Scores in the order of the pictures; one that cannot be read is a failure.
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
        # Scorers that share a preparation share the copy on the device too.
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
    return Judged(metrics, failures, truncated_prompts, time.monotonic() - started)


def _to_numpy(parts: Sequence[Any]) -> npt.NDArray[np.float64]:
    import torch

    joined: npt.NDArray[np.float64] = torch.cat([torch.zeros(0), *(p.cpu() for p in parts)]).numpy()
    return joined.astype(np.float64)


def score_rows(
    rows: Iterable[RenderRow],
    pairs: Sequence[Pair],
    judged: Judged,
    kind: type[ScoredRow],
    unifier: Unifier | None = None,
) -> list[ScoredRow]:
    """Returns the rows of a render table with their scores.

    Args:
        rows: of renders.parquet.
        pairs: the scored (prompt, picture), in the order of ``judged``.
        judged: their scores.
        kind: row of the result.
        unifier: adds the unified score.
    """
    usable = [i for i in range(len(pairs)) if i not in judged.failures]
    columns = {name: values[usable] for name, values in judged.metrics.items()}
    if unifier and usable:
        columns["unified"] = unifier.unify(columns)
    scored = {
        pairs[i]: {name: float(values[row]) for name, values in columns.items()}
        for row, i in enumerate(usable)
    }
    failed = {pairs[i]: reason.partition(":")[0] for i, reason in judged.failures.items()}
    floor = {"unified": unifier.invalid_floor} if unifier else {}
    return [_score_row(row, scored, failed, floor, kind) for row in rows]


def _score_row(
    row: RenderRow,
    scored: Mapping[Pair, Mapping[str, float]],
    failed: Mapping[Pair, str],
    floor: Mapping[str, float],
    kind: type[ScoredRow],
) -> ScoredRow:
    pair = row.prompt, row.recipe or ""
    status, reason = row.status, row.reason
    numbers: Mapping[str, Any] = {}
    if status == "invalid":
        numbers = {} if reason == TRUNCATED else floor
    elif pair in failed:
        status, reason = "failed", failed[pair]
    elif status == "ok":
        numbers = scored[pair]
    return kind(
        prompt_id=row.prompt_id,
        source=row.source,
        candidate=row.candidate,
        seed=row.seed,
        recipe=row.recipe,
        status=status,
        reason=reason,
        **numbers,
    )


def _funnel(rows: Sequence[ScoreRow | JudgementRow]) -> Funnel:
    counts = Counter((row.status, row.reason) for row in rows)
    steps = tuple(
        FunnelStep(filter=status, reason=reason or "", dropped=n)
        for (status, reason), n in sorted(counts.items(), key=str)
        if status != "ok"
    )
    return Funnel(unit="scores", seen=counts.total(), kept=counts[("ok", None)], steps=steps)
