"""Keys and values of a batch whose rows grow by different lengths."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffagent.agent.lm.format import pad


class KeyValues:
    """What a causal language model remembers of the rows that it has read.

    Rows of a chunk are padded on the right, and tokens can be forgotten again: both stay in the
    cache and are masked, while positions count real tokens alone. So any decoder of transformers
    with a `DynamicCache` and position ids will do.

    Attributes:
        passes: forward passes so far.
        tokens: tokens that were computed, padding included.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._cache = model.make_cache() if hasattr(model, "make_cache") else _dynamic_cache()
        self._mask = torch.zeros(0, 0, dtype=torch.int64)
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._chunk: list[int] = []
        accepted = inspect.signature(model.forward).parameters
        self._slices = "logits_to_keep" in accepted
        self.passes = self.tokens = 0

    def feed(
        self, chunks: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Read one more chunk of every row; chunks may be empty, but not all of them.

        Args:
            chunks: tokens of each row.
            wanted: positions in each chunk, in order, after which logits are wanted.

        Returns:
            For each row (len(wanted), V) float32.
        """
        width = max(map(len, chunks))
        if not self._lengths.numel():
            self._mask = torch.zeros(len(chunks), 0, dtype=torch.int64)
            self._lengths = torch.zeros(len(chunks), dtype=torch.int64)
        mask = torch.tensor(pad([[1] * len(chunk) for chunk in chunks], 0))
        self._mask = torch.cat([self._mask, mask], 1)
        positions = self._lengths[:, None] + torch.arange(width)
        positions = positions.minimum((self._lengths + mask.sum(1) - 1).clamp(min=0)[:, None])
        self._lengths = self._lengths + mask.sum(1)
        self._chunk = [len(chunk) for chunk in chunks]
        kept = sorted({position for row in wanted for position in row})
        extra = {"logits_to_keep": self._to(torch.tensor(kept))} if self._slices else {}
        with torch.inference_mode():
            logits = self._model(
                input_ids=self._to(torch.tensor(pad(chunks, 0))),
                attention_mask=self._to(self._mask),
                position_ids=self._to(positions),
                past_key_values=self._cache,
                use_cache=True,
                **extra,
            ).logits
        self.passes += 1
        self.tokens += len(chunks) * width
        column = {position: i for i, position in enumerate(kept)} if self._slices else None
        return [
            logits[row, [column[p] if column else p for p in positions]].float()
            for row, positions in enumerate(wanted)
        ]

    def forget(self, counts: Sequence[int]) -> None:
        """Forget the last tokens of each row's latest chunk, as many as ``counts`` says."""
        width = max(self._chunk)
        start = self._mask.shape[1] - width
        for row, (count, length) in enumerate(zip(counts, self._chunk, strict=True)):
            self._mask[row, start + length - count : start + length] = 0
        self._lengths = self._lengths - torch.tensor(counts)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; one may come several times."""
        if list(rows) == list(range(len(self._lengths))):
            return
        index = torch.tensor(rows)
        self._cache.batch_select_indices(self._to(index))
        self._mask, self._lengths = self._mask[index], self._lengths[index]

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


def _dynamic_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()
