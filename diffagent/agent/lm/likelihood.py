"""Likelihood of responses under a language model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
