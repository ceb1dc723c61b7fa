"""RRHF (arXiv 2304.05302), equations (1) to (4), over padded groups of ranked candidates.

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
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

INVALID_REWARD = float("-inf")


@dataclass(frozen=True)
class RRHFLoss:
    """Scalars: ``total = rank_weight * rank + sft_weight * sft``, each a mean over prompts."""

    total: Tensor
    rank: Tensor
    sft: Tensor


def sequence_logps(
    logits: Tensor, labels: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's response.

    Args:
        logits: (B, T, V) float; position t predicts token t + 1.
        labels: (B, T) int; ``ignore_index`` on prompt and padding.

    Returns:
        Sums over the response tokens (B,) float, and their numbers (B,) int.
    """
    targets = labels[:, 1:]
    nll = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, ignore_index=ignore_index, reduction="none"
    )
    return -nll.sum(1), (targets != ignore_index).sum(1)


def rrhf_loss(
    logps: Tensor,
    lengths: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    length_normalization: bool = True,
    pairs: Literal["sum", "mean"] = "sum",
    margin: float = 0.0,
    rank_weight: float = 1.0,
    sft_weight: float = 1.0,
) -> RRHFLoss:
    """Equations (2) to (4) on the log-probabilities of (1).

    Args:
        logps: (P, K) float, sums over response tokens; anything where ``mask`` is false.
        lengths: (P, K) int, response tokens.
        rewards: (P, K) float, ``INVALID_REWARD`` for an invalid answer.
        mask: (P, K) bool.
        length_normalization: p = logps / lengths as in (1); else p = logps.
        pairs: (2) sums over the pairs of a prompt; 'mean' divides by their number.
        margin: added inside the hinge; 0 in the paper.
        rank_weight: of (2).
        sft_weight: of (3).
    """
    p = logps / lengths.clamp(min=1) if length_normalization else logps
    exists = mask[:, :, None] & mask[:, None, :]
    worse = exists & (rewards[:, :, None] < rewards[:, None, :])  # (P, K, K): r_i < r_j
    hinge = (p[:, :, None] - p[:, None, :] + margin).clamp(min=0)
    rank = torch.where(worse, hinge, 0.0).sum((1, 2))
    if pairs == "mean":
        rank = rank / worse.sum((1, 2)).clamp(min=1)
    best_reward, best = rewards.masked_fill(~mask, INVALID_REWARD).max(1, keepdim=True)
    sft = torch.where(best_reward > INVALID_REWARD, -logps.gather(1, best), 0.0).squeeze(1)
    total = rank_weight * rank + sft_weight * sft
    return RRHFLoss(total.mean(), rank.mean(), sft.mean())
