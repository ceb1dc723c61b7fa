"""Records by the batch: what a worker process makes of lines, and what becomes of it in order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffagent.dabench.build.splits import shingle_sets
from diffagent.dabench.filter.funnel import FunnelCounter
from diffagent.dabench.filter.records import DUPLICATE, Dropped, Fingerprint, PairBuilder
from diffagent.dabench.filter.snapshot_rows import parse_items
from diffagent.dabench.parquet_tables import TableWriter
from diffagent.schemas.tables import PRINTS, RECORD_TABLE

_LINES = 2000  # a batch: some megabytes, a tenth of a second


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive lines of a snapshot, and the one before them."""

    lines: list[bytes]
    before: bytes | None


@dataclass(frozen=True, slots=True)
class Sifted:
    """What a batch gives. ``digests`` are those of ``rows``."""

    rows: pa.RecordBatch
    prints: pa.RecordBatch
    digests: list[int]
    dropped: Counter[tuple[str, str]]
    loras: Counter[str]


def batches(lines: Iterable[bytes]) -> Iterator[Batch]:
    """Cut lines into batches."""
    source, before = iter(lines), None
    while chunk := list(itertools.islice(source, _LINES)):
        yield Batch(chunk, before)
        before = chunk[-1]


def sift(pairs: PairBuilder, batch: Batch) -> Sifted:
    """Build the pairs of a batch; duplicates are left to `Collector`, which sees all batches."""
    rows, prints, digests = [], [], []
    dropped: Counter[tuple[str, str]] = Counter()
    loras: Counter[str] = Counter()
    for item in parse_items(batch.lines, batch.before):
        built = pairs.build(item)
        if isinstance(built.row, Dropped):
            dropped[built.row.filter, built.row.reason] += 1
        else:
            rows.append(built.row)
            digests.append(built.digest)
            loras.update(built.loras)
        if built.fingerprint:
            prints.append(built.fingerprint)
    return Sifted(
        RECORD_TABLE.to_batch(rows),
        _prints(prints),
        digests,
        dropped,
        loras,
    )


def _prints(rows: list[Fingerprint]) -> pa.RecordBatch:
    places: dict[str, int] = {}  # pictures of a post share their prompt
    indices = [places.setdefault(row.prompt, len(places)) for row in rows]
    values, sizes = shingle_sets(list(places))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    shingles = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values), PRINTS.field("shingles").type
    )
    columns = [
        shingles.take(pa.array(indices, pa.int32()))
        if field.name == "shingles"
        else pa.array([getattr(row, field.name) for row in rows], field.type)
        for field in PRINTS
    ]
    return pa.RecordBatch.from_arrays(columns, schema=PRINTS)


class Collector:
    """Writes what batches give, in their order, each pair once."""

    def __init__(
        self, records: TableWriter, prints: TableWriter, funnel: FunnelCounter, *, unique: bool
    ) -> None:
        self._records, self._prints, self._funnel = records, prints, funnel
        self._unique = unique
        self._seen: set[int] = set()
        self.loras: Counter[str] = Counter()

    def add(self, sifted: Sifted) -> None:
        """Take in the next batch."""
        for (name, reason), count in sifted.dropped.items():
            self._funnel.drop(name, reason, count)
        self.loras.update(sifted.loras)
        new = [self._is_new(digest) for digest in sifted.digests]
        rows = sifted.rows.filter(pa.array(new, pa.bool_()))
        self._funnel.keep(rows.num_rows)
        if rows.num_rows < len(new):
            self._funnel.drop(DUPLICATE, "same prompt and API", len(new) - rows.num_rows)
        self._records.extend(rows)
        kept = pc.is_in(sifted.prints["id"], value_set=rows["id"])
        place = PRINTS.get_field_index("kept")
        self._prints.extend(sifted.prints.set_column(place, PRINTS.field(place), kept))

    def _is_new(self, digest: int) -> bool:
        if self._unique and digest in self._seen:
            return False
        self._seen.add(digest)
        return True
