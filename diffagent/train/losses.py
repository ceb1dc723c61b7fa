"""Losses over ranked candidates: RRHF (arXiv 2304.05302), and others for comparison.

P prompts with at most K candidates each; ``mask`` says which candidates exist.

* Ties: candidates with equal rewards form no pair, and of several best ones the first is the
  target of (3). Callers put the dataset's own response first.
* Invalid answers have reward ``INVALID_REWARD``: below every valid one, equal among themselves,
  never the target of (3). A prompt without a valid candidate contributes nothing.
* The loss of a step is the mean over its prompts, so that the number of prompts a step changes
  the noise of the gradient and not its size.

The paper's settings are the defaults: lengths normalised, a sum over pairs, no margin, weights 1.
The authors' code departs from their equations (it divides by padded lengths and averages the SFT
term over prompt and padding); this does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

INVALID_REWARD = float("-inf")
#: Logits that exist at once in ``token_logps``: 32 MB in float32.
LOGITS_AT_ONCE = 2**23
#: Probabilities that wait for the backward pass instead of being made again: 256 MB in float32.
PROBABILITIES_KEPT = 2**26

_ADVANTAGE_EPSILON = 1e-4

Loss = Literal["rrhf", "dpo", "simpo", "gspo"]


@dataclass(frozen=True)
class RankingLoss:
    """Scalars: ``total = rank_weight * rank + sft_weight * sft``, each a mean over prompts."""

    total: Tensor
    rank: Tensor
    sft: Tensor


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Log-probabilities of tokens from the states that predict them, without an (M, V) table.

    Logits are made for a few rows at a time. Where ``weight`` is trained, the backward pass needs
    them as probabilities: beyond `PROBABILITIES_KEPT` it makes them again. Under autocast the
    products are in its type, sums in float32.

    Args:
        hidden: (M, H) float, last hidden states.
        weight: (V, H) of the output embedding.
        bias: (V,) or None.
        targets: (M,) int.

    Returns:
        (M,) float32, or float64 when ``hidden`` is.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    logps: Tensor = _TokenLogps.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return logps


class _TokenLogps(torch.autograd.Function):
    """d log p(y) / d h = W[y] - p W is had in the forward pass, while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        total = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(len(hidden), dtype=total)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keep = trained and len(hidden) * len(weight) <= PROBABILITIES_KEPT
        ctx.kept = []
        for rows in _chunks(len(hidden), len(weight)):
            logits = F.linear(hidden[rows], weight, bias).to(total)
            norm = logits.logsumexp(1, keepdim=True)
            logps[rows] = (logits.gather(1, targets[rows, None]) - norm).squeeze(1)
            probs = logits.sub_(norm).exp_() if slope is not None or keep else logits
            if slope is not None:
                slope[rows] = weight[targets[rows]] - probs.to(hidden.dtype) @ weight
            if keep:
                ctx.kept.append(probs)
        ctx.save_for_backward(hidden, weight, bias, targets, slope)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, slope = ctx.saved_tensors
        grad = grads[0]
        for_hidden = slope * grad[:, None].to(slope.dtype) if slope is not None else None
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return for_hidden, None, None, None
        for_weight = torch.zeros_like(weight, dtype=grad.dtype)
        for_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        ctx.kept.reverse()  # each is let go once it is used; a second backward makes them again
        for rows in _chunks(len(hidden), len(weight)):
            if ctx.kept:
                slopes = ctx.kept.pop()
            else:
                logits = F.linear(hidden[rows], weight, bias).to(grad.dtype)
                slopes = logits.sub_(logits.logsumexp(1, keepdim=True)).exp_()
            slopes.mul_(-grad[rows, None])
            slopes[torch.arange(len(slopes)), targets[rows]] += grad[rows]
            if weight.dtype == grad.dtype:
                for_weight.addmm_(slopes.t(), hidden[rows])
            else:
                for_weight += slopes.to(hidden.dtype).t() @ hidden[rows]
            if for_bias is not None:
                for_bias += slopes.sum(0)
        for_bias = for_bias if for_bias is None else for_bias.to(bias.dtype)
        return for_hidden, for_weight.to(weight.dtype), for_bias, None


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, start + size) for start in range(0, rows, size)]


