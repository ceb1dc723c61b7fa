"""Batches of ranked candidates: several prompts a step, as many candidates as each has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffagent.agent.format import IGNORED, Example, pad


@dataclass(frozen=True)
class RankedPrompt:
    """One prompt with its candidates; ``rewards`` are INVALID_REWARD for invalid ones."""

    candidates: tuple[Example, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class RRHFCollator:
    """Puts P prompts with N candidates in all (at most K a prompt) into one batch."""

    pad_token_id: int

    def __call__(self, prompts: Sequence[RankedPrompt]) -> dict[str, Tensor]:
        """Right-padded rows and the table of their rewards.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels``: (N, T), the rows of the first prompt
            first. ``rewards``: (P, K) float. ``mask``: (P, K) bool with N true entries, in
            row-major order the rows above.
        """
        rows = [example for prompt in prompts for example in prompt.candidates]
        rewards = [list(prompt.rewards) for prompt in prompts]
        width = max(map(len, rewards))
        return {
            "input_ids": torch.tensor(pad([row.input_ids for row in rows], self.pad_token_id)),
            "attention_mask": torch.tensor(pad([[1] * len(row.input_ids) for row in rows], 0)),
            "labels": torch.tensor(pad([row.labels for row in rows], IGNORED)),
            "rewards": torch.tensor([r + [0.0] * (width - len(r)) for r in rewards]),
            "mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rewards]).bool(),
        }
