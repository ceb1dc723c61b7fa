"""Train, validation and test without leaks: prompts that are alike never straddle a split.

With a random split a nearest neighbour answers held-out prompts by having seen nearly the same
ones: people post series, and copy each other. So three things tie pictures together:

* near-duplicates: the Jaccard similarity of the sets of word pairs of their prompts is at least
  ``near_duplicate_jaccard``; all such pairs count, not a sample
  (`diffagent.dabench.build.neighbours`);
* the pictures of one post;
* an author's series: the same creator, and a similarity of at least ``series_jaccard``.

Splits are decided from the prints of *all* records whose checkpoint is known, whether the filters
keep them or not. A dataset carries what was decided (`Decisions`), and the next one begins with it
(`diffagent.dabench.build.history` finds it): a decided record keeps its split, or is left out
where it
would leak, whatever resolves later, changes, goes, comes back or is filtered in another way. What
is new is decided generation by generation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from diffagent.dabench.build.neighbours import (
    Flags,
    Groups,
    Int32s,
    Ints,
    Join,
    SetStore,
    Words,
    mix,
    ranges,
)
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.parquet_tables import read_batches
from diffagent.errors import ArtifactError
from diffagent.schemas.tables import PRINTS

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
#: Stands for the split of a record that is left out.
NO_SPLIT = -1

Codes = npt.NDArray[np.int8]

_WEIGHT = re.compile(r":\s*[\d.]+")  # of "(word:1.2)"
_WORD = re.compile(r"\w+")
_PAIR = np.uint64(0x9E3779B97F4A7C15)
_NONE = np.iinfo(np.int32).max
#: A base model gets cut points of its own from the first generation with so many new groups.
ENOUGH_GROUPS = 50
#: A group with more than this part of the held-out rows wanted of its base model is for training.
GIANT = 0.1


def words(prompt: str) -> list[str]:
    """The words of a prompt without case, punctuation and attention weights."""
    return _WORD.findall(_WEIGHT.sub(" ", prompt.lower()))


@lru_cache(maxsize=1 << 17)
def text_hash(text: str) -> int:
    """64 bits of a text, the same everywhere."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def shingles(prompt: str) -> Ints:
    """The set of adjacent word pairs of a prompt as 63-bit hashes (int64 >= 0), ascending.

    A prompt of one word has that word; one without words is empty. Two different pairs have the
    same hash with a chance of 2^-63.
    """
    return shingle_sets([prompt])[0]


def shingle_sets(prompts: Sequence[str]) -> tuple[Ints, Ints]:
    """The `shingles` of many prompts one after the other, and how many each has."""
    found = [words(prompt) for prompt in prompts]
    sizes = np.array([len(part) for part in found], dtype=np.int64)
    hashes = np.fromiter(map(text_hash, chain.from_iterable(found)), np.uint64, sizes.sum())
    owners = np.repeat(np.arange(len(found)), sizes)
    inside = owners[1:] == owners[:-1]
    alone = np.flatnonzero((sizes == 1)[owners])
    values = np.concatenate([(hashes[:-1] * _PAIR + hashes[1:])[inside], hashes[alone]])
    values >>= np.uint64(1)
    owners = np.concatenate([owners[:-1][inside], owners[alone]])
    order = np.lexsort((values, owners))
    values, owners = values[order], owners[order]
    new = np.ones(len(values), bool)
    new[1:] = (values[1:] != values[:-1]) | (owners[1:] != owners[:-1])
    return values[new].view(np.int64), np.bincount(owners[new], minlength=len(found))


def salt(*parts: object) -> np.uint64:
    """64 bits that tell one use of `mix` from another."""
    return np.uint64(text_hash(":".join(map(str, parts))))


def random_splits(ids: Ints, config: DABenchConfig) -> Codes:
    """The split that a hash of its own id gives each record: what leaks, for comparison."""
    values = mix(ids.view(np.uint64) ^ salt(config.seed, "random"))
    return _cut(values, *_nominal(config))


def _nominal(config: DABenchConfig) -> tuple[float, float]:
    return config.test_fraction, config.test_fraction + config.validation_fraction


