"""Batches: ranked candidates that share one pass over their prompt, and packs of SFT examples.

Two layouts of ranked candidates give the same loss. *packed*: a prompt and its candidates are one
row, ``prefix | rest of candidate 1 | rest of candidate 2 | ...``, where the prefix is what all of
them have in common (the prompt, and the first tokens of the responses when they are the same).
Each rest goes on from the prefix: its positions do, and ``block_mask`` hides the other rests
from it. The last token of a candidate is predicted and never read, so it is left out. *padded*:
one row a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffagent.agent.lm.format import IGNORED, Example, pad

#: ``segments`` of a packed row: what all candidates read, and what nobody does.
PREFIX, PADDING = 0, -1


@dataclass(frozen=True)
class RankedPrompt:
    """One prompt with its candidates; ``rewards`` are INVALID_REWARD for invalid ones.

    ``reference_logps``: log-probability of each response under the reference policy, which the
    losses 'dpo' and 'gspo' compare with; empty where none is needed.
    """

    candidates: tuple[Example, ...]
    rewards: tuple[float, ...]
    reference_logps: tuple[float, ...] = ()


@dataclass(frozen=True)
class RRHFCollator:
    """Puts P prompts with N candidates in all (at most K a prompt) into one batch."""

    pad_token_id: int
    packed: bool = True

    def __call__(self, prompts: Sequence[RankedPrompt]) -> dict[str, Tensor]:
        """One batch, right-padded to T tokens.

        Returns:
            ``rewards``, ``reference_logps``: (P, K) float; ``mask``: (P, K) bool with N true
            entries, in row-major order the candidates. Beside them

            * packed: ``input_ids``, ``position_ids``, ``segments`` (PREFIX, PADDING or 1 + number
              of the candidate): (P, T) int; and for each of the M response tokens of the batch
              ``targets``: (M,) the token, ``rows``: (M,) where in the flattened (P * T) positions
              it is predicted, ``owners``: (M,) whose it is in the flattened (P * K) table.
            * padded: ``input_ids``, ``attention_mask``, ``labels``: (N, T) int, the candidates of
              the first prompt first.
        """
        width = max(len(prompt.rewards) for prompt in prompts)

        def table(rows: Sequence[Sequence[float]]) -> Tensor:
            return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])

        batch = {
            "rewards": table([prompt.rewards for prompt in prompts]),
            "reference_logps": table([prompt.reference_logps for prompt in prompts]),
            "mask": table([[1.0] * len(prompt.rewards) for prompt in prompts]).bool(),
        }
        return batch | (self._pack(prompts, width) if self.packed else self._pad(prompts))

    def _pad(self, prompts: Sequence[RankedPrompt]) -> dict[str, Tensor]:
        rows = [example for prompt in prompts for example in prompt.candidates]
        return {
            "input_ids": torch.tensor(pad([row.input_ids for row in rows], self.pad_token_id)),
            "attention_mask": torch.tensor(pad([[1] * len(row.input_ids) for row in rows], 0)),
            "labels": torch.tensor(pad([row.labels for row in rows], IGNORED)),
        }

    def _pack(self, prompts: Sequence[RankedPrompt], width: int) -> dict[str, Tensor]:
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        segments: list[list[int]] = []
        predictions: list[tuple[int, int, int, int]] = []  # prompt, column, token, owner
        for number, prompt in enumerate(prompts):
            shared = _common_prefix([c.input_ids for c in prompt.candidates])
            row = list(prompt.candidates[0].input_ids[:shared])
            place, segment = list(range(shared)), [PREFIX] * shared
            for k, candidate in enumerate(prompt.candidates):
                shift = len(row) - shared  # from a place in the candidate to one in the row
                rest = candidate.input_ids[shared:-1]
                row += rest
                place += range(shared, shared + len(rest))
                segment += [k + 1] * len(rest)
                predictions += [
                    (number, t - 1 if t <= shared else t - 1 + shift, label, number * width + k)
                    for t, label in enumerate(candidate.labels)
                    if label != IGNORED
                ]
            ids.append(row)
            positions.append(place)
            segments.append(segment)
        columns = max(map(len, ids))
        where, column, targets, owners = torch.tensor(predictions).unbind(1)
        return {
            "input_ids": torch.tensor(pad(ids, self.pad_token_id)),
            "position_ids": torch.tensor(pad(positions, 0)),
            "segments": torch.tensor(pad(segments, PADDING)),
            "rows": where * columns + column,
            "targets": targets,
            "owners": owners,
        }


@dataclass(frozen=True)
class PackCollator:
    """Rows of several examples each, as ``trl.pack_dataset`` fills them."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """One batch of B rows, right-padded to T tokens.

        Args:
            rows: ``input_ids``, ``labels`` and ``seq_lengths``, the lengths of the examples.

        Returns:
            ``input_ids``, ``labels``, ``position_ids``: (B, T) int. Positions begin at 0 with each
            example, by which transformers' attention tells them apart where no mask is given.
        """
        positions = [[t for n in row["seq_lengths"] for t in range(n)] for row in rows]
        return {
            "input_ids": torch.tensor(pad([row["input_ids"] for row in rows], self.pad_token_id)),
            "labels": torch.tensor(pad([row["labels"] for row in rows], IGNORED)),
            "position_ids": torch.tensor(pad(positions, 0)),
        }


def _common_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with; each keeps its last token for itself."""
    room = min(map(len, rows)) - 1
    columns = zip(*(row[:room] for row in rows), strict=True)
    return next((t for t, column in enumerate(columns) if len(set(column)) > 1), room)


def block_mask(segments: Tensor) -> Tensor:
    """Who attends to whom in packed rows.

    Args:
        segments: (P, T) int.

    Returns:
        (P, 1, T, T) bool: a token sees what lies before it in the prefix and in its own segment.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], device=segments.device).tril().bool()
    return (causal & ((key == query) | (key == PREFIX))).unsqueeze(1)
