"""A trie over token sequences, kept as one sorted array.

A node is a range of rows that agree on their first ``depth`` tokens; its children are found in
one column, and what a single row has left is a slice. Nothing is built but the sorted array, so
that 75,000 names take about a second, nearly all of it in the tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Value = TypeVar("Value")
Tokens = npt.NDArray[np.int32]


class TokenTrie(Generic[Value]):
    """Token sequences, sorted, each with what it stands for.

    Of equal sequences (a tokenizer that normalises may make them of different texts) the first
    one stays: the others could never be told from it.
    """

    def __init__(
        self, sequences: Sequence[Sequence[int]], texts: Sequence[str], values: Sequence[Value]
    ) -> None:
        # Big-endian words compare as their numbers do, and bytes sort much faster than lists.
        keys = [np.asarray(sequence, dtype=">u4").tobytes() for sequence in sequences]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        kept = [row for i, row in enumerate(order) if i == 0 or keys[row] != keys[order[i - 1]]]
        self.texts = [texts[row] for row in kept]
        self.values = [values[row] for row in kept]
        lengths = [len(keys[row]) // 4 for row in kept]
        self._flat: Tokens = np.frombuffer(b"".join(keys[row] for row in kept), ">u4").astype("i4")
        self._starts = np.fromiter(itertools.accumulate(lengths, initial=0), np.int64)
        self._rows = {text: row for row, text in enumerate(self.texts)}

    def __len__(self) -> int:
        return len(self.texts)

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return int(self._starts[row + 1] - self._starts[row])

    def row(self, text: str) -> int | None:
        """The row of a text, or None."""
        return self._rows.get(text)

    def token(self, row: int, depth: int) -> int:
        """One token of a row."""
        return int(self._flat[self._starts[row] + depth])

    def rest(self, row: int, depth: int) -> list[int]:
        """The tokens of a row from ``depth`` on."""
        rest: list[int] = self._flat[self._starts[row] + depth : self._starts[row + 1]].tolist()
        return rest

    def column(self, low: int, high: int, depth: int) -> Tokens:
        """Token number ``depth`` of rows low..high, ascending; each must have one."""
        return self._flat[self._starts[low:high] + depth]

    def children(self, low: int, high: int, depth: int) -> Tokens:
        """The distinct tokens that follow in rows low..high, ascending."""
        column = self.column(low, high, depth)
        if column[0] == column[-1]:
            return column[:1]
        return np.concatenate([column[:1], column[1:][column[1:] != column[:-1]]])

    def narrow(self, low: int, high: int, depth: int, token: int) -> tuple[int, int]:
        """The rows of low..high that have ``token`` at ``depth``; an empty range if none has."""
        column = self.column(low, high, depth)
        found: Any = np.searchsorted(column, [token, token + 1])
        return low + int(found[0]), low + int(found[1])


def encode_texts(tokenizer: Any, texts: Sequence[str], context: str = "") -> list[list[int]]:
    """Tokens of each text as they are when it follows ``context``, without special tokens.

    The context must end where no token of the tokenizer reaches across, as between a letter and
    punctuation. It keeps a tokenizer that puts a space before every text from doing so here.
    """
    if not texts:
        return []
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # '</s>' in a name is text
    before, *rows = backend.encode_batch_fast(
        [context, *(context + text for text in texts)], add_special_tokens=False
    )
    skipped = len(before) if context else 0
    return [row.ids[skipped:] for row in rows]
