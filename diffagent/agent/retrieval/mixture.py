"""Experts weighed against each other: a conditional logit, fitted on the validation split alone.

The probability of model m is softmax_m of sum_k (a_k + b_k c) s_k(m), where s_k are the experts'
scores and c in [0, 1] is how near the nearest training prompt is: votes of neighbours are worth
more where there are neighbours. The weights minimise the cross-entropy of what people chose
(convex in a and b; McFadden 1974), which is what temperature scaling does for a single expert, so
the probabilities come out calibrated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diffagent.agent.retrieval.experts import Evidence, Expert, Memory, log_softmax
from diffagent.agent.retrieval.terms import Floats

log = logging.getLogger(__name__)

BLOCK = 128
"""Prompts whose evidence is held at a time: (128, 75,000 models) float32 is 38 MB an expert."""
_CANDIDATES = 256  # best models, and as many drawn ones, that a softmax is fitted over
_RIDGE = 1e-3


@dataclass(frozen=True)
class Mixture:
    """Probabilities of models.

    Attributes:
        experts: by name.
        weights: (2, experts): a and b.
        gate: index whose largest similarity is c; '' for none (b is 0).
    """

    experts: Mapping[str, Expert]
    weights: npt.NDArray[np.float64]
    gate: str = ""

    def log_probabilities(self, evidence: Evidence) -> Floats:
        """(prompts, models)."""
        strength = gates(evidence, self.gate) @ self.weights
        total = np.zeros((len(evidence.prompts), len(evidence.memory.calls.models)), np.float32)
        for column, expert in enumerate(self.experts.values()):
            total += strength[:, [column]].astype(np.float32) * expert.scores(evidence)
        return log_softmax(total)


def gates(evidence: Evidence, name: str) -> npt.NDArray[np.float64]:
    """(prompts, 2): 1 and how near the nearest training prompt is."""
    ones = np.ones(len(evidence.prompts))
    if not name:
        return np.stack([ones, 0 * ones], axis=1)
    similar = evidence.similarity(name)
    nearest = similar.max(axis=1) if similar.shape[1] else 0 * ones
    return np.stack([ones, nearest], axis=1)


def blocks(
    memory: Memory, prompts: Sequence[str], vectors: Floats | None = None
) -> Iterator[tuple[slice, Evidence]]:
    """Evidence of many prompts, some at a time; ``vectors``: of the encoder, where known."""
    for start in range(0, len(prompts), BLOCK):
        part = slice(start, start + BLOCK)
        yield part, Evidence(memory, prompts[part], None if vectors is None else vectors[part])


def fit_mixture(
    experts: Mapping[str, Expert],
    memory: Memory,
    prompts: Sequence[str],
    chosen: Sequence[str],
    *,
    gate: str = "",
    vectors: Floats | None = None,
) -> Mixture:
    """Weights that make what was ``chosen`` for validation prompts likely.

    Prompts whose model the catalogue lacks are left out. Without any prompt all weights are 1.
    """
    places = {name: place for place, name in enumerate(memory.calls.models)}
    start = np.zeros((2, len(experts)))
    start[0] = 1
    parts = []
    for part, evidence in blocks(memory, prompts, vectors):
        truth = np.array([places.get(name, -1) for name in chosen[part]])
        known = np.flatnonzero(truth >= 0)
        if len(known):
            scores = [expert.scores(evidence)[known] for expert in experts.values()]
            parts.append((*_candidates(scores, truth[known]), gates(evidence, gate)[known]))
    if not parts:
        log.warning("no validation prompt to weigh experts by; all weigh the same")
        return Mixture(experts, start, gate)
    features, counts, gated = (np.concatenate(part) for part in zip(*parts, strict=True))
    weights = fit_weights(features, counts, gated, start)
    log.info("weights of %s: %s", ", ".join(experts), weights.round(2).tolist())
    return Mixture(experts, weights, gate)


def fit_weights(
    features: Floats,
    counts: npt.NDArray[np.float64],
    gated: npt.NDArray[np.float64],
    start: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Weights of scores that make the first model of each row likely among those of the row.

    Args:
        features: (rows, models, scores).
        counts: (rows, models) logarithms of how many models each stands for.
        gated: (rows, gates), what the weights of a row are sums of.
        start: (gates, scores).

    Returns:
        (gates, scores).
    """
    from scipy.optimize import minimize

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weights = flat.reshape(start.shape)
        logits = np.einsum("nkf,nf->nk", features, gated @ weights, optimize=True)
        logits = log_softmax(logits + counts)
        error = np.exp(logits)
        error[:, 0] -= 1  # the truth comes first
        slope = gated.T @ np.einsum("nk,nkf->nf", error, features) / len(features)
        value = -logits[:, 0].mean() + _RIDGE * (weights**2).sum()
        return float(value), (slope + 2 * _RIDGE * weights).ravel()

    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    weights: npt.NDArray[np.float64] = found.x.reshape(start.shape)
    return weights


def _candidates(
    scores: list[Floats], truth: npt.NDArray[np.int64]
) -> tuple[Floats, npt.NDArray[np.float64]]:
    """A sample of models that stands for all of them in each prompt's softmax.

    The truth, then the best by the sum of the scores, then models drawn from all; of those that
    are neither each stands for many.

    Returns:
        (prompts, sample, experts) scores, and (prompts, sample) logarithms of how many models each
        stands for (-inf: of none, it is there already).
    """
    total = np.sum(scores, axis=0)
    models = total.shape[1]
    kept = min(_CANDIDATES, models)
    best = np.argpartition(-total, kept - 1, axis=1)[:, :kept]
    drawn = np.random.default_rng(0).choice(models, kept, replace=False)
    is_best = np.zeros(total.shape, bool)
    np.put_along_axis(is_best, best, True, axis=1)
    sample = np.hstack([truth[:, None], best, np.broadcast_to(drawn, best.shape)])
    others = ~is_best[:, drawn]
    stands_for = (models - kept) / np.maximum(others.sum(axis=1, keepdims=True), 1)
    counts = np.hstack([np.ones_like(truth)[:, None], np.ones(best.shape), others * stands_for])
    counts[:, 1:][sample[:, 1:] == truth[:, None]] = 0
    stacked = np.stack([np.take_along_axis(score, sample, axis=1) for score in scores], axis=-1)
    with np.errstate(divide="ignore"):
        return stacked.astype(np.float32), np.log(counts)
