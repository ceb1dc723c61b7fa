"""The diffusers backend: single-file checkpoints, LoRAs, embeddings, samplers, in batches.

A picture depends on its recipe alone, to the bit: see `diffagent.render.diffusers.denoise`. Loaded
checkpoints stay in main memory as long as there is room, the next one is read while this one draws,
and LoRAs are merged into the weights of a warm checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffagent.errors import RenderError
from diffagent.render.diffusers.adapters import Inversions, LoRA, LoRAOverlay, read_lora, token
from diffagent.render.diffusers.checkpoints import (
    Checkpoint,
    load_checkpoint,
    load_vae,
    local_path,
    shipped_configs,
    weights_size,
)
from diffagent.render.diffusers.denoise import (
    Denoiser,
    Sampling,
    failure,
    free_memory,
    is_out_of_memory,
)
from diffagent.render.diffusers.prompt_encoder import PromptEncoder, check_prompt
from diffagent.render.recipe import SUPPORTED, Recipe
from diffagent.render.renderer import Files, ModelRef
from diffagent.t2i.base_models import ecosystem
from diffagent.t2i.samplers import SAMPLERS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

log = logging.getLogger(__name__)

#: Raise it when the same recipe gives another picture.
VERSION = 3
#: Recipes whose prompts are encoded before the first is drawn: up to 1.2 MB each.
_WINDOW = 256
#: Pixels of all rows of a pass, by the kind of device; a picture with guidance is two rows.
_PIXELS_PER_PASS = {"cpu": 8 * 64 * 64, "mps": 2 * 512 * 512, "cuda": 16 * 512 * 512}
_ROWS = (2, 8)  # at least and at most, of a pass, where the device's memory allows

#: LoRAs by SHA256, with their strengths.
Strengths = tuple[tuple[str, float], ...]


class DiffusersRenderer:
    """Draws with diffusers; see `diffagent.render.renderer.Renderer` for what its methods promise.

    Computes in float32 on the CPU and MPS, in float16 on CUDA, unless told otherwise. ``loads``
    counts checkpoints loaded.
    """

    name = "diffusers"
    reads_files = True

    def __init__(
        self,
        device: torch.device,
        configs: Sequence[Path] | None = None,
        *,
        dtype: torch.dtype | None = None,
        rows: int | None = None,
        compile: bool = False,  # noqa: A002
        cache_bytes: int | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            device: that draws.
            configs: architectures, see `checkpoints.find_config`; the package's when None.
            dtype: of the weights.
            rows: of each pass of the U-Net, whatever the size; by size and device when None.
            compile: the U-Net, by torch.compile: slower to start, faster from then on.
            cache_bytes: of loaded checkpoints in main memory; a third of it when None.
        """
        import torch

        default = torch.float16 if device.type == "cuda" else torch.float32
        self.device = device
        self.configs = list(configs if configs is not None else shipped_configs())
        self.dtype = dtype or default
        self.loads = 0
        self._rows = rows
        self._compile = compile
        self._limit = _main_memory() // 3 if cache_bytes is None else cache_bytes
        self._loading = threading.RLock()  # loaders patch torch's modules for the whole process
        self._loaded: OrderedDict[str, Checkpoint] = OrderedDict()
        self._refused: dict[str, RenderError] = {}
        self._current: _Ready | None = None
        self._shrunk: dict[tuple[str, int], int] = {}

    @cached_property
    def version(self) -> str:
        """Versions, precision and rows a pass."""
        rows = self._rows or f"{_PIXELS_PER_PASS.get(self.device.type, 0)} px"
        parts = [
            str(VERSION),
            *(f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "compel")),
            f"{self.device.type} {str(self.dtype).removeprefix('torch.')}",
            f"{rows} a pass",
            *(["compiled"] if self._compile else []),
        ]
        return ", ".join(parts)

    def check(self, recipe: Recipe, files: Files) -> None:
        """See the protocol; reasons 'unsupported-sampler', 'unsupported-size',
        'prompt-too-long', 'unsupported-base-model', 'lora-base-mismatch',
        'embedding-base-mismatch' and 'vae-base-mismatch'."""
        if recipe.width % 8 or recipe.height % 8:
            raise RenderError(
                f"{recipe.width}x{recipe.height} is no multiple of 8 pixels",
                reason="unsupported-size",
            )
        if not SAMPLERS[recipe.sampler].renderable:
            raise RenderError(f"no scheduler for {recipe.sampler!r}", reason="unsupported-sampler")
        evaluations = SAMPLERS[recipe.sampler].evaluations(recipe.steps)
        check_prompt(recipe.prompt, evaluations)
        check_prompt(recipe.negative_prompt, evaluations, negative=True)
        base = _ecosystem(files.checkpoint)
        if base is not None and base not in SUPPORTED:
            raise RenderError(
                f"{files.checkpoint.name!r} is based on {files.checkpoint.base_model!r}, which "
                "diffusers does not draw here",
                reason="unsupported-base-model",
            )
        kinds = [("lora", files.loras), ("embedding", files.embeddings)]
        kinds.append(("vae", (files.vae,) if files.vae else ()))
        for kind, refs in kinds:
            for ref in refs:
                if base is not None and _ecosystem(ref) not in {None, base}:
                    raise RenderError(
                        f"{kind} {ref.name!r} is for {ref.base_model!r}, "
                        f"{files.checkpoint.name!r} is {files.checkpoint.base_model!r}",
                        reason=f"{kind}-base-mismatch",
                    )

    def preload(self, files: Files) -> None:
        """Read the next checkpoint into main memory, where there is room beside this one."""
        current = self._current.checkpoint.size if self._current else 0
        try:
            if current + weights_size(local_path(files.checkpoint), self.dtype) <= self._limit:
                with _one_thread():
                    self._checkpoint(files.checkpoint)
        except RenderError as error:
            log.debug("read ahead in vain: %s", error)

    def prepare(self, files: Files) -> None:
        """See the protocol; reasons 'bad-model-file', 'bad-vae', 'bad-lora', 'bad-embedding',
        'out-of-memory'."""
        with self._loading:
            if self._current is None or self._current.sha256 != files.checkpoint.sha256:
                self._put_away()
                checkpoint = self._checkpoint(files.checkpoint)
                self._current = self._place(files.checkpoint, checkpoint)
            with self._room_for(files.checkpoint):
                self._current.use(files)

    def render(self, recipes: Sequence[Recipe]) -> Iterator[Image | RenderError]:
        """See the protocol; reasons 'clip-skip', 'out-of-memory', 'nan', 'black',
        'render-error'."""
        if self._current is None:
            raise RenderError("nothing was prepared", reason="render-error")
        for start in range(0, len(recipes), _WINDOW):
            yield from self._window(self._current, recipes[start : start + _WINDOW])

    def close(self) -> None:
        """Give the memory back."""
        self._put_away()
        self._loaded.clear()
        free_memory()

    def _window(self, ready: _Ready, recipes: Sequence[Recipe]) -> Iterator[Image | RenderError]:
        """Draw recipes in batches, and hand them out in their order."""
        order = sorted(range(len(recipes)), key=lambda number: _strengths(recipes[number]))
        outcomes: dict[int, Image | RenderError] = {}
        following = 0
        for strengths, numbers in groupby(order, key=lambda number: _strengths(recipes[number])):
            for number, outcome in self._draw(ready, strengths, recipes, list(numbers)):
                outcomes[number] = outcome
                while following in outcomes:
                    yield outcomes.pop(following)
                    following += 1

    def _draw(
        self,
        ready: _Ready,
        strengths: Strengths,
        recipes: Sequence[Recipe],
        numbers: Sequence[int],
    ) -> Iterator[tuple[int, Image | RenderError]]:
        """Draw those of the recipes whose LoRAs have these strengths."""
        import torch

        failed: list[tuple[int, RenderError]] = []
        buckets: dict[int, list[tuple[int, Sampling]]] = {}
        with torch.inference_mode():
            for number in numbers:
                try:
                    ready.lay(strengths)
                    sampling = ready.begin(recipes[number], self.device)
                except RenderError as error:
                    failed.append((number, error))
                    continue
                buckets.setdefault(sampling.context_length, []).append((number, sampling))
        yield from failed
        for bucket in buckets.values():
            yield from self._denoise(ready, bucket)

    def _denoise(
        self, ready: _Ready, bucket: Sequence[tuple[int, Sampling]]
    ) -> Iterator[tuple[int, Image | RenderError]]:
        """Draw pictures of one length of context, which share every pass."""
        import torch

        recipe = bucket[0][1].recipe
        size = recipe.width * recipe.height
        limit = self._shrunk.get((ready.checkpoint.family, size), self.rows(size))
        denoiser = Denoiser(ready.checkpoint.pipeline.unet, limit)
        numbers = {id(sampling): number for number, sampling in bucket}
        steps = denoiser.run(sampling for _, sampling in bucket)
        while True:
            with torch.inference_mode():  # not around a yield: it would leak to the caller
                sampling = next(steps, None)
                if sampling is None:
                    break
                outcome = ready.picture(sampling)
            if denoiser.rows < limit:
                self._shrunk[ready.checkpoint.family, size] = denoiser.rows
            yield numbers[id(sampling)], outcome

    def rows(self, pixels: int) -> int:
        """Rows of a pass for pictures of so many pixels: a power of two."""
        if self._rows:
            return self._rows
        room = max(_PIXELS_PER_PASS.get(self.device.type, 0) // pixels, 1)
        least, most = _ROWS
        return min(max(1 << (room.bit_length() - 1), least), most)

    def _checkpoint(self, file: ModelRef) -> Checkpoint:
        """A checkpoint out of memory or of its file; one that failed fails again at once."""
        with self._loading:
            if file.sha256 in self._refused:
                raise self._refused[file.sha256]
            if file.sha256 not in self._loaded:
                try:
                    self._make_room(weights_size(local_path(file), self.dtype))
                    loaded = load_checkpoint(file, self.configs, self.dtype)
                except RenderError as error:
                    self._refused[file.sha256] = error
                    raise
                self.loads += 1
                self._loaded[file.sha256] = loaded
            self._loaded.move_to_end(file.sha256)
            return self._loaded[file.sha256]

    def _make_room(self, size: int) -> None:
        """Forget checkpoints, the longest unused first, until there is room for so many bytes."""
        current = self._current.sha256 if self._current else None
        for sha256 in [name for name in self._loaded if name != current]:
            if size + sum(loaded.size for loaded in self._loaded.values()) <= self._limit:
                return
            del self._loaded[sha256]

    def _place(self, file: ModelRef, checkpoint: Checkpoint) -> _Ready:
        """The checkpoint on the device."""
        try:
            with self._room_for(file):
                checkpoint.pipeline.to(self.device)
        except RenderError:
            checkpoint.pipeline.to("cpu")  # what has got there already
            free_memory()
            raise
        if self._compile:
            checkpoint.pipeline.unet.compile()
        return _Ready(file.sha256, checkpoint)

    @contextmanager
    def _room_for(self, file: ModelRef) -> Iterator[None]:
        """Turn a full memory into an error that says of what."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RenderError(
                f"{file.name!r} and what is laid over it do not fit into the memory of "
                f"{self.device}",
                reason="out-of-memory",
            ) from error

    def _put_away(self) -> None:
        """Take everything off the current checkpoint, and it off the device."""
        if self._current is None:
            return
        ready, self._current = self._current, None
        ready.strip()
        if self.device.type != "cpu":
            ready.checkpoint.pipeline.to("cpu")
            free_memory()


class _Ready:
    """A checkpoint on the device, with what is laid over it."""

    def __init__(self, sha256: str, checkpoint: Checkpoint) -> None:
        self.sha256 = sha256
        self.checkpoint = checkpoint
        self._overlay = LoRAOverlay(checkpoint.pipeline)
        self._inversions = Inversions(checkpoint.pipeline)
        self._encoder = PromptEncoder(checkpoint.pipeline, checkpoint.family)
        self._loras: dict[str, LoRA] = {}
        self._laid: Strengths = ()
        self._vae: str | None = None

    def use(self, files: Files) -> None:
        """Make a group's files the ones that are drawn with."""
        self._loras = {
            ref.sha256: self._loras.get(ref.sha256) or read_lora(local_path(ref), self._pipeline)
            for ref in files.loras
        }
        if self._inversions.load({ref.sha256: local_path(ref) for ref in files.embeddings}):
            self._encoder.forget()
        vae = files.vae.sha256 if files.vae else None
        if vae != self._vae:
            precision = self.checkpoint.vae.dtype
            own = self.checkpoint.vae
            chosen = load_vae(files.vae, self.checkpoint, precision) if files.vae else own
            self._pipeline.vae = chosen.to(self._pipeline.unet.device)
            self._vae = vae

    @property
    def _pipeline(self) -> Any:
        return self.checkpoint.pipeline

    def lay(self, strengths: Strengths) -> None:
        """Merge LoRAs in use with these strengths."""
        if strengths == self._laid:
            return
        if self._overlay.on_text:
            self._encoder.forget()
        try:
            self._overlay.lay([(self._loras[sha256], weight) for sha256, weight in strengths])
            if self._overlay.on_text:
                self._encoder.forget()
        except (RuntimeError, MemoryError) as error:
            self._overlay.remove()
            self._laid = ()
            reason = "out-of-memory" if is_out_of_memory(error) else "bad-lora"
            raise RenderError(f"the LoRAs cannot be merged: {error}", reason=reason) from error
        self._laid = strengths

    def begin(self, recipe: Recipe, device: torch.device) -> Sampling:
        """The noise that becomes the recipe's picture."""
        channels, scale = self._pipeline.unet.config.in_channels, self._pipeline.vae_scale_factor
        shape = (1, channels, recipe.height // scale, recipe.width // scale)
        tokens = {use.sha256: token(use.sha256) for use in recipe.embeddings}
        try:
            said = self._encoder.pair(
                recipe.text(tokens, negative=False, write_weight="{:f}".format),
                recipe.text(tokens, negative=True, write_weight="{:f}".format),
                recipe.clip_skip,
                SAMPLERS[recipe.sampler].evaluations(recipe.steps),
            )
            checkpoint = self.checkpoint
            return Sampling(
                recipe, checkpoint.scheduler_config, said, shape, device, checkpoint.family
            )
        except RenderError:
            raise
        except Exception as error:  # the checkpoint and what is laid over it are strangers'
            raise failure(recipe, error) from error

    def picture(self, sampling: Sampling) -> Image | RenderError:
        """The picture of finished latents, or why there is none."""
        if sampling.error:
            return sampling.error
        vae = self._pipeline.vae
        try:
            latents = (sampling.latents / vae.config.scaling_factor).to(vae.dtype)
            decoded = vae.decode(latents, return_dict=False)[0][0]
        except (RuntimeError, MemoryError) as error:
            free_memory()
            return failure(sampling.recipe, error)
        return _image(decoded)

    def strip(self) -> None:
        """Leave the checkpoint as it was loaded."""
        self._overlay.remove()
        self._inversions.load({})
        self._pipeline.vae = self.checkpoint.vae


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute without helpers in this thread.

    A second team of OpenMP threads outlives its work, and with more threads than cores none of
    them waits awake any more: every pass of the first team would take about twice as long.
    """
    import torch

    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def _ecosystem(ref: ModelRef) -> str | None:
    return ecosystem(ref.base_model) if ref.base_model else None


def _strengths(recipe: Recipe) -> Strengths:
    return tuple((use.sha256, use.weight) for use in recipe.loras)


def _main_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _image(decoded: torch.Tensor) -> Image | RenderError:
    """An RGB picture of (3, H, W) values in -1..1."""
    from PIL import Image

    pixels = decoded.float()
    if not bool(pixels.isfinite().all()):
        return RenderError("the picture is not a number somewhere", reason="nan")
    pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    values = (pixels.cpu().numpy() * 255).round().astype(np.uint8)
    if not values.any():
        return RenderError("the picture is black all over", reason="black")
    return Image.fromarray(values)
