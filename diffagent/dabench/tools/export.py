"""DABench in other layouts: a Hugging Face dataset, or the authors' instruction-API JSON.

Both hold ``catalogue.parquet``, ``mapping/`` and a manifest that names the dataset they come
from, so that every command of ``diffagent dabench`` reads them.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from diffagent.dabench.build.card import LICENCE, LICENCE_FILE, USE, front_matter, front_text
from diffagent.dabench.dataset import DISTRIBUTIONS, Dataset, read_file
from diffagent.dabench.pairs import API_KEYS, PAIR_KEYS, api_mapping, to_pair
from diffagent.errors import ArtifactError, ConfigError
from diffagent.schemas.manifest import FileEntry, InputRef, Manifest
from diffagent.store import (
    MANIFEST,
    canonical_json,
    files_digest,
    peak_memory_bytes,
    sha256_file,
)
from diffagent.t2i.catalogue import Catalogue

log = logging.getLogger(__name__)

Layout = Literal["hf", "instruction-api"]
_VERSION = 1
#: Names of types that are not Arrow's.
_DTYPES = {"double": "float64", "float": "float32", "halffloat": "float16", "date32[day]": "date32"}


def export_dabench(
    dataset: Dataset, out: str | Path, layout: Layout, *, force: bool = False
) -> Manifest:
    """Write ``dataset`` to the directory ``out``; it is there whole or not at all.

    ``hf``: ``datasets.load_dataset(out)`` gives the three splits, with the name 'catalogue' the
    catalogue; the files of the splits are those of the dataset, byte for byte.
    ``instruction-api``: ``SPLIT.json`` (see `diffagent.dabench.pairs`), ``mapping/models.json``
    (names to files), ``mapping/apis.json`` (names to what the catalogue knows of the API) and
    ``mapping/samplers.json``.

    Args:
        dataset: what to export; it must have parquet files.
        out: a directory that does not exist or is empty.
        layout: which of the two.
        force: replace what is in ``out``.

    Returns:
        The manifest of the export.

    Raises:
        ConfigError: ``out`` is not empty, is a file, or overlaps the dataset.
        ArtifactError: a file of the dataset is damaged, or ``out`` cannot be written.
    """
    if not dataset.is_parquet:
        raise ArtifactError(
            f"{str(dataset.path)!r} holds pairs in JSON, which lack most columns: export the "
            "dataset that they were made from"
        )
    started = time.monotonic()
    writers: Mapping[str, Callable[[Dataset, Path], None]] = {
        "hf": _write_hf,
        "instruction-api": _write_instruction_api,
    }
    with _replacing(Path(out), dataset.path, force) as folder:
        writers[layout](dataset, folder)
        if dataset.distributions:
            data = orjson.dumps(dataset.distributions, option=orjson.OPT_INDENT_2)
            (folder / DISTRIBUTIONS).write_bytes(data)
        manifest = _manifest(dataset, folder, layout, started)
        (folder / MANIFEST).write_bytes(manifest.model_dump_json(indent=1).encode())
    return manifest


@contextmanager
def _replacing(out: Path, source: Path, force: bool) -> Iterator[Path]:
    """A new directory beside ``out`` that takes its place when the block ends well."""
    inside, origin = out.resolve(), source.resolve()
    if inside == origin or inside in origin.parents or origin in inside.parents:
        raise ConfigError(f"cannot export {str(source)!r} to {str(out)!r}: one holds the other")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{str(out)!r} is a file: name a directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ConfigError(f"{str(out)!r} is not empty: name another directory, or give --force")
    partial = inside.with_name(f".{inside.name}.{os.getpid()}.partial")
    old = inside.with_name(f".{inside.name}.{os.getpid()}.old")
    try:
        partial.mkdir(parents=True)
        yield partial
        if inside.is_dir():
            inside.rename(old)
        partial.rename(inside)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not inside.exists():
            old.rename(inside)
        if isinstance(error, OSError):
            raise ArtifactError(f"cannot write {str(out)!r}: {error}; nothing was left") from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def _copy(dataset: Dataset, name: str, folder: Path) -> None:
    """Copy a file as it is, and see that it is what the dataset's manifest says."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(dataset.path / name, target)
    except FileNotFoundError:
        raise ArtifactError(
            f"{str(dataset.path / name)!r} is missing; see 'diffagent dabench verify'"
        ) from None
    _check_digest(dataset, name, target)


