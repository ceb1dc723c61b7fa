"""What renderers behind an HTTP API have in common: see `a1111` and `comfyui`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from diffagent.errors import RenderError, RenderServerError
from diffagent.render.http.remote import Remote, refuse_foreign
from diffagent.render.recipe import Recipe
from diffagent.render.renderer import Files

if TYPE_CHECKING:
    from PIL.Image import Image

_NO_NAMES: Mapping[str, str] = MappingProxyType({})


class Found(Protocol):
    """Names on the server of the files in use."""

    @property
    def checkpoint(self) -> str: ...


F = TypeVar("F", bound=Found)


class ServerRenderer(ABC, Generic[F]):
    """A `diffagent.render.renderer.Renderer` that asks a server with models of its own.

    Args:
        server: where it is.
        names: SHA256 -> the file's name on the server, for models that it has under other names.
        local: the local file of a SHA256, where there is one, to prove the server's by.
    """

    reads_files = False

    def __init__(
        self,
        server: Remote,
        names: Mapping[str, str] = _NO_NAMES,
        local: Callable[[str], Path | None] = lambda sha256: None,
    ) -> None:
        self.server = server
        self.loads = 0
        self._names = names
        self._local = local
        self._refreshed: set[str] = set()
        self._found: F | None = None

    def check(self, recipe: Recipe, files: Files) -> None:
        """Refuse what the server lacks: models, the sampler, the schedule."""
        for text in (recipe.prompt, recipe.negative_prompt):
            refuse_foreign(text)
        self._sampler(recipe)
        self._find(files)

    def preload(self, files: Files) -> None:
        """Nothing: the server loads when it draws."""

    def prepare(self, files: Files) -> None:
        """Look the files up on the server."""
        before = self._found
        self._found = self._find(files)
        self.loads += before is None or before.checkpoint != self._found.checkpoint

    def render(self, recipes: Sequence[Recipe]) -> Iterator[Image | RenderError]:
        """Draw recipes one by one; see the protocol."""
        if self._found is None:
            raise RenderError("render was called before prepare", reason="render-error")
        for recipe in recipes:
            try:
                yield self._draw(recipe, self._found)
            except RenderServerError:
                raise
            except RenderError as error:
                yield error

    def close(self) -> None:
        """Close the connection."""
        self.server.close()

    @abstractmethod
    def _sampler(self, recipe: Recipe) -> tuple[str, str | None]:
        """Names of the sampler and the schedule on this server."""

    @abstractmethod
    def _find(self, files: Files) -> F:
        """The files on this server."""

    @abstractmethod
    def _draw(self, recipe: Recipe, found: F) -> Image:
        """One picture."""