def _cut(values: Words, test: float, validation: float) -> Codes:
    """Splits of 64-bit hashes: below ``test``, below ``validation`` (of 1), and the rest."""
    places = values / 2.0**64
    return np.where(places < test, TEST, np.where(places < validation, VALIDATION, TRAIN)).astype(
        np.int8
    )


@dataclass(frozen=True)
class Decisions:
    """The split of every record that was ever decided; arrays with an element a record, by id.

    ``group`` names its group and ``age`` is the rank of the group, oldest first. ``mark`` is a hash
    of what ties it to others; ``present``: it was among the prints from which the last version was
    made, with that mark and this split. ``cuts``: base model -> the frozen cut points of `_Cuts`.
    """

    ids: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    split: Codes = field(default_factory=lambda: np.zeros(0, np.int8))
    group: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    age: Int32s = field(default_factory=lambda: np.zeros(0, np.int32))
    mark: Words = field(default_factory=lambda: np.zeros(0, np.uint64))
    present: Flags = field(default_factory=lambda: np.zeros(0, bool))
    cuts: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def find(self, ids: Ints) -> tuple[Ints, Flags]:
        """The place of each id (0 where it is not here), and whether it is here."""
        if not len(self.ids):
            return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
        places = np.searchsorted(self.ids, ids)
        places[places == len(self.ids)] = 0
        here: Flags = self.ids[places] == ids
        return np.where(here, places, 0), here

    def groups(self) -> tuple[Ints, Codes, Int32s]:
        """Names and splits of all groups, oldest first; and the number of each record's group."""
        names, first, places = np.unique(self.group, return_index=True, return_inverse=True)
        ages = np.full(len(names), _NONE, np.int32)
        np.minimum.at(ages, places, self.age)
        order = np.lexsort((names, ages))
        numbers = np.empty(len(names), np.int32)
        numbers[order] = np.arange(len(names), dtype=np.int32)
        return names[order], self.split[first][order], numbers[places]

    def followed_by(self, later: Decisions) -> Decisions:
        """The decisions of ``later``, and those of here that it lacks, which are not present."""
        _, again = later.find(self.ids)
        here = ~again
        columns = {
            name: np.concatenate([getattr(self, name)[here], getattr(later, name)])
            for name in ("ids", "split", "group", "age", "mark", "present")
        }
        columns["present"][: here.sum()] = False
        order = np.argsort(columns["ids"], kind="stable")
        return Decisions(
            **{name: column[order] for name, column in columns.items()},
            cuts={**self.cuts, **later.cuts},
        )


@dataclass(frozen=True)
class Assignment:
    """Of each print its split (NO_SPLIT: left out), and the name and the rank of its group.

    ``known``: its split was decided before. ``cuts``: the cut points that are frozen by now.
    """

    split: Codes
    group: Ints
    age: Int32s
    known: Flags
    cuts: Mapping[str, tuple[float, float]]