def _check_digest(dataset: Dataset, name: str, path: Path) -> None:
    """``path`` has the bytes that the dataset's manifest, if there is one, gives for ``name``."""
    files = dataset.manifest.files if dataset.manifest else ()
    wanted = {file.path: file.sha256 for file in files}
    if name in wanted and sha256_file(path) != wanted[name]:
        raise ArtifactError(
            f"{str(dataset.path / name)!r} is damaged (SHA256 differs); build the dataset again"
        )


def _write_hf(dataset: Dataset, folder: Path) -> None:
    """The dataset as it is, and a card that tells ``datasets`` where and what its columns are."""
    sizes: dict[str, dict[str, int]] = {}
    for split, paths in dataset.shards.items():
        for path in paths:
            _copy(dataset, path.relative_to(dataset.path).as_posix(), folder)
        found = [folder / path.relative_to(dataset.path) for path in paths]
        sizes[split] = {
            "num_examples": dataset.rows[split],
            "num_bytes": sum(b.data.nbytes for path in found for b in read_file(split, path)),
            "download_size": sum(path.stat().st_size for path in found),
        }
    _copy_catalogue(dataset, folder)
    for plot in sorted(dataset.path.glob("plots/*.png")):
        _copy(dataset, f"plots/{plot.name}", folder)
    front, body = _card(dataset.path / "README.md")
    schema = pq.read_schema(next(folder.glob("data/*.parquet")))
    front |= front_matter(dataset.rows.items())
    front["dataset_info"] = _dataset_info(folder, schema, sizes)
    parts = [front_text(front), body.strip()]
    if "## Use\n" not in body:  # of a card that this version did not write
        parts.append(USE)
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / LICENCE_FILE).write_text(LICENCE, encoding="utf-8")


