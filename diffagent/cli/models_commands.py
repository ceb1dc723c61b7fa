"""``diffagent models``: fetch, list, pin, evict and import model files; scan folders of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from diffagent.cli.options import refuse_options
from diffagent.schemas.printable import printable

if TYPE_CHECKING:
    from diffagent.civitai.site import Site as CivitaiSite
    from diffagent.errors import DiffAgentError
    from diffagent.render.files.model_cache import CachedModel, ModelCache
    from diffagent.render.files.model_store import ModelStore
    from diffagent.schemas.runtime import RuntimeConfig
    from diffagent.t2i.catalogue import Entry

A = TypeVar("A")
B = TypeVar("B")

app = typer.Typer(
    help="Fetch, list, pin, evict and import model files; scan folders of them.",
    no_args_is_help=True,
)

_HASHES = "SHA256 or its beginning, or a part of the name that no other file has."
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="YAML file of a run: its section runtime."),
]
Models = Annotated[
    Path | None,
    typer.Option(
        "--models", metavar="DIR", help="Cache of model files. [default: runtime.models.directory]"
    ),
]
Folders = Annotated[
    list[Path] | None,
    typer.Option(
        "--folder", metavar="DIR", help="Folder of model files, read in place (repeatable)."
    ),
]
Site = Annotated[
    str | None,
    typer.Option(
        help="Address of a Civitai API, or source as in crawl.site. [default: crawl.site]"
    ),
]
LimitGB = Annotated[
    float | None,
    typer.Option(
        "--limit-gb",
        min=0,
        help="Limit of the cache in 10^9 bytes. [default: runtime.models.max_gb]",
    ),
]
Which = Annotated[list[str], typer.Argument(metavar="MODEL...", help=_HASHES)]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def fetch(
    references: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="AIR, version id, page address or hash."),
    ],
    *,
    config: Config = None,
    models: Models = None,
    folders: Folders = None,
    site: Site = None,
    limit_gb: LimitGB = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="Keep the files whatever the limit is.")
    ] = False,
    allow_unscanned: Annotated[
        bool,
        typer.Option(
            "--allow-unscanned", help="Also fetch files that did not pass the site's scans."
        ),
    ] = False,
) -> None:
    """Print the path of each model file; download and verify those that are missing."""
    from diffagent.render.files.references import find

    def look_up(reference: str) -> Entry | Path:
        local = _local(store, reference)
        return local or find(civitai, reference, require_scans=not allow_unscanned)

    def fetch_file(entry: Entry | Path) -> Path:
        return entry if isinstance(entry, Path) else store.fetch(entry)

    errors: list[DiffAgentError] = []
    with _open_store(config, models, folders, site, limit_gb) as (store, civitai):
        entries = list(_without_errors(look_up, references, errors))
        store.prefetch(entry for entry in entries if not isinstance(entry, Path))
        for path in _without_errors(fetch_file, entries, errors):
            if pin and path.is_relative_to(store.cache.directory):
                store.cache.pin(path.stem)
            typer.echo(path)
    for error in errors[1:]:
        typer.echo(f"error: {printable(str(error))}", err=True)
    if errors:
        raise errors[0]


def _without_errors(
    action: Callable[[A], B], items: Iterable[A], errors: list[DiffAgentError]
) -> Iterator[B]:
    """Apply an action to each item; collect its errors and go on with the next item."""
    from diffagent.errors import DiffAgentError

    for item in items:
        try:
            yield action(item)
        except DiffAgentError as error:
            errors.append(error)


@app.command("list")
def list_models(config: Config = None, models: Models = None, as_json: AsJSON = False) -> None:
    """List cached model files, most recently used last."""
    runtime = _runtime(config, models)
    files = sorted(_cache(runtime).files(), key=lambda file: file.used)
    if as_json:
        typer.echo(json.dumps([asdict(file) for file in files], indent=2))
        return
    for file in files:
        states = {
            "pinned": file.pinned,
            "imported": file.imported,
            "in use": file.in_use,
            "unfinished": not file.complete,
        }
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used))
        state = ", ".join(name for name, holds in states.items() if holds)
        name = printable(f"{file.model} {file.air}".strip())
        typer.echo(f"{file.sha256[:10]}  {file.size / 1e9:8.3f} GB  {used}  {state:<10}  {name}")
    limit = f" of {runtime.models.max_gb:g}" if runtime.models.max_gb else ""
    total = sum(file.size for file in files) / 1e9
    typer.echo(f"{len(files)} files, {total:.3f}{limit} GB in {runtime.models_directory}")


@app.command()
def pin(which: Which, config: Config = None, models: Models = None) -> None:
    """Keep files in the cache whatever its limit is."""
    cache = _cache(_runtime(config, models))
    for file in _chosen(cache, which):
        cache.pin(file.sha256)
        typer.echo(f"pinned {file.sha256[:10]} {printable(file.model)}")


@app.command()
def unpin(which: Which, config: Config = None, models: Models = None) -> None:
    """Allow pinned files to be evicted again."""
    cache = _cache(_runtime(config, models))
    for file in _chosen(cache, which):
        cache.pin(file.sha256, pinned=False)
        typer.echo(f"unpinned {file.sha256[:10]} {printable(file.model)}")


@app.command()
def evict(
    context: typer.Context,
    which: Annotated[list[str] | None, typer.Argument(metavar="[MODEL...]", help=_HASHES)] = None,
    *,
    config: Config = None,
    models: Models = None,
    limit_gb: LimitGB = None,
    imported: Annotated[bool, typer.Option("--imported", help="Also imported files.")] = False,
) -> None:
    """Delete files from the cache: the named ones, or the least recently used above the limit.

    Pinned files and files in use stay; so do imported files, unless named or with --imported.
    """
    from diffagent.errors import ConfigError

    runtime = _runtime(config, models, limit_gb=limit_gb)
    if not which and runtime.models.max_gb is None:
        raise ConfigError("evict needs names of models, or --limit-gb")
    if which:
        refuse_options(context, ("limit_gb", "imported"), "not together with names of models")
    cache = _cache(runtime)
    if which:
        evicted = _chosen(cache, which)
        for file in evicted:
            cache.remove(file.sha256)
    else:
        evicted = cache.make_room(imported=imported)
    for file in evicted:
        name = printable(file.model)
        typer.echo(f"evicted {file.sha256[:10]} {name}: {file.size / 1e9:.3f} GB")


@app.command("import")
def import_models(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="safetensors files, or folders of them.")
    ],
    config: Config = None,
    models: Models = None,
) -> None:
    """Check files and copy them into the cache; list refused files and exit with 1 if any."""
    from diffagent.errors import RenderError
    from diffagent.localcivitai.sources.local import model_files, undrawable

    cache, refused = _cache(_runtime(config, models)), False
    files = [model_files(path) if path.is_dir() else [path] for path in paths]
    for path in chain.from_iterable(files):
        try:
            typer.echo(f"{cache.add(path)[0]}  {printable(str(path))}")
            if why := undrawable(path):
                typer.echo(f"not drawn with  {printable(f'{path}: {why}')}", err=True)
        except RenderError as error:
            refused = True
            typer.echo(f"refused  {printable(f'{path}: {error}')}", err=True)
    if refused:
        raise typer.Exit(1)


@app.command()
def scan(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Folders of model files, or installations of A1111 or ComfyUI."
        ),
    ],
    config: Config = None,
    models: Models = None,
    as_json: AsJSON = False,
) -> None:
    """List the model files of folders with hash, type and base model; the folders stay untouched.

    Hashes are stored next to the cache, so that a second scan reads no file.
    """
    from diffagent.localcivitai.sources.local import record_of
    from diffagent.render.files.folders import ModelFolders

    runtime = _runtime(config, models)
    for file in ModelFolders(folders, runtime.models_directory / "folders.json").files():
        model, version = record_of(file)
        base = version.get("baseModel")
        if as_json:
            row: dict[str, Any] = {
                "path": str(file.path),
                "sha256": file.sha256,
                "refused": file.refused,
                "undrawable": file.undrawable,
                "type": model["type"],
                "base_model": base,
                "model": model["name"],
                "version": version["name"],
            }
            typer.echo(json.dumps(row))
        else:
            why = f"  refused: {file.refused}" if file.refused else ""
            why = f"  not drawn with: {file.undrawable}" if file.undrawable else why
            typer.echo(
                f"{file.sha256[:10]}  {model['type']:<16}  {printable(base or '?'):<8}  "
                f"{printable(str(file.path))}{printable(why)}"
            )


def _runtime(
    config: Path | None,
    models: Path | None,
    folders: list[Path] | None = None,
    limit_gb: float | None = None,
) -> RuntimeConfig:
    """Return the section runtime of a run's file, changed by options of the command line."""
    from diffagent.run_config import load_config
    from diffagent.schemas.runtime import RuntimeConfig

    runtime = load_config(config).runtime if config else RuntimeConfig()
    options: dict[str, Any] = {
        "directory": str(models) if models else None,
        "folders": tuple(map(str, folders)) if folders else None,
        "max_gb": limit_gb,
    }
    changes = {name: value for name, value in options.items() if value is not None}
    return runtime.model_copy(update={"models": runtime.models.model_copy(update=changes)})


