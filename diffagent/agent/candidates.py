"""Rows of ``diffagent.schemas.tables.CANDIDATES``: answers, judged, in one file with one order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.agent.prompts import Pair
from diffagent.agent.verify import Verdict
from diffagent.schemas.tables import CANDIDATES

FILE = "candidates.parquet"
Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One answer to the prompt of ``pair``, number ``candidate`` of its source."""

    pair: Pair
    source: str
    candidate: int
    text: str
    verdict: Verdict

    def row(self, logprob: float | None) -> Row:
        """The row of the table; ``logprob`` is length-normalised."""
        return {
            "prompt_id": self.pair.id,
            "prompt": self.pair.prompt,
            "candidate": self.candidate,
            "source": self.source,
            "text": self.text,
            "api": self.verdict.api.to_json() if self.verdict.api else None,
            "status": self.verdict.status,
            "reason": self.verdict.reason,
            "logprob": logprob,
        }


def write_candidates(rows: Sequence[Row], out: Path) -> dict[str, int]:
    """Write candidates.parquet, sorted by prompt, source and number.

    Returns:
        How many answers are valid, and how many hallucinations of each kind there are.
    """
    ordered = sorted(rows, key=lambda r: (r["prompt_id"], r["source"], r["candidate"]))
    pq.write_table(pa.Table.from_pylist(ordered, schema=CANDIDATES), out / FILE)
    return dict(sorted(Counter(row["reason"] or row["status"] for row in rows).items()))