def _card(path: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a dataset card; a short one when there is none."""
    if not path.is_file():
        return {}, _CARD
    text = path.read_text(encoding="utf-8")
    front, rule, body = text.removeprefix("---\n").partition("\n---\n")
    if not rule or not text.startswith("---\n"):
        return {}, text
    found = yaml.safe_load(front)
    return (found if isinstance(found, dict) else {}), body


def _dataset_info(
    folder: Path, schema: pa.Schema, sizes: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    """Columns and sizes, which ``datasets`` then need not find out."""
    splits = {name: size for name, size in sizes.items() if size["num_examples"]}
    if empty := sorted(sizes.keys() - splits.keys()):
        log.warning("'datasets' cannot load an empty split: the card leaves out %s", empty)
    catalogue = pq.read_schema(folder / "catalogue.parquet")
    return [
        {
            "config_name": "default",
            "features": _features(schema),
            "splits": [
                {"name": name, **{k: size[k] for k in ("num_bytes", "num_examples")}}
                for name, size in splits.items()
            ],
            "download_size": sum(size["download_size"] for size in splits.values()),
            "dataset_size": sum(size["num_bytes"] for size in splits.values()),
        },
        {"config_name": "catalogue", "features": _features(catalogue)},
    ]


def _features(columns: Iterable[pa.Field]) -> list[dict[str, Any]]:
    """Columns as the card of a dataset names them: ``{name, dtype}``, lists and structs too."""
    return [{"name": column.name, **_feature(column.type)} for column in columns]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_struct(kind):
        return {"struct": _features(kind)}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _feature(kind.value_type)
        return {"list": inner.get("dtype") or inner.get("struct") or inner}
    return {"dtype": _DTYPES.get(str(kind), str(kind))}


_CARD = """# DABench

(instruction, API) pairs: which text-to-image model to call, and how, for a prompt. Each model \
has its creator's terms, which the columns of the catalogue state as the site did; prompts are \
their users'."""


def _copy_catalogue(dataset: Dataset, folder: Path) -> None:
    for name in ("catalogue.parquet", "mapping/models.json", "mapping/samplers.json"):
        _copy(dataset, name, folder)


def _write_instruction_api(dataset: Dataset, folder: Path) -> None:
    """Pairs as JSON with the dictionaries that lead from their names to files and APIs."""
    columns = list(PAIR_KEYS)
    for split, paths in dataset.shards.items():
        with (folder / f"{split}.json").open("wb") as out:
            separator = b"[\n"
            for path in paths:
                _check_digest(dataset, path.relative_to(dataset.path).as_posix(), path)
                for batch in read_file(split, path, columns):
                    for row in batch.data.to_pylist():
                        out.write(separator + orjson.dumps(to_pair(row)))
                        separator = b",\n"
            out.write(b"\n]\n" if separator == b",\n" else b"[]\n")
    _copy_catalogue(dataset, folder)
    apis = orjson.dumps(api_mapping(Catalogue.load(folder)), option=orjson.OPT_INDENT_2)
    (folder / "mapping" / "apis.json").write_bytes(apis)
    keys = "\n".join(f"| `{field}` | `{key}` |" for field, key in API_KEYS.items())
    (folder / "README.md").write_text(_PAIRS_CARD.format(keys=keys, **PAIR_KEYS), encoding="utf-8")


_PAIRS_CARD = """# DABench as instruction-API pairs

`train.json`, `validation.json` and `test.json` are JSON arrays with a pair a line: `{prompt}` is \
what a user asked for, `{api}` the text-to-image API that answered, `{id}` the picture on the site.

| field of the API record | key |
| --- | --- |
{keys}

The first five keys are those that are known of the authors' release (arXiv 2404.01342); the rest, \
the keys inside `Params` and those of the dictionaries are this project's.

- `mapping/models.json`: model and version to ids, AIR, SHA256 and download path (relative to the \
site).
- `mapping/apis.json`: model and version to what the catalogue knows of the API.
- `mapping/samplers.json`: sampler to its diffusers scheduler.
- `catalogue.parquet`: all of the catalogue, with what each model's creator allows.

Each model has its creator's terms, and prompts are their users': see the catalogue's columns \
`allow_commercial_use`, `allow_derivatives` and `allow_no_credit`.
"""


def _manifest(dataset: Dataset, folder: Path, layout: Layout, started: float) -> Manifest:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = tuple(
        FileEntry(
            path=path.relative_to(folder).as_posix(),
            size=path.stat().st_size,
            sha256=sha256_file(path),
        )
        for path in paths
    )
    source = dataset.artifact
    inputs: dict[str, tuple[InputRef, ...]] = {}
    if source:
        digests = {"identity": source.identity, "content_digest": source.content_digest}
        inputs["dabench"] = (InputRef(stage=source.stage, **digests),)
    request = {
        "stage": "export",
        "stage_version": _VERSION,
        "format": layout,
        "inputs": [source.content_digest if source else files_digest(files)],
    }
    return Manifest(
        stage="export",
        stage_version=_VERSION,
        identity=sha256(canonical_json(request)).hexdigest(),
        content_digest=files_digest(files),
        config={"format": layout, "dabench": dataset.config},
        inputs=inputs,
        files=files,
        rows={str(split): count for split, count in dataset.rows.items()},
        funnels=dataset.funnels,
        metrics={
            "made_from": dataset.made_from,
            "dates": dataset.dates,
            "random_split": dataset.random_split,
        },
        created_at=datetime.now(UTC),
        wall_seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )
