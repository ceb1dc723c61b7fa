"""Human ratings of pictures, in the form of GenAI-Bench."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffagent.errors import SchemaError
from diffagent.store import canonical_json


@dataclass(frozen=True)
class RatedPrompt:
    """A prompt, and for each model the ratings of its picture, higher is better."""

    prompt: str
    ratings: dict[str, tuple[float, ...]]


def read_ratings(path: str | Path) -> list[RatedPrompt]:
    """Rated prompts of a file in GenAI-Bench's form (arXiv 2406.13743), by their ids.

    The form: ``{id: {"prompt": text, "models": {name: [rating, ...]}}}``.

    Raises:
        SchemaError: the file is missing or has another form.
    """
    try:
        rows = json.loads(Path(path).read_bytes())
        prompts = [
            RatedPrompt(
                str(row["prompt"]),
                {str(name): tuple(map(float, given)) for name, given in row["models"].items()},
            )
            for _, row in sorted(rows.items())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SchemaError(
            f"{str(path)!r} holds no ratings ({type(error).__name__}: {error}); expected is "
            '{"1": {"prompt": "a fox", "models": {"SDXL": [4, 5, 4]}}}',
            field="ratings",
        ) from error
    if not prompts or not all(p.ratings and all(p.ratings.values()) for p in prompts):
        raise SchemaError(
            f"{str(path)!r}: there must be prompts, and a rating of each model", field="ratings"
        )
    return prompts


def response(model: str) -> str:
    """What an agent writes to choose ``model``: rated models have no version and no parameters."""
    return canonical_json({"model": model}).decode()
