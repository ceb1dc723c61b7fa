"""Which of millions of sets are alike: an exact similarity join in flat memory.

All pairs with a Jaccard similarity of a threshold or more are found, not a sample of them, by a
prefix filter (Chaudhuri et al., ICDE 2006; Bayardo et al., WWW 2007): order all tokens, rarest
first; two sets that are alike share one among the first few of each. Those first tokens lie on
disk, partitioned by token and sorted, and only one partition is in memory at a time. Candidates
pass the filters of size and position (PPJoin; Xiao et al., WWW 2008) and of signatures (bitmap
filter; Sandes et al., VLDB Journal 2020), and what is left is intersected, the sets read from disk.

Few need all the pairs: who asks says which ones would tell something new (`Question`). Else a
cluster of 20,000 prompts that are nearly the same would have 200 million.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

_BUCKETS = 25  # bits: tokens are counted in at most so many buckets (128 MiB)
_CHUNK_SETS = 1 << 13
_PARTITION = 1 << 21  # entries
_PAIRS = 1 << 18  # candidates that are looked at together
_TOKENS = 1 << 20  # tokens that are intersected together
_SHORT = 48  # runs of up to so many sets are compared side by side
_EPSILON = 1e-9  # 3 of 5 is 0.6


class Question(Protocol):
    """What a join is asked for. Nodes are numbers of sets; all arguments are arrays of them."""

    def active(self, nodes: Int32s) -> Flags:
        """Which nodes take part."""

    def asking(self, nodes: Int32s) -> Flags:
        """Which nodes want to know: of a pair that is told one has to be among them."""

    def classes(self, nodes: Int32s) -> Ints:
        """Numbers such that `wanted` is the same for all nodes that have the same one."""

    def wanted(self, one: Int32s, other: Int32s) -> Flags:
        """Which pairs would tell something new, if they were alike."""

    def found(self, one: Int32s, other: Int32s) -> None:
        """These pairs are alike. Each pair that is alike is told as long as it is wanted."""


def mix(values: Words) -> Words:
    """64 well-mixed bits of each number (the finaliser of SplitMix64, a bijection)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ranges(starts: Ints, sizes: npt.NDArray[np.integer]) -> Ints:
    """``starts[0], starts[0] + 1, ...`` (sizes[0] numbers), then those of the next, ..."""
    ends = np.cumsum(sizes)
    shift = np.asarray(starts - ends + sizes, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(shift, sizes)


class SetStore:
    """Sets of tokens (int64 >= 0, ascending) in a file; sizes and signatures in memory.

    ``signs`` (2 x 64 bits a set) are parities: two sets that differ in n tokens differ in at most
    n bits.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("w+b")
        self._sizes: list[Int32s] = []
        self._signs: list[Words] = []
        self.sizes: Int32s = np.zeros(0, np.int32)
        self.starts: Ints = np.zeros(1, np.int64)
        self.signs: Words = np.zeros((0, 2), np.uint64)

    def append(self, tokens: Ints, sizes: Int32s) -> None:
        """Add sets of at least one token, one after the other in ``tokens``."""
        if not len(sizes):
            return
        tokens.tofile(self._stream)
        begins = np.cumsum(sizes) - sizes
        bits = np.uint64(1) << (tokens.view(np.uint64) & np.uint64(63))
        upper = (tokens & 64).astype(bool)
        signs = [np.where(upper, np.uint64(0), bits), np.where(upper, bits, np.uint64(0))]
        self._signs.append(
            np.stack([np.bitwise_xor.reduceat(half, begins) for half in signs], axis=1)
        )
        self._sizes.append(sizes.astype(np.int32))

    def finish(self) -> None:
        """All sets are there."""
        self._stream.flush()
        if self._sizes:
            self.sizes = np.concatenate(self._sizes)
            self.signs = np.concatenate(self._signs)
        self._sizes, self._signs = [], []
        self.starts = np.zeros(len(self.sizes) + 1, np.int64)
        np.cumsum(self.sizes, out=self.starts[1:])

    def close(self) -> None:
        """Close the file; whoever gave the path deletes it."""
        self._stream.close()

    def chunks(self, nodes: Int32s) -> Iterator[tuple[slice, Ints]]:
        """The tokens of many sets, some of them at a time: (which of the nodes, tokens)."""
        for begin in range(0, len(nodes), _CHUNK_SETS):
            part = slice(begin, min(begin + _CHUNK_SETS, len(nodes)))
            yield part, self.take(nodes[part])

    def take(self, nodes: Int32s) -> Ints:
        """The tokens of these sets, one after the other."""
        if len(nodes) and (np.diff(nodes) == 1).all():  # in one piece
            first = int(self.starts[nodes[0]])
            count = int(self.starts[nodes[-1] + 1]) - first
            return np.frombuffer(os.pread(self._stream.fileno(), 8 * count, 8 * first), np.int64)
        sizes, starts = (8 * self.sizes[nodes]).tolist(), (8 * self.starts[nodes]).tolist()
        number = self._stream.fileno()
        data = b"".join(os.pread(number, *part) for part in zip(sizes, starts, strict=True))
        return np.frombuffer(data, np.int64)

    def shared(self, one: Int32s, other: Int32s) -> Ints:
        """How many tokens the sets of each pair share."""
        from scipy import sparse

        nodes, places = np.unique(np.concatenate([one, other]), return_inverse=True)
        tokens = self.take(nodes)
        ends = np.concatenate([[0], np.cumsum(self.sizes[nodes], dtype=np.int64)])
        # Tokens are the columns as they are: nothing is as wide as the matrix but its shape.
        rows = sparse.csr_array(
            (np.ones(len(tokens), np.int8), tokens, ends), shape=(len(nodes), 2**63 - 1)
        )
        both = rows[places[: len(one)]].multiply(rows[places[len(one) :]])
        counts: Ints = np.diff(both.indptr).astype(np.int64)
        return counts


class Join:
    """The pairs of alike sets of a store, found as often as one likes (`ask`).

    Args:
        store: the sets.
        threshold: Jaccard similarity from which on two are alike.
        scratch: an empty directory for the partitions.
        nodes: number of the set of each node; None: the sets are the nodes.
        salts: 64 bits a node; only nodes of the same salt can be alike. None: all can.
    """

    def __init__(
        self,
        store: SetStore,
        threshold: float,
        scratch: Path,
        *,
        nodes: Int32s | None = None,
        salts: Words | None = None,
    ) -> None:
        self._store, self._threshold, self._scratch = store, threshold, scratch
        self._nodes = np.arange(len(store.sizes), dtype=np.int32) if nodes is None else nodes
        self._salts = salts
        self._sizes = store.sizes if nodes is None else store.sizes[nodes]
        scratch.mkdir(parents=True, exist_ok=True)
        self._paths = self._write_partitions()
        for path in self._paths:
            self._sort_partition(path)

    def _write_partitions(self) -> list[Path]:
        """Entries (token, node << 16 | position) of the prefixes, in no order."""
        total = int(self._sizes.sum(dtype=np.int64))
        bits = min(_BUCKETS, max(10, total.bit_length()))
        mask = (1 << bits) - 1
        counts = np.zeros(1 << bits, np.uint32)
        for _, _, tokens in self._tokens():
            np.add.at(counts, tokens & mask, np.uint32(1))
        parts = max(1, -(-total // (2 * _PARTITION)))
        paths = [self._scratch / f"{number:04d}.bin" for number in range(parts)]
        streams = [path.open("wb") for path in paths]
        for begin, sizes, tokens in self._tokens():
            # Rarest first: by bucket count, then by token. A stable sort keeps the order by token
            # among those that the key does not tell apart (at least 27 bits: few).
            often = np.minimum(counts[tokens & mask], (1 << 20) - 1).astype(np.int64)
            owner = np.repeat(np.arange(len(sizes)), sizes)
            order = np.argsort(owner << 47 | often << 27 | tokens >> 36, kind="stable")
            place = ranges(np.zeros(len(sizes), np.int64), sizes)
            kept = (place < np.repeat(self._prefix(sizes), sizes)) & (often[order] > 1)
            entries = np.stack([tokens[order], (owner + begin) << 16 | place], axis=1)[kept]
            part = (entries[:, 0] >> 7) % parts
            for number in np.unique(part):
                entries[part == number].tofile(streams[number])
        for stream in streams:
            stream.close()
        return paths

    def _tokens(self) -> Iterator[tuple[int, Int32s, Ints]]:
        """All nodes, a chunk at a time: (first node, sizes, tokens with their salts)."""
        for part, tokens in self._store.chunks(self._nodes):
            sizes = self._sizes[part]
            if self._salts is None:
                yield part.start, sizes, tokens
                continue
            salted = mix(tokens.view(np.uint64) ^ np.repeat(self._salts[part], sizes))
            own = (salted >> np.uint64(1)).view(np.int64)
            owner = np.repeat(np.arange(len(sizes)), sizes)
            yield part.start, sizes, own[np.lexsort((own, owner))]

    def _prefix(self, sizes: Int32s) -> Ints:
        """|A and B| >= threshold * max(|A|, |B|), so they share one of so many first tokens."""
        wanted = np.ceil(self._threshold * sizes - _EPSILON).astype(np.int64)
        first: Ints = np.minimum(sizes - wanted + 1, 1 << 16)
        return first

    def _sort_partition(self, path: Path) -> None:
        """By token, then by size; without tokens of one set."""
        entries = np.fromfile(path, np.int64).reshape(-1, 2)
        tokens, nodes = entries[:, 0], entries[:, 1] >> 16
        entries = entries[np.lexsort((nodes, self._sizes[nodes], tokens))]
        same = entries[1:, 0] == entries[:-1, 0]
        shared = np.zeros(len(entries), bool)
        shared[1:] |= same
        shared[:-1] |= same
        entries[shared].tofile(path)

    def ask(self, question: Question) -> None:
        """Tell ``question`` of the pairs that it wants."""
        for path in self._paths:
            entries = np.fromfile(path, np.int64).reshape(-1, 2)
            nodes = (entries[:, 1] >> 16).astype(np.int32)
            kept = np.flatnonzero(question.active(nodes))
            tokens, nodes = entries[kept, 0], nodes[kept]
            places = (entries[kept, 1] & 0xFFFF).astype(np.int32)
            del entries, kept
            if not len(nodes):
                continue
            starts = np.flatnonzero(np.concatenate([[True], tokens[1:] != tokens[:-1]]))
            lengths = np.diff(np.append(starts, len(tokens)))
            asked = np.logical_or.reduceat(question.asking(nodes), starts) & (lengths > 1)
            short = asked & (lengths <= _SHORT)
            self._compare_short(question, nodes, places, starts[short], lengths[short])
            for run in np.flatnonzero(asked & ~short):
                part = slice(starts[run], starts[run] + lengths[run])
                self._compare_long(question, nodes[part], places[part])

    def _compare_short(
        self, question: Question, nodes: Int32s, places: Int32s, starts: Ints, lengths: Ints
    ) -> None:
        """All runs at once: each set with its next one, then with the next but one, ..."""
        first = ranges(starts, lengths)
        ends = np.repeat(starts + lengths, lengths)
        sizes = self._sizes[nodes]
        step = 1
        while len(first):
            inside = first + step < ends
            first, ends = first[inside], ends[inside]
            # Sizes ascend: what is too small for this one is too small for those that follow.
            alike = sizes[first] >= self._threshold * sizes[first + step] - _EPSILON
            first, ends = first[alike], ends[alike]
            for part in np.split(first, range(_PAIRS, len(first), _PAIRS)):
                other = part + step
                self._settle(question, nodes[part], nodes[other], places[part], places[other])
            step += 1

    def _compare_long(self, question: Question, nodes: Int32s, places: Int32s) -> None:
        """One run: sets that ask with the classes that they want to know of.

        A block of those that ask is compared with one member of each class first: where most are
        alike that answers most of what is asked. Then with all members.
        """
        asking = question.asking(nodes)
        pivots = np.flatnonzero(asking)
        seen = np.zeros(len(nodes), bool)  # the members that the block was compared with
        begin = tried = 0
        while begin < len(pivots):
            _, heads, classes, counts = np.unique(
                question.classes(nodes), return_index=True, return_inverse=True, return_counts=True
            )
            end = begin + max(1, _PAIRS // len(heads))
            block = pivots[begin : min(end, tried) if begin < tried else end]
            row, column = np.divmod(np.arange(len(block) * len(heads)), len(heads))
            wanted = question.wanted(nodes[block[row]], nodes[heads[column]])
            row, column = row[wanted], column[wanted]
            if begin == tried:
                tried += len(block)
                seen[:] = False
                seen[heads] = True
                one, other = block[row], heads[column]
            else:
                pairs = np.bincount(row, weights=counts[column], minlength=len(block))
                block = block[: max(1, int(np.searchsorted(np.cumsum(pairs), _PAIRS, "right")))]
                begin += len(block)
                row, column = row[row < len(block)], column[row < len(block)]
                members = np.argsort(classes, kind="stable")
                firsts = np.cumsum(counts) - counts
                one = np.repeat(block[row], counts[column])
                other = members[ranges(firsts[column], counts[column])]
                one, other = one[~seen[other]], other[~seen[other]]
            once = (other > one) | ~asking[other]
            one, other = one[once], other[once]
            self._settle(question, nodes[one], nodes[other], places[one], places[other])

    def _settle(
        self, question: Question, one: Int32s, other: Int32s, place: Int32s, second: Int32s
    ) -> None:
        """Tell which of these candidates are alike."""
        size, twin = self._sizes[one], self._sizes[other]
        # |A and B| >= threshold * |A or B|. Where they share their first token, the rest of each
        # bounds what they share; at later ones this pair is not new any more, or was ruled out.
        need = self._need(size + twin)
        maybe = np.minimum(size - place, twin - second) >= need
        one, other, need = one[maybe], other[maybe], need[maybe]
        signs = self._store.signs
        a, b = self._nodes[one], self._nodes[other]
        differ = np.bitwise_count(signs[a, 0] ^ signs[b, 0]).astype(np.int32)
        differ += np.bitwise_count(signs[a, 1] ^ signs[b, 1])
        maybe = differ <= self._sizes[one] + self._sizes[other] - 2 * need
        one, other = one[maybe], other[maybe]
        weight = np.cumsum(self._sizes[one] + self._sizes[other], dtype=np.int64)
        bounds = np.flatnonzero(np.diff(weight // _TOKENS)) + 1
        for a, b in zip(np.split(one, bounds), np.split(other, bounds), strict=True):
            new = np.flatnonzero(question.wanted(a, b))
            if len(new):
                alike = new[self._alike(a[new], b[new])]
                question.found(a[alike], b[alike])

    def _need(self, sizes: Int32s) -> Int32s:
        """How many tokens two sets that are alike share, by the sum of their sizes."""
        share = self._threshold / (1 + self._threshold)
        need: Int32s = np.ceil(share * sizes - _EPSILON).astype(np.int32)
        return need

    def _alike(self, one: Int32s, other: Int32s) -> Flags:
        shared = self._store.shared(self._nodes[one], self._nodes[other])
        union = self._sizes[one] + self._sizes[other] - shared
        alike: Flags = shared >= self._threshold * union - _EPSILON
        if self._salts is not None:
            alike &= self._salts[one] == self._salts[other]
        return alike


class Groups:
    """Disjoint sets of 0 .. n-1; the smallest member names its set."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size, dtype=np.int32)

    def find(self, items: Int32s) -> Int32s:
        """The smallest member of the set of each item."""
        found = self._parent[items]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                self._parent[items] = found
                return found
            found = above

    def union(self, one: Int32s, other: Int32s) -> None:
        """Make one set of the two of each pair."""
        while len(one):
            one, other = self.find(one), self.find(other)
            apart = one != other
            one, other = one[apart], other[apart]
            np.minimum.at(self._parent, np.maximum(one, other), np.minimum(one, other))

    def reset(self, items: Int32s) -> None:
        """Each of these is alone again; who was with them and is not among them means nothing."""
        self._parent[items] = items