class Prints:
    """The prints of a filter artefact, ready to be split; its arrays have an element a row.

    Nodes are what ties rows together: the distinct sets of word pairs, then the posts (a row
    without one has one of its own), then the pairs of creator and set, which make series.

    Args:
        path: parquet file of `diffagent.schemas.tables.PRINTS`.
        config: thresholds, fractions and seed.
        scratch: an empty directory for temporary files (0.3 kB a row), for the caller to delete.

    Raises:
        ArtifactError: the file is damaged.
    """

    def __init__(self, path: Path, config: DABenchConfig, scratch: Path) -> None:
        self._path, self._config = path, config
        self.base_models: list[str] = []
        keys, posts, creators = self._read_rows()
        #: A hash of what ties a row to others.
        self.marks: Words = mix(keys + mix(posts + mix(creators)))
        scratch.mkdir(parents=True, exist_ok=True)
        self._store = SetStore(scratch / "sets.bin")
        sets, first = _numbered(keys, keys != 0)
        del keys
        self._fill(first)
        post, own = _numbered(posts, np.ones(len(posts), bool))
        self._columns = [post + np.int32(len(first)), sets]
        self._nodes = len(first) + len(own)
        self._joins = [(0, Join(self._store, config.near_duplicate_jaccard, scratch / "alike"))]
        if config.series_jaccard < config.near_duplicate_jaccard:
            both = (sets >= 0) & (creators != 0)
            series, first = _numbered(mix(creators + mix(sets.astype(np.uint64))), both)
            join = Join(
                self._store,
                config.series_jaccard,
                scratch / "series",
                nodes=sets[first],
                salts=creators[first],
            )
            self._joins.append((self._nodes, join))
            self._columns.append(np.where(both, series + np.int32(self._nodes), np.int32(-1)))
            self._nodes += len(first)

    def _read_rows(self) -> tuple[Words, Words, Words]:
        """Read all but the sets; returns a hash of the set (0: empty), the post, the creator."""
        rows = sum(len(batch) for batch in self._batches(["id"]))
        self.ids: Ints = np.zeros(rows, np.int64)
        self.generations: Int32s = np.zeros(rows, np.int32)
        self.kept: Flags = np.zeros(rows, bool)
        self.bases = np.zeros(rows, np.int16)
        keys, posts, creators = (np.zeros(rows, np.uint64) for _ in range(3))
        begin = 0
        for batch in self._batches(PRINTS.names):
            part = slice(begin, begin + len(batch))
            begin += len(batch)
            self.ids[part] = batch["id"]
            self.generations[part] = batch["generation"]
            self.kept[part] = batch["kept"].to_numpy(zero_copy_only=False)
            self.bases[part] = self._base_codes(batch["base_model"])
            tokens, sizes = _lists(batch["shingles"])
            some = sizes > 0
            hashes = mix(mix(tokens.view(np.uint64)) + salt("set"))
            starts = (np.cumsum(sizes) - sizes)[some]
            keys[part][some] = np.add.reduceat(hashes, starts) | np.uint64(1) if some.any() else 0
            creators[part] = _hashes(batch["creator"])
            # An id of its own for each row without a post: no hash of an id equals another's.
            post = batch["post_id"]
            alone = post.is_null().to_numpy(zero_copy_only=False)
            known = post.fill_null(0).to_numpy().view(np.uint64)
            posts[part] = mix(np.where(alone, self.ids[part].view(np.uint64), known))
            posts[part] ^= np.where(alone, salt("alone"), np.uint64(0))
        return keys, posts, creators

    def _base_codes(self, names: pa.Array) -> npt.NDArray[np.int16]:
        encoded = names.dictionary_encode()
        for name in encoded.dictionary.to_pylist():
            if name not in self.base_models:
                self.base_models.append(name)
        codes = [self.base_models.index(name) for name in encoded.dictionary.to_pylist()]
        found: npt.NDArray[np.int16] = np.array(codes, np.int16)[encoded.indices.to_numpy()]
        return found

    def _fill(self, first: Ints) -> None:
        """Store the sets of these rows (ascending)."""
        begin = 0
        for batch in self._batches(["shingles"]):
            low, high = np.searchsorted(first, [begin, begin + len(batch)])
            tokens, sizes = _lists(batch["shingles"])
            rows = first[low:high] - begin
            begin += len(batch)
            chosen = ranges((np.cumsum(sizes) - sizes)[rows], sizes[rows])
            self._store.append(tokens[chosen], sizes[rows])
        self._store.finish()

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        try:
            yield from read_batches(self._path, columns)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"cannot read {str(self._path)!r}: {error}; delete {str(self._path.parent)!r} and "
                "run the stage 'filter' again"
            ) from None

    def close(self) -> None:
        """Close the temporary files."""
        self._store.close()

    def splits(self, before: Decisions | None = None) -> Assignment:
        """Split all prints: those that were decided before first, then generation by generation.

        The new rows of a generation are grouped among themselves, transitively. A group that
        touches older rows takes the split of the oldest group (lowest rank) that it touches, and
        joins it; but those of its rows that are themselves near-duplicates, of one post or of one
        series with an older row of *another* split are left out: whichever split they were in,
        they would straddle two. A group that touches none is a new one, named by its smallest id,
        and its split is a hash of that id (`_Cuts`).
        """
        before = before or Decisions()
        links = _Links(self._nodes)
        cuts = _Cuts(self._config, self.base_models, before.cuts)
        anchors, splits, numbers = before.groups()  # of each group, by age
        known, split, age = self._decided(before, numbers)
        self._keep(links, before, split, age)
        for generation in np.unique(self.generations[~known]):
            rows = np.flatnonzero(~known & (self.generations == generation)).astype(np.int32)
            if (np.diff(self.ids[rows]) < 0).any():
                rows = rows[np.argsort(self.ids[rows], kind="stable")]
            columns = self._columns_of(rows)
            heads, places, oldest, touched = self._link(links, columns)
            new = np.flatnonzero(oldest == _NONE)
            oldest[new] = len(anchors) + np.arange(len(new), dtype=np.int32)
            first = self.ids[rows[heads[new]]]
            # An old group may have been named by a row that is new in this history.
            anchors = np.concatenate([anchors, np.where(np.isin(first, anchors), ~first, first)])
            number = np.full(len(heads), -1, np.int32)
            number[new] = np.arange(len(new), dtype=np.int32)
            fresh = number[places]
            bases = self.bases[rows]
            decided = cuts.decide(first, fresh[fresh >= 0], bases[fresh >= 0])
            splits = np.concatenate([splits, decided])
            age[rows] = oldest[places]
            split[rows] = _unless_apart(splits[age[rows]], touched)
            links.settle(columns, age[rows], split[rows])
        group = anchors[age] if len(anchors) else self.ids
        return Assignment(split, group, age, known, cuts.frozen)

    def _decided(self, before: Decisions, numbers: Int32s) -> tuple[Flags, Codes, Int32s]:
        """Which rows were decided before; of these (else NO_SPLIT, 0) the split and the group."""
        split = np.full(len(self.ids), NO_SPLIT, np.int8)
        age = np.zeros(len(self.ids), np.int32)
        places, known = before.find(self.ids)
        split[known], age[known] = before.split[places[known]], numbers[places[known]]
        return known, split, age

    def _keep(self, links: _Links, before: Decisions, split: Codes, age: Int32s) -> None:
        """Settle the rows that were decided before; ``split`` of one that would leak is cleared.

        Rows that were present in the version before, as they are now, cannot leak: they were
        compared with each other then. The others (their prompt, post or author changed, they were
        away, another branch of the history decided them) are compared with those that are in.
        Of two of them that are tied, the one of train stays: a held-out one can be spared.
        """
        places, same = before.find(self.ids)
        same[same] = before.present[places[same]]
        same[same] = before.mark[places[same]] == self.marks[same]
        rounds = [~same & (split == code) for code in range(len(SPLITS))]
        rows = np.flatnonzero(same).astype(np.int32)
        links.settle([column[rows] for column in self._columns], age[rows], split[rows])
        for chosen in rounds:
            rows = np.flatnonzero(chosen).astype(np.int32)
            if len(rows):
                columns = self._columns_of(rows)
                *_, touched = self._link(links, columns)
                split[rows] = _unless_apart(split[rows], touched)
                links.settle(columns, age[rows], split[rows])

    def _columns_of(self, rows: Int32s) -> list[Int32s]:
        """The nodes of these rows (not copied when they are all of them, in order)."""
        whole = len(rows) == len(self.ids) and rows[0] == 0 and (np.diff(rows) == 1).all()
        return self._columns if whole else [column[rows] for column in self._columns]

    def _link(
        self, links: _Links, columns: list[Int32s]
    ) -> tuple[Int32s, Int32s, Int32s, npt.NDArray[np.uint8]]:
        """Group rows among themselves and with older ones.

        Returns:
            The first row of each group, the group of each row, the oldest group that each group
            touches (_NONE: none), and the splits of the older rows that each row touches, as bits.
        """
        links.begin(columns)
        self._ask(links)
        heads, places = links.components(columns[0])
        return heads, places, *links.answer(columns, places, len(heads))

    def exposed(self, splits: Codes) -> Flags:
        """Which rows of test have a near-duplicate, a post- or a series-mate in train.

        Args:
            splits: of each row, NO_SPLIT: it is nowhere.
        """
        question = _Exposure(self._nodes)
        for column in self._columns:
            question.train[_nodes(column[splits == TRAIN])] = True
            question.test[_nodes(column[splits == TEST])] = True
        question.hit |= question.train
        self._ask(question)
        found = np.zeros(len(splits), bool)
        for column in self._columns:
            found |= (column >= 0) & question.hit[column]
        found &= splits == TEST
        return found

    def _ask(self, question: _Links | _Exposure) -> None:
        for question.offset, join in self._joins:
            join.ask(question)


