"""Fixed reference of z-scores: mean and deviation of each reward over a set of pictures.

    python -m diffagent.rewards.reference OUT.json SCORES [SCORES ...] --note "1,000 pictures"

SCORES are artifacts (directories) of the stage ``score`` with the scorers that the reference is
for. Score with ``unify: chatgen``, which needs no reference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffagent.errors import ScoreError
from diffagent.rewards.scores import read_definition, read_scores
from diffagent.store import Artifact, open_artifact


def measure_reference(artifacts: Sequence[Artifact], note: str) -> dict[str, Any]:
    """Measures the reference that `diffagent.rewards.unified.read_reference` reads.

    Args:
        artifacts: of the stage ``score``; a picture counts once per row.
        note: description of the pictures, for people.

    Raises:
        ScoreError: the scores are of different scorers, or a metric does not vary.
    """
    rows = read_scores(artifacts).filter(status="ok")
    definition = read_definition(artifacts[0].file("scores.parquet"))
    metrics = {}
    for name, scorer in definition["scorers"].items():
        std = rows[name].std(ddof=0)
        if not isinstance(std, float) or not std > 0:
            raise ScoreError(
                f"{name} does not vary over {rows.height} scored pictures; give more of them"
            )
        metrics[name] = {"mean": rows[name].mean(), "std": std, **scorer}
    return {
        "note": note,
        "pictures": rows.height,
        "artifacts": [artifact.content_digest for artifact in artifacts],
        "metrics": metrics,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m diffagent.rewards.reference"
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("scores", nargs="+", type=Path)
    parser.add_argument("--note", required=True, help="Description of the pictures.")
    options = parser.parse_args(arguments)
    artifacts = [open_artifact(path) for path in options.scores]
    reference = measure_reference(artifacts, options.note)
    options.out.write_text(json.dumps(reference, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