def ranking_loss(
    logps: Tensor,
    lengths: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    loss: Loss = "rrhf",
    reference_logps: Tensor | None = None,
    length_normalization: bool = True,
    pairs: Literal["sum", "mean"] = "sum",
    margin: float = 0.0,
    beta: float = 0.1,
    clip: float = 0.2,
    rank_weight: float = 1.0,
    sft_weight: float = 1.0,
) -> RankingLoss:
    """A ranking term and RRHF's (3), on the log-probabilities l of whole responses.

    With p = l / |y| and a sum over the pairs of a prompt with r_i < r_j the ranking term is

    * rrhf: max(0, p_i - p_j + margin), equation (2) of arXiv 2304.05302;
    * dpo: -log sigmoid(beta (d_j - d_i) - margin), d = l - l_ref, arXiv 2305.18290 (7);
    * simpo: -log sigmoid(beta (p_j - p_i) - margin), arXiv 2405.14734 (6), margin = gamma;

    * gspo: no pairs but each candidate with its group-relative advantage A, GRPO's
      (arXiv 2402.03300), times the ratio of whole sequences s = exp(p - p_ref) of
      arXiv 2507.18071 (5, 7): the mean of -min(s A, clamp(s, 1 - clip, 1 + clip) A).

    Args:
        logps: (P, K) float, sums over response tokens; anything where ``mask`` is false.
        lengths: (P, K) int, response tokens.
        rewards: (P, K) float, ``INVALID_REWARD`` for an invalid answer.
        mask: (P, K) bool.
        loss: which ranking term.
        reference_logps: (P, K) float, ``logps`` of the reference policy: 'dpo' and 'gspo'.
        length_normalization: 'rrhf' has p = l / |y| as in (1); else p = l.
        pairs: the sum over the pairs of a prompt, or their mean.
        margin: by how much the better one must be ahead; 0 in RRHF and DPO.
        beta: sharpness of 'dpo' and 'simpo'.
        clip: how far 'gspo' lets a ratio go.
        rank_weight: of the ranking term.
        sft_weight: of (3).
    """
    mean = logps / lengths.clamp(min=1)
    if loss == "rrhf":
        p = mean if length_normalization else logps
        rank = _over_pairs((margin - _ahead(p)).clamp(min=0), rewards, mask, pairs)
    elif loss == "simpo":
        rank = _over_pairs(-F.logsigmoid(beta * _ahead(mean) - margin), rewards, mask, pairs)
    elif reference_logps is None:
        raise ValueError(f"loss {loss!r} needs reference_logps")
    elif loss == "dpo":
        d = logps - reference_logps
        rank = _over_pairs(-F.logsigmoid(beta * _ahead(d) - margin), rewards, mask, pairs)
    else:
        ratio = (mean - reference_logps / lengths.clamp(min=1)).exp()
        advantage = group_advantages(rewards, mask)
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        rank = -torch.where(mask, gain, 0.0).sum(1) / mask.sum(1)
    best_reward, best = rewards.masked_fill(~mask, INVALID_REWARD).max(1, keepdim=True)
    sft = torch.where(best_reward > INVALID_REWARD, -logps.gather(1, best), 0.0).squeeze(1)
    total = rank_weight * rank + sft_weight * sft
    return RankingLoss(total.mean(), rank.mean(), sft.mean())


def _ahead(score: Tensor) -> Tensor:
    """(P, K, K): score of j minus score of i."""
    return score[:, None, :] - score[:, :, None]


def _over_pairs(
    values: Tensor, rewards: Tensor, mask: Tensor, pairs: Literal["sum", "mean"]
) -> Tensor:
    """Sum or mean (P,) of ``values`` (P, K, K) over the pairs i, j with r_i < r_j."""
    exists = mask[:, :, None] & mask[:, None, :]
    worse = exists & (rewards[:, :, None] < rewards[:, None, :])
    total = torch.where(worse, values, 0.0).sum((1, 2))
    return total / worse.sum((1, 2)).clamp(min=1) if pairs == "mean" else total


def group_advantages(rewards: Tensor, mask: Tensor) -> Tensor:
    """GRPO's (r - mean) / (std + 1e-4) within each prompt (P, K), as TRL has it.

    An invalid answer is as far below the worst valid one as that is below the best, whatever the
    scale of the rewards; where the valid ones are all equal any distance gives the same, and 1 is
    taken. A prompt without a valid candidate has advantages of 0.
    """
    valid = mask & (rewards > INVALID_REWARD)
    worst = torch.where(valid, rewards, torch.inf).min(1, keepdim=True).values
    best = torch.where(valid, rewards, -torch.inf).max(1, keepdim=True).values
    distance = torch.where(best - worst > 10 * _ADVANTAGE_EPSILON, best - worst, 1.0)
    filled = torch.where(valid, rewards, worst - distance)
    filled = torch.where(mask & valid.any(1, keepdim=True), filled, 0.0)
    count = mask.sum(1, keepdim=True)
    centred = torch.where(mask, filled - filled.sum(1, keepdim=True) / count, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + _ADVANTAGE_EPSILON)