def _unless_apart(split: Codes, touched: npt.NDArray[np.uint8]) -> Codes:
    """The split of each row; NO_SPLIT where it touches an older row of another one."""
    apart = (touched & ~(1 << split)) != 0
    return np.where(apart, np.int8(NO_SPLIT), split)


def _nodes(column: Int32s) -> Int32s:
    return column[column >= 0]


class _Links:
    """A generation's links among its rows, and to the groups of older rows (a `Question`).

    Of each node: whether it has ``new`` rows; of its older rows the oldest ``group`` and their
    ``split`` (they have one); of the older rows that its new ones are linked with, the ``oldest``
    group and the splits they are in (``touched``, a bit each).
    """

    def __init__(self, nodes: int) -> None:
        self.offset = 0
        self.groups = Groups(nodes)
        self.new = np.zeros(nodes, bool)
        self.group = np.full(nodes, _NONE, np.int32)
        self.split = np.full(nodes, NO_SPLIT, np.int8)
        self.oldest = np.full(nodes, _NONE, np.int32)
        self.touched = np.zeros(nodes, np.uint8)

    def begin(self, columns: list[Int32s]) -> None:
        """Start a generation: a row ties its nodes together."""
        self.new[:] = False
        for column in columns:
            nodes = _nodes(column)
            self.new[nodes] = True
            self.groups.reset(nodes)
            self.oldest[nodes] = self.group[nodes]
            self.touched[nodes] = self._bits(nodes)
        for column in columns[1:]:
            tied = column >= 0
            self.groups.union(columns[0][tied], column[tied])

    def _bits(self, nodes: Int32s) -> npt.NDArray[np.uint8]:
        known = self.split[nodes]
        return np.where(known == NO_SPLIT, 0, 1 << np.maximum(known, 0)).astype(np.uint8)

    def active(self, nodes: Int32s) -> Flags:
        nodes = nodes + np.int32(self.offset)
        active: Flags = self.new[nodes] | (self.group[nodes] != _NONE)
        return active

    def asking(self, nodes: Int32s) -> Flags:
        asking: Flags = self.new[nodes + np.int32(self.offset)]
        return asking

    def classes(self, nodes: Int32s) -> Ints:
        nodes = nodes + np.int32(self.offset)
        new = self.new[nodes]
        own = self.groups.find(nodes).astype(np.int64) << 3 | self.touched[nodes]
        older = self.group[nodes].astype(np.int64) << 32 | self.oldest[nodes]
        return mix(
            np.where(new, own, -1).view(np.uint64)
            + mix(np.where(new, older, older | 0xFFFFFFFF).view(np.uint64))
        ).view(np.int64)

    def wanted(self, one: Int32s, other: Int32s) -> Flags:
        one, other = one + np.int32(self.offset), other + np.int32(self.offset)
        apart = self.new[one] & self.new[other]
        apart[apart] = self.groups.find(one[apart]) != self.groups.find(other[apart])
        return apart | self._tells(one, other) | self._tells(other, one)

    def _tells(self, one: Int32s, other: Int32s) -> Flags:
        """Whether the older rows of ``other`` would be news to the new ones of ``one``."""
        group = self.group[other]
        known = (self.touched[one] & self._bits(other) != 0) & (self.oldest[one] <= group)
        tells: Flags = self.new[one] & (group != _NONE) & ~known
        return tells

    def found(self, one: Int32s, other: Int32s) -> None:
        one, other = one + np.int32(self.offset), other + np.int32(self.offset)
        both = self.new[one] & self.new[other]
        self.groups.union(one[both], other[both])
        for a, b in ((one, other), (other, one)):
            np.minimum.at(self.oldest, a, self.group[b])
            np.bitwise_or.at(self.touched, a, self._bits(b))

    def components(self, column: Int32s) -> tuple[Int32s, Int32s]:
        """The first row of each group of new rows, ascending; and the group of each row.

        Args:
            column: a node of each row.
        """
        roots = self.groups.find(column)
        number = np.full(len(self.new), -1, np.int32)
        number[roots[::-1]] = np.arange(len(roots) - 1, -1, -1, dtype=np.int32)  # first one stays
        heads = np.sort(number[number >= 0])
        number[roots[heads]] = np.arange(len(heads), dtype=np.int32)
        return heads, number[roots]

    def answer(
        self, columns: list[Int32s], places: Int32s, groups: int
    ) -> tuple[Int32s, npt.NDArray[np.uint8]]:
        """The oldest group that each of the new ones touches; the splits that each row touches."""
        oldest = np.full(groups, _NONE, np.int32)
        touched = np.zeros(len(places), np.uint8)
        for column in columns:
            tied = column >= 0
            np.minimum.at(oldest, places[tied], self.oldest[column[tied]])
            touched[tied] |= self.touched[column[tied]]
        return oldest, touched

    def settle(self, columns: list[Int32s], group: Int32s, split: Codes) -> None:
        """To the next generations these rows are older ones, but those that are left out."""
        for column in columns:
            tied = (column >= 0) & (split != NO_SPLIT)
            np.minimum.at(self.group, column[tied], group[tied])
            self.split[column[tied]] = split[tied]


