"""What a renderer is: the protocol between the planner and a backend.

The planner (`diffagent.render.planner`) asks a backend, in this order:

1. ``check`` for every recipe, before a file is fetched or a model loaded: what the backend cannot
   do fails here, at no cost.
2. ``prepare`` once a group, with the files that the group's recipes share. While a group is being
   rendered, ``preload`` tells of the next one, from another thread.
3. ``render`` with recipes of that group, as often as there are some.
4. ``close`` at the end, whatever happened.

A backend draws what a `Recipe` says and keeps nothing else in mind: equal recipes give equal
pictures in any order and in any company. Failures are `RenderError` with a ``reason`` out of
`diffagent.render.render_stage.REASONS`; one with ``retryable`` set (a server that is away) ends
the run, which goes on from its finished pictures when it is started again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffagent.render.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffagent.errors import RenderError


@dataclass(frozen=True)
class ModelRef:
    """A model's file that a recipe names by its hash.

    ``sha256`` is lower case, ``name`` is for people (never a path), ``base_model`` is Civitai's
    ('SD 1.5'; '' when nobody knows), ``file_name`` is what the site calls the file ('' when nobody
    knows: only a hint where a server lists names alone). ``path`` is the local file, verified; None
    before the file was fetched and for backends that read no local files.
    """

    sha256: str
    name: str
    base_model: str = ""
    file_name: str = ""
    path: Path | None = None


@dataclass(frozen=True)
class Files:
    """The files that a group of recipes shares. ``loras`` and ``embeddings``: each hash once."""

    checkpoint: ModelRef
    vae: ModelRef | None = None
    loras: tuple[ModelRef, ...] = ()
    embeddings: tuple[ModelRef, ...] = ()

    @property
    def all(self) -> tuple[ModelRef, ...]:
        """Every file, the checkpoint first."""
        return (self.checkpoint, *([self.vae] if self.vae else []), *self.loras, *self.embeddings)


class Renderer(Protocol):
    """A backend. ``loads`` counts the checkpoints that it has loaded."""

    loads: int

    @property
    def name(self) -> str:
        """'diffusers', 'a1111', 'comfyui': part of the key of every picture."""
        ...

    @property
    def version(self) -> str:
        """What decides the pixels beside the recipe: versions, precision, kind of device.

        Part of the key of every picture, so equal only when equal recipes give equal pictures.
        Asked before anything is loaded.
        """
        ...

    @property
    def reads_files(self) -> bool:
        """Whether ``prepare`` needs local files; else nothing is fetched, and paths are None."""
        ...

    def check(self, recipe: Recipe, files: Files) -> None:
        """Raise a RenderError when this backend cannot draw the recipe.

        Called before anything is fetched or loaded: the paths of ``files`` may be None.
        """
        ...

    def preload(self, files: Files) -> None:
        """A hint that ``files`` come next: read them ahead.

        Called from another thread while ``render`` runs. May do nothing; raises nothing, because
        ``prepare`` will meet the same trouble.
        """
        ...

    def prepare(self, files: Files) -> None:
        """Make these files the ones that ``render`` draws with.

        Raises:
            RenderError: a file cannot be used; the backend stays usable.
        """
        ...

    def render(self, recipes: Sequence[Recipe]) -> Iterator[Image | RenderError]:
        """Draw recipes of the prepared group: one RGB picture or error for each, in their order.

        The recipes share their files and the size; everything else may differ.

        Raises:
            RenderError: with ``retryable`` set alone; a picture's own failure is yielded.
        """
        ...

    def close(self) -> None:
        """Give back memory and connections."""
        ...