def _cache(runtime: RuntimeConfig) -> ModelCache:
    from diffagent.render.files.model_cache import ModelCache

    return ModelCache(runtime.models_directory, runtime.models.max_bytes)


@contextmanager
def _open_store(
    config: Path | None,
    models: Path | None,
    folders: list[Path] | None,
    site: str | None,
    limit_gb: float | None,
) -> Iterator[tuple[ModelStore, CivitaiSite]]:
    from diffagent.crawl.crawl_config import CrawlConfig
    from diffagent.localcivitai.site import open_site
    from diffagent.render.files.model_store import ModelStore
    from diffagent.run_config import load_config

    runtime = _runtime(config, models, folders, limit_gb)
    address = site or (load_config(config).crawl if config else CrawlConfig()).site
    with (
        open_site(address, runtime) as opened,
        ModelStore.of(runtime, opened) as store,
    ):
        yield store, opened


def _local(store: ModelStore, reference: str) -> Path | None:
    """Return the local file of a SHA256, which needs no site; None for other references."""
    digest = reference.removeprefix("hash:").lower()
    whole = len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    return store.local(digest) if whole else None


def _chosen(cache: ModelCache, which: list[str]) -> list[CachedModel]:
    """Return the named files, one for each name.

    Raises:
        ConfigError: a name matches no file, or several.
    """
    from diffagent.errors import ConfigError

    files, chosen = cache.files(), []
    for name in which:
        text = name.lower()
        matches = [
            file
            for file in files
            if file.sha256.startswith(text) or text in f"{file.model} {file.air}".lower()
        ]
        if len(matches) != 1:
            names = ", ".join(f"{f.sha256[:10]} {f.model}" for f in matches[:5]) or "none"
            raise ConfigError(
                f"{name!r} matches {len(matches)} files of {str(cache.directory)!r} ({names}), not "
                "one; see `diffagent models list`"
            )
        chosen.append(matches[0])
    return chosen