class _Exposure:
    """Which nodes with a row of test touch one of train (a `Question`)."""

    def __init__(self, nodes: int) -> None:
        self.offset = 0
        self.train, self.test, self.hit = (np.zeros(nodes, bool) for _ in range(3))

    def active(self, nodes: Int32s) -> Flags:
        nodes = nodes + np.int32(self.offset)
        return self.train[nodes] | self.test[nodes]

    asking = active

    def classes(self, nodes: Int32s) -> Ints:
        nodes = nodes + np.int32(self.offset)
        return (2 * self._open(nodes) + self.train[nodes]).astype(np.int64)

    def _open(self, nodes: Int32s) -> Flags:
        return self.test[nodes] & ~self.hit[nodes]

    def wanted(self, one: Int32s, other: Int32s) -> Flags:
        one, other = one + np.int32(self.offset), other + np.int32(self.offset)
        there = self._open(one) & self.train[other]
        return there | (self._open(other) & self.train[one])

    def found(self, one: Int32s, other: Int32s) -> None:
        one, other = one + np.int32(self.offset), other + np.int32(self.offset)
        self.hit[one[self.train[other]]] = True
        self.hit[other[self.train[one]]] = True


class _Cuts:
    """The split of new groups, stratified by base model and stable.

    A group's place is a hash, in [0, 1), of its smallest id, salted by its base model (the rarest
    one of its rows, as those have the fewest groups to balance with); it is for test below one cut
    point, for validation below another, else for training. Groups differ in size, so cut points at
    the nominal fractions give shares of rows that scatter. In the first generation in which a base
    model has ENOUGH_GROUPS new groups its cut points are therefore put where the shares of its
    *rows* are what is wanted; later generations use the same ones, and so do later versions of
    the dataset (``frozen``). Until a base model has them the fractions themselves are used. Giant
    groups would be most of a held-out split, with one prompt in endless variation: they are for
    training.
    """

    def __init__(
        self,
        config: DABenchConfig,
        base_models: list[str],
        frozen: Mapping[str, tuple[float, float]],
    ) -> None:
        self._names, self._nominal = base_models, _nominal(config)
        self._held_out = min(config.test_fraction, config.validation_fraction)
        self._salts = [salt(config.seed, "group", name) for name in base_models]
        self.frozen = dict(frozen)

    def decide(self, ids: Ints, groups: Int32s, bases: npt.NDArray[np.int16]) -> Codes:
        """The splits of the new groups of a generation.

        Args:
            ids: the smallest ones of the groups.
            groups, bases: of each row the number of its group and of its base model.
        """
        splits = np.full(len(ids), TRAIN, np.int8)
        counts = np.bincount(bases, minlength=len(self._names)).tolist()
        rarity = sorted(range(len(counts)), key=lambda code: (counts[code], self._names[code]))
        ranks = np.argsort(rarity).astype(np.int16)[bases]
        rarest = np.full(len(ids), len(counts), np.int16)
        np.minimum.at(rarest, groups, ranks)
        giant = self._giant(np.bincount(groups, minlength=len(ids)))
        for rank in np.unique(rarest).tolist():
            base, mine = rarity[rank], ranks == rank
            at = np.flatnonzero(rarest == rank)
            values = mix(ids[at].view(np.uint64) ^ self._salts[base])
            own = np.bincount(groups[mine], minlength=len(ids))[at]
            large = giant[at] | self._giant(own)
            name = self._names[base]
            if len(at) >= ENOUGH_GROUPS and name not in self.frozen:
                placed = mine & (rarest[groups] < rank)  # in groups of rarer base models
                known = np.bincount(splits[groups[placed]], minlength=len(SPLITS))
                known[TRAIN] += own[large].sum()
                self.frozen[name] = self._fit(values[~large], own[~large], known)
            decided = _cut(values, *self.frozen.get(name, self._nominal))
            splits[at] = np.where(large, np.int8(TRAIN), decided)
        return splits

    def _giant(self, rows: Ints) -> Flags:
        if len(rows) < ENOUGH_GROUPS:
            return np.zeros(len(rows), bool)
        giant: Flags = rows > max(GIANT * self._held_out * rows.sum(), 4 * rows.mean())
        return giant

    def _fit(self, values: Words, rows: Ints, known: Ints) -> tuple[float, float]:
        """Cut points with which the shares of all rows come nearest to the wanted ones.

        Args:
            values: hashes of the groups.
            rows: how many rows of their base model they have.
            known: how many rows of it are in each split already.
        """
        order = np.argsort(values)
        upto = np.concatenate([[0], np.cumsum(rows[order])])
        places = np.append(values[order] / 2.0**64, 1.0)
        # At most twice what is left is counted: giants are not made up for by all of the others.
        total = min(int(known.sum() + upto[-1]), 2 * int(upto[-1]))
        there = np.cumsum(known[[TEST, VALIDATION]])
        test, validation = (
            int(np.argmin(abs(upto + have - part * total)))
            for part, have in zip(self._nominal, there, strict=True)
        )
        return float(places[test]), float(places[max(test, validation)])


def _numbered(keys: Words, some: Flags) -> tuple[Int32s, Ints]:
    """Number distinct keys by first occurrence, -1 where not ``some``; and those first rows."""
    rows = np.flatnonzero(some)
    _, first, places = np.unique(keys[rows], return_index=True, return_inverse=True)
    order = np.argsort(first)
    numbers = np.empty(len(first), np.int32)
    numbers[order] = np.arange(len(first), dtype=np.int32)
    column = np.full(len(keys), -1, np.int32)
    column[rows] = numbers[places]
    return column, rows[first[order]]


def _lists(column: pa.ListArray) -> tuple[Ints, Int32s]:
    """Values and lengths of lists."""
    return column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())


def _hashes(texts: pa.StringArray) -> Words:
    """A hash of each text that is not 0; 0 for null."""
    encoded = texts.dictionary_encode()
    known = [text_hash(text) | 1 for text in encoded.dictionary.to_pylist()]
    codes = encoded.indices.fill_null(len(known)).to_numpy()
    found: Words = np.array([*known, 0], np.uint64)[codes]
    return found
