"""The order of work: each checkpoint is loaded once, the next is read while this one draws."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from diffagent.errors import CivitaiError, RenderError
from diffagent.render.recipe import Recipe
from diffagent.render.renderer import Files, ModelRef, Renderer
from diffagent.t2i.weights import reading

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

#: Gives the local file of a model; CivitaiError or RenderError when it cannot.
Fetch = Callable[[ModelRef], Path]
#: Takes a file back that is not read any more.
Release = Callable[[ModelRef], None]
#: Says what the hashes in a recipe stand for.
FilesOf = Callable[[Recipe], Files]


@dataclass(frozen=True)
class Group:
    """Recipes that share all files and the size, in the order in which they are drawn."""

    files: Files
    recipes: tuple[Recipe, ...]


def plan(recipes: Iterable[Recipe], files_of: FilesOf) -> Iterator[Group]:
    """Group recipes by base, checkpoint, VAE, set of LoRAs, embeddings and size, in this order.

    Duplicates are drawn once. The order depends on the set of recipes alone.
    """
    unique = {recipe.digest: recipe for recipe in recipes}
    files = {digest: files_of(recipe) for digest, recipe in unique.items()}
    shared = {
        digest: (_file_key(files[digest]), recipe.width, recipe.height)
        for digest, recipe in unique.items()
    }
    ordered = sorted(
        unique, key=lambda digest: (shared[digest], -unique[digest].steps, digest)
    )  # the longest first: the last batches are short of rows only for a few steps
    for _, group in groupby(ordered, key=lambda digest: shared[digest]):
        digests = list(group)
        yield Group(files[digests[0]], tuple(unique[digest] for digest in digests))


def _file_key(files: Files) -> tuple[str, str, str, tuple[str, ...], tuple[str, ...]]:
    return (
        files.checkpoint.base_model,
        files.checkpoint.sha256,
        files.vae.sha256 if files.vae else "",
        tuple(ref.sha256 for ref in files.loras),
        tuple(ref.sha256 for ref in files.embeddings),
    )


def draw(
    recipes: Iterable[Recipe],
    renderer: Renderer,
    files_of: FilesOf,
    fetch: Fetch,
    release: Release = lambda ref: None,
) -> Iterator[tuple[Recipe, Image | RenderError]]:
    """Draw recipes, each checkpoint loaded once; every recipe comes out once, in any order.

    Args:
        recipes: in any order; duplicates are drawn once.
        renderer: draws; it is not closed.
        files_of: what a recipe's hashes stand for.
        fetch: gives local files; called from another thread, one call at a time.
        release: takes a fetched file back after the last group that needs it.

    Raises:
        CivitaiError, RenderError: with ``retryable`` set alone (the site or the server is away).
    """
    able: list[Recipe] = []
    for recipe in recipes:
        try:
            renderer.check(recipe, files_of(recipe))
            able.append(recipe)
        except RenderError as error:
            if error.retryable:
                raise
            yield recipe, error
    groups = list(plan(able, files_of))
    last = {ref.sha256: group for group in groups for ref in group.files.all}
    supply = _Supply(renderer, fetch)
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as ahead:
        arriving = ahead.submit(supply.files, groups[0].files) if groups else None
        for group, following in zip_longest(groups, groups[1:]):
            failed = _prepare(renderer, group, arriving)
            # Not before this group's own checkpoint is loaded, which would have to wait.
            arriving = ahead.submit(supply.read_ahead, following.files) if following else None
            name, number = group.files.checkpoint.name, len(group.recipes)
            if failed:
                log.warning("%s: %d pictures fail: %s", name, number, failed)
                yield from ((recipe, failed) for recipe in group.recipes)
            else:
                log.info("%s: %d pictures", name, number)
                yield from zip(group.recipes, renderer.render(group.recipes), strict=True)
            for ref in supply.fetched(group.files):
                if last[ref.sha256] is group:
                    release(ref)


def _prepare(
    renderer: Renderer, group: Group, arriving: Future[Files] | None
) -> RenderError | None:
    """Make arriving files the ones that are drawn with; the error that the whole group has.

    Readers turn what they raise into such errors; what escapes them is the group's too.
    """
    try:
        with reading(group.files.checkpoint.name, "cannot be drawn with", "render-error"):
            if arriving:
                renderer.prepare(arriving.result())
    except RenderError as error:
        if error.retryable:
            raise
        return _named(error, error.reason, *group.files.all)
    return None


def _named(error: Exception, reason: str, *refs: ModelRef) -> RenderError:
    """The error with models' names in place of the cache's file names, which are their hashes."""
    text = str(error)
    for ref in refs:
        text = text.replace(f"{ref.sha256}.safetensors", ref.name)
    return RenderError(text, reason=reason)


class _Supply:
    """Gives groups their local files; a file that failed fails again without another try."""

    def __init__(self, renderer: Renderer, fetch: Fetch) -> None:
        self._renderer = renderer
        self._fetch = fetch
        self._paths: dict[str, Path] = {}
        self._failed: dict[str, RenderError] = {}

    def files(self, files: Files) -> Files:
        """The same files with their paths."""
        if not self._renderer.reads_files:
            return files
        return Files(
            self._local(files.checkpoint),
            self._local(files.vae) if files.vae else None,
            tuple(map(self._local, files.loras)),
            tuple(map(self._local, files.embeddings)),
        )

    def read_ahead(self, files: Files) -> Files:
        """The same files with their paths, and the renderer told that they come next."""
        found = self.files(files)
        self._renderer.preload(found)
        return found

    def fetched(self, files: Files) -> list[ModelRef]:
        """Those of some files that are there; all of them, unless one has failed."""
        return [ref for ref in files.all if ref.sha256 in self._paths]

    def _local(self, ref: ModelRef) -> ModelRef:
        if ref.sha256 in self._failed:
            raise self._failed[ref.sha256]
        try:
            if ref.sha256 not in self._paths:
                with reading(ref.name, "cannot be had", "download"):
                    self._paths[ref.sha256] = self._fetch(ref)
        except (RenderError, CivitaiError) as error:
            if error.retryable:
                raise
            reason = error.reason if isinstance(error, RenderError) else "download"
            self._failed[ref.sha256] = _named(error, reason, ref)
            raise self._failed[ref.sha256] from error
        return replace(ref, path=self._paths[ref.sha256])
