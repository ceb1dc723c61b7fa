"""Pictures that were drawn once, for every run that wants them again.

``DIR/ab/abcd....png`` is the picture whose key is its name: the recipe, the backend and its
version. It is put there at once by a rename, carries its recipe, and is never changed, so any
number of runs and processes may share the directory; deleting it, or parts of it, costs drawing
again.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from diffagent.errors import RenderError
from diffagent.render.pnginfo import read_png, write_png
from diffagent.render.recipe import Recipe
from diffagent.render.renderer import Renderer
from diffagent.store import canonical_json

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


class PictureCache:
    """The pictures of one backend, in its present version, below ``directory``."""

    def __init__(self, directory: Path, renderer: Renderer) -> None:
        self._directory = directory
        self._backend = [renderer.name, renderer.version]

    def path(self, recipe: Recipe) -> Path:
        """Where the picture of a recipe lies, or will."""
        key = hashlib.sha256(canonical_json([recipe.digest, *self._backend])).hexdigest()
        return self._directory / key[:2] / f"{key}.png"

    def get(self, recipe: Recipe) -> Image | None:
        """The picture of a recipe, if it is there and whole."""
        from PIL import Image

        path = self.path(recipe)
        if not path.exists():
            return None
        try:
            if read_png(path)[0] == recipe:
                with Image.open(path) as image:
                    return image.convert("RGB")
        except RenderError as error:
            log.warning("%s", error)
        return None

    def put(self, recipe: Recipe, image: Image) -> None:
        """Keep a picture; names of models are left to who shows it."""
        path = self.path(recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, image, recipe, {})
