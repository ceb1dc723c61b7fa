"""The calls of the train split as codes: what votes are counted over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl

from diffagent.errors import ArtifactError
from diffagent.failures import reading
from diffagent.store import describe_directory
from diffagent.t2i.catalogue import Catalogue

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

#: What is chosen for a model, each as one piece of JSON: width and height belong together.
FIELDS = (
    "sampler",
    "steps",
    "cfg_scale",
    "size",
    "clip_skip",
    "loras",
    "embeddings",
    "negative_prompt",
)
COLUMNS = ("prompt", "model", "version", "base_model", "weight", *FIELDS)


def read_rows(dabench: Path) -> pl.DataFrame:
    """Prompts, APIs, groups and splits ('split', 'random_split') of a dataset, by id.

    Raises:
        ArtifactError: there are none.
    """
    columns, tables = ["id", "prompt", "api", "group", "random_split"], []
    for path in sorted(dabench.glob("data/*.parquet")):
        with reading(path):
            table = pl.read_parquet(path, columns=columns)
        tables.append(table.with_columns(split=pl.lit(path.name.split("-")[0])))
    if not tables:
        raise ArtifactError(f"no DABench in {str(dabench)!r}: {describe_directory(dabench)}")
    return pl.concat(tables).sort("id")


@dataclass(frozen=True)
class Calls:
    """Training prompts with their calls, one a row. Codes number the values of a column.

    Attributes:
        table: ``COLUMNS``.
        models: names of all models that may be chosen, called or not, in order.
    """

    table: pl.DataFrame
    models: tuple[str, ...]

    @classmethod
    def of(cls, rows: pl.DataFrame, catalogue: Catalogue) -> Calls:
        """From rows of `read_rows`, with the models of the catalogue.

        A vote weighs 1/sqrt(pictures of its group), scaled to a mean of 1: a series of a hundred
        nearly equal prompts is one person's taste, not a hundred people's.
        """
        sizes = rows.select(pl.len().over("group")).to_series().to_numpy().astype(np.float64)
        weight = sizes**-0.5
        found = [_columns(orjson.loads(api)) for api in rows["api"]]
        table = pl.DataFrame(found, schema=dict.fromkeys(found[0], pl.String) if found else None)
        extra = {"prompt": rows["prompt"], "weight": weight / weight.mean()}
        return cls(table.with_columns(**extra).select(COLUMNS), model_names(catalogue))

    @cached_property
    def weight(self) -> Floats:
        """(rows,) of each vote."""
        return self.table["weight"].to_numpy().astype(np.float32)

    @cached_property
    def model(self) -> Ints:
        """(rows,) numbers of ``models``."""
        places = {name: place for place, name in enumerate(self.models)}
        return np.array([places[name] for name in self.table["model"]], np.int64)

    @cached_property
    def version(self) -> tuple[Ints, list[tuple[str, str]]]:
        """(rows,) codes, and the (model, version) of each."""
        return self._code(["model", "version"])

    @cached_property
    def base_model(self) -> tuple[Ints, list[tuple[str, ...]]]:
        """(rows,) codes, and what they stand for."""
        return self._code(["base_model"])

    @cached_property
    def fields(self) -> dict[str, tuple[Ints, list[Any]]]:
        """Of each of ``FIELDS``: (rows,) codes, and the value of each."""
        coded = {name: self._code([name]) for name in FIELDS}
        return {
            name: (codes, [orjson.loads(value) for (value,) in values])
            for name, (codes, values) in coded.items()
        }

    @cached_property
    def prior(self) -> Floats:
        """(models,) shares of the calls; half a call more for each, so that none is impossible."""
        counts = np.bincount(self.model, minlength=len(self.models)) + 0.5
        shares: Floats = (counts / counts.sum()).astype(np.float32)
        return shares

    @cached_property
    def called(self) -> npt.NDArray[np.bool_]:
        """(models,) whether there is any call of a model."""
        return np.bincount(self.model, minlength=len(self.models)) > 0

    @cached_property
    def one_hot(self) -> Any:
        """(rows, models) sparse: which model a row votes for, with which weight."""
        from scipy import sparse

        rows = np.arange(len(self.model) + 1)
        shape = (len(self.model), len(self.models))
        return sparse.csr_array((self.weight, self.model, rows), shape=shape)

    def _code(self, names: list[str]) -> tuple[Ints, Any]:
        values = self.table.select(names).unique().sort(names)
        order = values.with_row_index("code")
        codes = self.table.select(names).join(order, on=names, how="left", maintain_order="left")
        return codes["code"].to_numpy().astype(np.int64), values.rows()

    def save(self, path: Path) -> None:
        """Write the table as parquet."""
        self.table.write_parquet(path)

    @classmethod
    def load(cls, path: Path, catalogue: Catalogue) -> Calls:
        """Read what `save` wrote."""
        with reading(path):
            return cls(pl.read_parquet(path), model_names(catalogue))


def model_names(catalogue: Catalogue) -> tuple[str, ...]:
    """The models of which a checkpoint can be called, in order."""
    return tuple(sorted({entry.model for entry in catalogue.checkpoints}))


def _columns(api: dict[str, Any]) -> dict[str, str]:
    params = api["params"]
    values = {
        **{name: params[name] for name in ("sampler", "steps", "cfg_scale")},
        "size": [params["width"], params["height"]],
        "clip_skip": params["clip_skip"],
        "loras": sorted(api["loras"], key=lambda item: (item["model"], item["version"])),
        "embeddings": api.get("embeddings", []),
        "negative_prompt": api["negative_prompt"],
    }
    coded = {name: orjson.dumps(value).decode() for name, value in values.items()}
    return {**{name: api[name] for name in ("model", "version", "base_model")}, **coded}
