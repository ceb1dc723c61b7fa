"""Near-duplicates that straddle a split: a check that shares no method with the grouping.

The held-out rows are compared with all rows of the other splits by sparse matrix products: each
row's rarest word pairs times those of a block of held-out rows gives the candidates, and the
product of the whole rows what they share. All pairs of the threshold or more are found: two sets
that are that similar share one of the first few tokens in any order of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffagent.dabench.splits import TEST, VALIDATION, Codes, shingles, text_hash

_BLOCK = 1 << 17  # held-out rows in memory at once
_ROWS = 256  # rows compared with them at once
_PAIRS = 1 << 14  # pairs intersected at once
_EPSILON = 1e-9


@dataclass(frozen=True)
class Chunk:
    """Rows one after the other: their splits, and their sets of tokens (ascending)."""

    splits: Codes
    tokens: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Leak:
    """Two rows (numbers over all chunks) of different splits that are alike."""

    one: int
    other: int
    similarity: float


def chunk(
    splits: Codes, prompts: Sequence[str], creators: Sequence[str | None] | None = None
) -> Chunk:
    """Rows to look for leaks among; with ``creators`` only prompts of the same one are alike."""
    sets = [shingles(prompt) for prompt in prompts]
    if creators is not None:
        for row, creator in enumerate(creators):
            sets[row] = np.sort(sets[row] ^ (text_hash(creator) >> 1)) if creator else sets[row][:0]
    sizes = np.array([len(found) for found in sets], np.int64)
    return Chunk(splits, np.concatenate([*sets, np.zeros(0, np.int64)]), sizes)


def find_leaks(
    chunks: Callable[[], Iterable[Chunk]],
    threshold: float,
    *,
    limit: int = 1000,
    block: int = _BLOCK,
) -> list[Leak]:
    """Pairs of rows of different splits with a Jaccard similarity of ``threshold`` or more.

    Args:
        chunks: gives all rows; called once a block of held-out rows, so that only that is kept.
        threshold: similarity from which on two rows are alike.
        limit: stop at so many.
        block: held-out rows compared at once.
    """
    leaks: list[Leak] = []
    for split in (TEST, VALIDATION):
        for held in _blocks(chunks(), split, block):
            start = 0
            for part in chunks():
                for leak in held.search(part, start, threshold):
                    leaks.append(leak)
                    if len(leaks) == limit:
                        return leaks
                start += len(part.sizes)
    return leaks


def _blocks(chunks: Iterable[Chunk], split: int, size: int) -> Iterator[_HeldOut]:
    """The rows of a held-out split, ``size`` or a few more at a time."""
    waiting: list[tuple[npt.NDArray[Any], ...]] = []
    rows = start = 0
    for part in chunks:
        mine = part.splits == split
        tokens = part.tokens[np.repeat(mine, part.sizes)]
        waiting.append((np.flatnonzero(mine) + start, tokens, part.sizes[mine]))
        rows += len(waiting[-1][0])
        start += len(mine)
        if rows >= size:
            yield _HeldOut(split, *map(np.concatenate, zip(*waiting, strict=True)))
            waiting, rows = [], 0
    if rows:
        yield _HeldOut(split, *map(np.concatenate, zip(*waiting, strict=True)))


class _HeldOut:
    """Rows of one held-out split as a sparse matrix; its columns are their tokens by rarity."""

    def __init__(
        self,
        split: int,
        rows: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> None:
        self._split, self._rows, self._sizes = split, rows, sizes
        self._vocabulary, places, counts = np.unique(
            tokens, return_inverse=True, return_counts=True
        )
        self._ranks = np.empty(len(counts), np.int64)
        self._ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts))
        self._matrix = self._sparse(self._ranks[places], sizes)
        self._postings: Any = None

    def _sparse(self, columns: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Any:
        from scipy import sparse

        ends = np.concatenate([[0], np.cumsum(sizes)])
        shape = (len(sizes), len(self._vocabulary))
        made = sparse.csr_array((np.ones(len(columns), np.int32), columns, ends), shape=shape)
        made.sort_indices()
        return made

    def _first(self, matrix: Any, counts: npt.NDArray[np.int64]) -> Any:
        """Of each row the first so many entries."""
        sizes = np.diff(matrix.indptr)
        place = np.arange(len(matrix.indices)) - np.repeat(matrix.indptr[:-1], sizes)
        kept = place < np.repeat(counts, sizes)
        return self._sparse(matrix.indices[kept], np.clip(counts, 0, sizes))

    def search(self, part: Chunk, start: int, threshold: float) -> Iterator[Leak]:
        """Leaks between these rows and those of the chunk that is ``start`` rows in."""
        if self._postings is None:
            self._postings = self._first(self._matrix, _prefix(self._sizes, threshold)).T.tocsr()
        # Test is compared with all, validation with train: each pair once.
        mine = part.splits < self._split
        tokens = part.tokens[np.repeat(mine, part.sizes)]
        sizes, rows = part.sizes[mine], np.flatnonzero(mine) + start
        places = np.searchsorted(self._vocabulary, tokens)
        places[places == len(self._vocabulary)] = 0
        known = self._vocabulary[places] == tokens if len(self._vocabulary) else tokens < 0
        owner = np.repeat(np.arange(len(sizes)), sizes)
        there = np.bincount(owner[known], minlength=len(sizes))
        matrix = self._sparse(self._ranks[places[known]], there)
        # What no held-out row has is rarer than the rest: it comes first.
        first = self._first(matrix, _prefix(sizes, threshold) - (sizes - there))
        for begin in range(0, len(rows), _ROWS):
            found = (first[begin : begin + _ROWS] @ self._postings).tocoo()
            one, other = found.row.astype(np.int64) + begin, found.col
            low, high = np.sort([sizes[one], self._sizes[other]], axis=0)
            maybe = low >= threshold * high - _EPSILON
            one, other = one[maybe], other[maybe]
            for at in range(0, len(one), _PAIRS):
                a, b = one[at : at + _PAIRS], other[at : at + _PAIRS]
                shared = np.diff(matrix[a].multiply(self._matrix[b]).indptr)
                alike = shared / (sizes[a] + self._sizes[b] - shared)
                for pair in np.flatnonzero(alike >= threshold - _EPSILON):
                    held, row = int(self._rows[b[pair]]), int(rows[a[pair]])
                    yield Leak(min(held, row), max(held, row), float(alike[pair]))


def _prefix(sizes: npt.NDArray[np.int64], threshold: float) -> npt.NDArray[np.int64]:
    """Sets that are alike share one of so many first tokens of each; none of an empty one."""
    wanted = np.ceil(threshold * sizes - _EPSILON).astype(np.int64)
    return np.where(sizes > 0, sizes - wanted + 1, 0)
