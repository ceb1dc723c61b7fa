"""Train, validation and test without leaks: prompts that are alike never straddle a split.

With a random split a nearest neighbour answers held-out prompts by having seen nearly the same
ones: people post series, and copy each other. So pairs are grouped first (near-duplicate prompts,
and the pictures of one post), and a stable hash of the group's smallest id decides its split.

Two prompts are near-duplicates when the Jaccard similarity of their sets of word pairs is at
least a threshold. All such pairs are found, not a sample of them: a prefix filter (Chaudhuri et
al., ICDE 2006; Bayardo et al., WWW 2007) makes the exact join cheap. Sets that are that similar
must share an element among the rarest ones of each.
"""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from schemas.config import DABenchConfig

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_Ints = npt.NDArray[np.int64]
_WEIGHT = re.compile(r":\s*[\d.]+")  # of "(word:1.2)"
_WORD = re.compile(r"\w+")
_BLOCK = 256  # prompts compared with all others at once


def words(prompt: str) -> list[str]:
    """The words of a prompt without case, punctuation and attention weights."""
    return _WORD.findall(_WEIGHT.sub(" ", prompt.lower()))


def shingles(prompt: str) -> list[int]:
    """Distinct adjacent word pairs of a prompt as 64-bit hashes, ascending."""
    found = words(prompt)
    pairs = {f"{a} {b}" for a, b in pairwise(found)} or set(found)
    return sorted(
        int.from_bytes(hashlib.blake2b(p.encode(), digest_size=8).digest(), "little", signed=True)
        for p in pairs
    )


class Groups:
    """Disjoint sets of 0 .. n-1; the smallest member names its set."""

    def __init__(self, size: int) -> None:
        self._parent = array("q", range(size))

    def find(self, item: int) -> int:
        """The smallest member of the set of ``item``."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def union(self, one: int, other: int) -> None:
        """Make one set of two."""
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low

    def labels(self) -> list[int]:
        """The smallest member of the set of each item."""
        return [self.find(item) for item in range(len(self._parent))]


class PromptSets:
    """Sets of word pairs of many prompts in flat arrays: prompt i has ``tokens[starts[i]:...]``.

    A token is an exact pair of word numbers (no hashing); a prompt of one word has that word.
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        numbers: dict[str, int] = {}
        tokens, sizes = array("q"), array("q")
        for prompt in prompts:
            ids = [numbers.setdefault(word, len(numbers) + 1) for word in words(prompt)]
            pairs = {a << 32 | b for a, b in pairwise(ids)} or set(ids)
            tokens.extend(sorted(pairs))
            sizes.append(len(pairs))
        self.tokens = np.frombuffer(tokens, dtype=np.int64) if tokens else np.zeros(0, np.int64)
        self.sizes = np.frombuffer(sizes, dtype=np.int64) if sizes else np.zeros(0, np.int64)
        self.starts: _Ints = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    def jaccard(self, one: int, other: int) -> float:
        """Similarity of two prompts; 0 when either has no words."""
        a = self.tokens[self.starts[one] : self.starts[one + 1]]
        b = self.tokens[self.starts[other] : self.starts[other + 1]]
        shared = np.intersect1d(a, b, assume_unique=True).size
        return float(shared / max(a.size + b.size - shared, 1))


def group_prompts(prompts: Iterable[str], threshold: float) -> Groups:
    """Group prompts so that any two whose similarity is ``threshold`` or more are together.

    Grouping is transitive, so prompts of one group may be less alike than that.
    """
    sets = PromptSets(prompts)
    groups = Groups(len(sets.sizes))
    _join_equal(sets, groups)
    _join_similar(sets, groups, threshold)
    return groups


def _join_equal(sets: PromptSets, groups: Groups) -> None:
    first: dict[bytes, int] = {}
    for index in range(len(sets.sizes)):
        content = sets.tokens[sets.starts[index] : sets.starts[index + 1]].tobytes()
        if content:  # prompts without a word are not alike
            groups.union(first.setdefault(hashlib.sha256(content).digest(), index), index)


