"""Candidates of a stage as one sorted table (``diffagent.schemas.tables.CandidateRow``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffagent.agent.prompts import Pair
from diffagent.agent.verify import Verdict
from diffagent.schemas.tables import CANDIDATE_TABLE, CandidateRow

FILE = "candidates.parquet"


@dataclass(frozen=True)
class Answer:
    """One answer to the prompt of ``pair``, number ``candidate`` of its source."""

    pair: Pair
    source: str
    candidate: int
    text: str
    verdict: Verdict

    def row(self, logprob: float | None) -> CandidateRow:
        """Returns the row of the table; ``logprob`` is length-normalised."""
        return CandidateRow(
            prompt_id=self.pair.id,
            prompt=self.pair.prompt,
            candidate=self.candidate,
            source=self.source,
            text=self.text,
            api=self.verdict.api.to_json() if self.verdict.api else None,
            status=self.verdict.status,
            reason=self.verdict.reason,
            logprob=logprob,
        )


def write_candidates(rows: Sequence[CandidateRow], out: Path) -> dict[str, int]:
    """Writes candidates.parquet, sorted by prompt, source and number.

    Returns:
        Numbers of valid answers and of hallucinations of each kind.
    """
    ordered = sorted(rows, key=lambda row: (row.prompt_id, row.source, row.candidate))
    CANDIDATE_TABLE.write(out / FILE, ordered)
    return dict(sorted(Counter(row.reason or row.status for row in rows).items()))
