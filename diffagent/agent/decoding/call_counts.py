"""How checkpoints were called in training: what an agent needs beside its weights to decode fast.

One row a distinct answer of the train split with its count, in the agent's directory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.errors import ArtifactError
from diffagent.t2i.catalogue import Entry

CALLS_FILE = "calls.parquet"
_SCHEMA = pa.schema(
    [pa.field("text", pa.string(), nullable=False), pa.field("count", pa.int64(), nullable=False)]
)

COMMON = 256
"""Negative prompts of a base model that any of its versions may be called with."""


class Calls:
    """Answers of the train split, counted."""

    def __init__(self, counts: dict[str, int]) -> None:
        self._counts = counts
        self._usual: dict[tuple[str, str], str] = {}
        version: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        base_model: dict[str, Counter[str]] = defaultdict(Counter)
        for text, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            call = orjson.loads(text)
            name = call["model"], call["version"]
            self._usual.setdefault(name, text)
            version[name][call["negative_prompt"]] += count
            base_model[call["base_model"]][call["negative_prompt"]] += count
        self._version, self._base_model = dict(version), dict(base_model)

    @classmethod
    def count(cls, texts: Iterable[str]) -> Self:
        """Of answers, as they are trained on."""
        return cls(dict(Counter(texts)))

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """Those of an agent's directory; None when it was made without them.

        Raises:
            ArtifactError: the file cannot be read.
        """
        path = directory / CALLS_FILE
        if not path.exists():
            return None
        try:
            table = pq.ParquetFile(path).read()
            if not table.schema.equals(_SCHEMA):
                raise ValueError(f"columns {table.schema.names}")
            return cls(dict(zip(*table.to_pydict().values(), strict=True)))
        except (OSError, ValueError, KeyError) as error:  # ArrowInvalid and JSON's are ValueErrors
            raise ArtifactError(f"cannot read {str(path)!r}: {error}; train again") from None

    def write(self, directory: Path) -> None:
        """Into an agent's directory, sorted by text."""
        texts = sorted(self._counts)
        counts = [self._counts[text] for text in texts]
        pq.write_table(
            pa.table([texts, counts], schema=_SCHEMA), directory / CALLS_FILE, compression="zstd"
        )

    def usual(self, entry: Entry) -> str | None:
        """The answer that names a version most often; None for one that is never named."""
        return self._usual.get((entry.model, entry.version))

    def of_version(self, entry: Entry) -> list[str]:
        """Negative prompts that a version was called with."""
        return sorted(self._version.get((entry.model, entry.version), ()))

    def of_base_model(self, base_model: str) -> list[str]:
        """No negative prompt, and the `COMMON` most frequent ones of a base model."""
        counts = self._base_model.get(base_model, Counter())
        ranked = sorted(counts, key=lambda text: (-counts[text], text))
        return sorted({"", *ranked[:COMMON]})
