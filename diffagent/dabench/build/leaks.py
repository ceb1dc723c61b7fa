"""Near-duplicates that straddle a split: a check that shares no method with the grouping.

The held-out rows are compared with all rows of the other splits by sparse matrix products: each
row's rarest word pairs times those of a block of held-out rows gives the candidates, and the
product of the whole rows what they share. All pairs of the threshold or more are found: two sets
that are that similar share one of the first few tokens in any order of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffagent.dabench.build.splits import TEST, VALIDATION, Codes, shingles, text_hash

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


#: Gives all rows; sets of rows of other splits than the given ones may be left empty.
Chunks = Callable[[Collection[int]], Iterable[Chunk]]


def chunk(
    splits: Codes, prompts: Sequence[str], creators: Sequence[str | None] | None = None
) -> Chunk:
    """Rows to look for leaks among; with ``creators`` only prompts of the same one are alike."""
    if creators is None:
        sets = [shingles(prompt) for prompt in prompts]
    else:
        nothing = np.zeros(0, np.int64)
        sets = [
            np.sort(shingles(prompt) ^ (text_hash(creator) >> 1)) if creator else nothing
            for prompt, creator in zip(prompts, creators, strict=True)
        ]
    sizes = np.array([len(found) for found in sets], np.int64)
    return Chunk(splits, np.concatenate([*sets, np.zeros(0, np.int64)]), sizes)


def find_leaks(
    chunks: Chunks, threshold: float, *, limit: int = 1000, block: int = _BLOCK
) -> list[Leak]:
    """Pairs of rows of different splits with a Jaccard similarity of ``threshold`` or more.

    Args:
        chunks: gives all rows; called for the held-out ones, then once a block of them.
        threshold: similarity from which on two rows are alike.
        limit: stop at so many.
        block: held-out rows in memory at once, or a few more.
    """
    leaks: list[Leak] = []
    for held_out in _blocks(chunks((VALIDATION, TEST)), block, threshold):
        start = 0
        for part in chunks(range(max(held.split for held in held_out))):
            for held in held_out:
                for leak in held.search(part, start):
                    leaks.append(leak)
                    if len(leaks) == limit:
                        return leaks
            start += len(part.sizes)
    return leaks


def _blocks(chunks: Iterable[Chunk], size: int, threshold: float) -> Iterator[list[_HeldOut]]:
    """The held-out rows, ``size`` or a few more at a time."""
    waiting: list[tuple[npt.NDArray[np.int64], Chunk]] = []
    rows = start = 0
    for part in chunks:
        mine = np.flatnonzero(part.splits >= VALIDATION)
        tokens = part.tokens[np.repeat(part.splits >= VALIDATION, part.sizes)]
        waiting.append((mine + start, Chunk(part.splits[mine], tokens, part.sizes[mine])))
        rows += len(mine)
        start += len(part.sizes)
        if rows >= size:
            yield _held_out(waiting, threshold)
            waiting, rows = [], 0
    if rows:
        yield _held_out(waiting, threshold)


def _held_out(
    parts: Sequence[tuple[npt.NDArray[np.int64], Chunk]], threshold: float
) -> list[_HeldOut]:
    rows = np.concatenate([numbers for numbers, _ in parts])
    splits = np.concatenate([part.splits for _, part in parts])
    tokens = np.concatenate([part.tokens for _, part in parts])
    sizes = np.concatenate([part.sizes for _, part in parts])
    return [
        _HeldOut(split, rows[mine], tokens[np.repeat(mine, sizes)], sizes[mine], threshold)
        for split in (VALIDATION, TEST)
        if (mine := splits == split).any()
    ]


class _HeldOut:
    """Rows of one held-out split as a sparse matrix; its columns are their tokens by rarity."""

    def __init__(
        self,
        split: int,
        rows: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
        threshold: float,
    ) -> None:
        self.split, self._rows, self._sizes, self._threshold = split, rows, sizes, threshold
        self._vocabulary, places, counts = np.unique(
            tokens, return_inverse=True, return_counts=True
        )
        self._ranks = np.empty(len(counts), np.int32)
        self._ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts), dtype=np.int32)
        self._matrix = self._sparse(self._ranks[places], sizes)
        self._postings = self._first(self._matrix, self._prefix(sizes)).T.tocsr()

    def _sparse(self, columns: npt.NDArray[np.int32], sizes: npt.NDArray[np.int64]) -> Any:
        from scipy import sparse

        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        shape = (len(sizes), len(self._vocabulary))
        made = sparse.csr_array((np.ones(len(columns), bool), columns, ends), shape=shape)
        made.sort_indices()
        return made

    def _first(self, matrix: Any, counts: npt.NDArray[np.int64]) -> Any:
        """Of each row the first so many entries."""
        sizes = np.diff(matrix.indptr)
        place = np.arange(len(matrix.indices)) - np.repeat(matrix.indptr[:-1], sizes)
        kept = place < np.repeat(counts, sizes)
        return self._sparse(matrix.indices[kept], np.clip(counts, 0, sizes))

    def _prefix(self, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sets that are alike share one of so many first tokens of each; none of an empty one."""
        wanted = np.ceil(self._threshold * sizes - _EPSILON).astype(np.int64)
        return np.where(sizes > 0, sizes - wanted + 1, 0)

    def search(self, part: Chunk, start: int) -> Iterator[Leak]:
        """Leaks between these rows and those of the chunk that is ``start`` rows in."""
        # Test is compared with all, validation with train: each pair once.
        mine = part.splits < self.split
        if not mine.any():
            return
        tokens = part.tokens[np.repeat(mine, part.sizes)]
        sizes, rows = part.sizes[mine], np.flatnonzero(mine) + start
        places = np.searchsorted(self._vocabulary, tokens)
        places[places == len(self._vocabulary)] = 0
        known = self._vocabulary[places] == tokens if len(self._vocabulary) else tokens < 0
        owner = np.repeat(np.arange(len(sizes)), sizes)
        there = np.bincount(owner[known], minlength=len(sizes))
        matrix = self._sparse(self._ranks[places[known]], there)
        # What no held-out row has is rarer than the rest: it comes first.
        first = self._first(matrix, self._prefix(sizes) - (sizes - there))
        for begin in range(0, len(rows), _ROWS):
            found = (first[begin : begin + _ROWS] @ self._postings).tocoo()
            one, other = found.row.astype(np.int64) + begin, found.col
            low, high = np.sort([sizes[one], self._sizes[other]], axis=0)
            maybe = low >= self._threshold * high - _EPSILON
            one, other = one[maybe], other[maybe]
            for at in range(0, len(one), _PAIRS):
                a, b = one[at : at + _PAIRS], other[at : at + _PAIRS]
                shared = np.diff(matrix[a].multiply(self._matrix[b]).indptr)
                alike = shared / (sizes[a] + self._sizes[b] - shared)
                for pair in np.flatnonzero(alike >= self._threshold - _EPSILON):
                    held, row = int(self._rows[b[pair]]), int(rows[a[pair]])
                    yield Leak(min(held, row), max(held, row), float(alike[pair]))