def _join_similar(sets: PromptSets, groups: Groups, threshold: float) -> None:
    """Union all pairs with similarity >= threshold among the distinct sets."""
    index = np.array(
        [i for i in range(len(sets.sizes)) if sets.sizes[i] and groups.find(i) == i], dtype=np.int64
    )
    index = index[np.argsort(sets.sizes[index], kind="stable")]  # small sets first
    sizes = sets.sizes[index]
    ranks, starts = _ranks(sets, index)
    # |A and B| >= threshold * max(|A|, |B|), so they share one of the first so many ranks.
    prefixes = sizes - np.array([math.ceil(threshold * size - 1e-9) for size in sizes]) + 1
    postings: dict[int, array[int]] = {}
    member = np.zeros(int(ranks.max(initial=0)) + 1, dtype=bool)
    for item in range(len(index)):
        own = ranks[starts[item] : starts[item + 1]]
        smallest = math.ceil(threshold * sizes[item] - 1e-9)
        root = groups.find(int(index[item]))
        candidates: set[int] = set()
        for rank in own[: prefixes[item]].tolist():
            known = postings.setdefault(rank, array("l"))
            candidates.update(known)
            known.append(item)
        others = [
            other
            for other in sorted(candidates)
            if sizes[other] >= smallest and groups.find(int(index[other])) != root
        ]
        if not others:
            continue
        member[own] = True
        for other in others:
            shared = int(np.count_nonzero(member[ranks[starts[other] : starts[other + 1]]]))
            union = int(sizes[item]) + int(sizes[other]) - shared
            if shared >= threshold * union - 1e-9:
                groups.union(int(index[item]), int(index[other]))
        member[own] = False


def _ranks(sets: PromptSets, index: _Ints) -> tuple[npt.NDArray[np.int32], _Ints]:
    """Tokens of the chosen sets as frequency ranks (0 rarest), ascending within each set."""
    sizes = sets.sizes[index]
    starts: _Ints = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    tokens = sets.tokens[np.repeat(sets.starts[index], sizes) + within]
    _, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int32)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts), dtype=np.int32)
    ranks = rank[inverse]
    order = np.lexsort((ranks, np.repeat(np.arange(len(index)), sizes)))
    return ranks[order], starts


def join_posts(groups: Groups, posts: Sequence[int | None]) -> None:
    """Put the pairs of one post (a series by one author) into one group."""
    first: dict[int, int] = {}
    for index, post in enumerate(posts):
        if post is not None:
            groups.union(first.setdefault(post, index), index)


def split_of(group: int, config: DABenchConfig) -> Split:
    """The split of a group, named by its smallest id; the same in every build with this seed."""
    digest = hashlib.blake2b(f"{config.seed}:{group}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < config.test_fraction:
        return "test"
    if position < config.test_fraction + config.validation_fraction:
        return "validation"
    return "train"


def find_leaks(
    prompts: Sequence[str], splits: Sequence[str], threshold: float, *, limit: int = 10
) -> list[tuple[int, int, float]]:
    """Near-duplicates that straddle a split: (index, index, similarity), none in a sound dataset.

    An independent check of `group_prompts`: the sets of all pairs of prompts are intersected, as
    one sparse product a block of rows. Quadratic in the worst case.
    """
    from scipy import sparse

    sets = PromptSets(prompts)
    _, columns = np.unique(sets.tokens, return_inverse=True)
    ones = np.ones(len(columns), dtype=np.int32)
    members = sparse.csr_array((ones, columns, sets.starts), shape=(len(prompts), columns.size + 1))
    names = np.array(splits)
    leaks: list[tuple[int, int, float]] = []
    for begin in range(0, len(prompts), _BLOCK):
        shared = (members[begin : begin + _BLOCK] @ members.T).tocoo()
        one, other, count = shared.row + begin, shared.col, shared.data
        similarity = count / (sets.sizes[one] + sets.sizes[other] - count)
        found = (one < other) & (names[one] != names[other]) & (similarity >= threshold - 1e-12)
        leaks += zip(
            one[found].tolist(), other[found].tolist(), similarity[found].tolist(), strict=True
        )
        if len(leaks) >= limit:
            break
    return leaks[:limit]
