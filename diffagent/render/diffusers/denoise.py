"""From noise to latents: many pictures at once, each as if it were alone.

A picture under way has its own scheduler, its own generator and its own place in its own steps;
only the U-Net is shared. Each of its passes takes rows (a latent at a timestep under a context; two
for a picture with guidance) of whatever pictures are under way, so pictures with different
samplers, steps and guidance share a batch, and one that is finished makes room for the next.
Of more pictures than a pass can take, those with the most steps left go on: with that the last
passes have the fewest rows missing (McNaughton 1959: the least makespan with preemption).

A pass always has the same number of rows; missing ones are filled up. With that, and only with
that, a row's result does not depend on the others or on its place (measured bit by bit on the CPU,
see docs/explanation/rendering.md): in batches of another size the same row differs by some 1e-6.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffagent.errors import RenderError
from diffagent.render.diffusers.prompt_encoder import Conditioning, Guide
from diffagent.render.diffusers.solvers import solver_for
from diffagent.render.recipe import Recipe
from diffagent.t2i.samplers import SAMPLERS

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: Passes that the pictures under way would fill, while there are that many.
_UNDER_WAY = 3


@dataclass(frozen=True)
class Row:
    """What the U-Net is asked: latents (1, C, H, W), the timestep, and what is to be seen."""

    latents: torch.Tensor
    timestep: float
    said: Conditioning


class Sampling:
    """One picture between noise and latents.

    ``latents``: (1, C, H, W), float32. ``error`` says why they will never be those of the picture.
    """

    def __init__(  # noqa: PLR0917  as the picture is made up
        self,
        recipe: Recipe,
        scheduler_config: Mapping[str, Any],
        said: tuple[Guide, Guide],
        latent_shape: Sequence[int],
        device: torch.device,
        family: str = "sd1",
    ) -> None:
        """Draw the noise; ``said`` is the positive and the negative conditioning.

        The noise comes from a generator on the CPU, so it is the same on every device.

        Raises:
            RenderError: reason 'unsupported-sampler'.
        """
        import torch

        self.recipe = recipe
        self.error: RenderError | None = None
        self._evaluation = 0
        self._positive, self._negative = said
        # As the WebUI and diffusers: at a scale of 1 the negative prompt has no say.
        weights = (weight for _, weight in self._positive.parts(0))
        self._guided = recipe.cfg_scale * sum(weights) != 1
        generator = torch.Generator("cpu").manual_seed(recipe.seed)
        noise = torch.randn(tuple(latent_shape), generator=generator).to(device)
        self._solver = solver_for(
            SAMPLERS[recipe.sampler],
            recipe.steps,
            scheduler_config,
            noise,
            generator,
            sdxl=family == "sdxl",
        )

    @property
    def latents(self) -> torch.Tensor:
        """As far as they are."""
        return self._solver.latents

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do: the latents are the picture's, or it failed."""
        return self.error is not None or self.left == 0

    @property
    def left(self) -> int:
        """Evaluations of the U-Net that are left."""
        return self._solver.left

    @property
    def context_length(self) -> int:
        """Tokens of the conditionings: rows of one pass share it."""
        return self._positive.parts(0)[0][0].context.shape[1]

    @property
    def width(self) -> int:
        """Rows that each evaluation asks for."""
        return len(self._positive.parts(0)) + self._guided

    def rows(self) -> list[Row]:
        """Give the U-Net's inputs for the next evaluation, the positive prompt's parts first."""
        latents, timestep = self._solver.input()
        guides = [guide for guide, _ in self._positive.parts(self._evaluation)]
        if self._guided:
            guides.append(self._negative.parts(self._evaluation)[0][0])
        return [Row(latents, timestep, guide) for guide in guides]

    def advance(self, predictions: Sequence[torch.Tensor]) -> None:
        """Take the step with the U-Net's answers to `rows`, each (1, C, H, W).

        Parts of a prompt are summed as in the WebUI (Liu et al. 2022, arXiv 2206.01714):
        ``negative + sum of cfg_scale * weight * (part - negative)``.
        """
        import torch

        weights = [weight for _, weight in self._positive.parts(self._evaluation)]
        own = predictions[: len(weights)]
        if self._guided:
            negative = guided = predictions[-1].float()
            for weight, prediction in zip(weights, own, strict=True):
                scale = self.recipe.cfg_scale * weight
                guided = guided + scale * (prediction.float() - negative)
        else:
            guided = torch.zeros_like(own[0], dtype=torch.float32)
            for weight, prediction in zip(weights, own, strict=True):
                guided = guided + self.recipe.cfg_scale * weight * prediction.float()
        self._solver.advance(guided)
        self._evaluation += 1


class Denoiser:
    """A U-Net that answers ``rows`` rows a pass, halved whenever the memory is too small."""

    def __init__(self, unet: Any, rows: int) -> None:
        self.rows = rows
        self._unet = unet

    def run(self, samplings: Iterable[Sampling]) -> Iterator[Sampling]:
        """Finish all, in the order in which they get ready; see their ``error``.

        Args:
            samplings: of one size and one length of context; taken as there is room.
        """
        waiting = iter(samplings)
        following = next(waiting, None)
        active: list[Sampling] = []
        while active or following:
            while following and (
                not active or _width(active) + following.width <= _UNDER_WAY * self.rows
            ):
                active.append(following)
                following = next(waiting, None)
            chosen = self._choose(active)
            try:
                self._step(chosen)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error) and self.rows > 1:
                    self.rows //= 2  # what is under way goes on in turns
                    free_memory()
                    log.warning("out of memory: now %d rows a pass", self.rows)
                    continue
                for sampling in chosen:
                    sampling.error = failure(sampling.recipe, error)
            yield from (sampling for sampling in active if sampling.done)
            active = [sampling for sampling in active if not sampling.done]

    def _choose(self, active: Sequence[Sampling]) -> list[Sampling]:
        """Those that take a step: the most steps left first, as many as fit; one at least."""
        first, *others = sorted(active, key=lambda sampling: -sampling.left)
        chosen = [first]
        for sampling in others:
            if _width(chosen) + sampling.width <= self.rows:
                chosen.append(sampling)
        return chosen

    def _step(self, chosen: Sequence[Sampling]) -> None:
        """One step of each; nothing has changed when the U-Net fails."""
        asked = [sampling.rows() for sampling in chosen]
        flat = [row for rows in asked for row in rows]
        answers: list[torch.Tensor] = []
        for start in range(0, len(flat), self.rows):
            part = flat[start : start + self.rows]
            filled = part + part[-1:] * (self.rows - len(part))
            answers.extend(self._pass(filled)[: len(part)])
        for sampling, rows in zip(chosen, asked, strict=True):
            own, answers = answers[: len(rows)], answers[len(rows) :]
            try:
                sampling.advance(own)
            except (RuntimeError, ValueError, IndexError) as error:  # a scheduler's own
                sampling.error = failure(sampling.recipe, error)

    def _pass(self, rows: Sequence[Row]) -> Sequence[torch.Tensor]:
        """The U-Net's predictions, (1, C, H, W) each."""
        import torch

        unet = self._unet
        latents = torch.cat([row.latents for row in rows]).to(unet.dtype)
        added = None
        if rows[0].said.pooled is not None:
            height, width = (8 * size for size in latents.shape[-2:])  # SDXL's VAE: 8 pixels
            size = torch.tensor([[height, width, 0, 0, height, width]], dtype=unet.dtype)
            added = {
                "text_embeds": torch.cat([row.said.pooled for row in rows]),  # type: ignore[misc]
                "time_ids": size.repeat(len(rows), 1).to(latents.device),
            }
        prediction = unet(
            latents,
            torch.tensor([row.timestep for row in rows], device=latents.device),
            encoder_hidden_states=torch.cat([row.said.context for row in rows]),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return list(torch.split(prediction, 1))


def _width(samplings: Iterable[Sampling]) -> int:
    return sum(sampling.width for sampling in samplings)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no room."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free_memory() -> None:
    """Give back what no tensor uses."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failure(recipe: Recipe, error: Exception) -> RenderError:
    """Why a picture was not made, by the exception that stopped it."""
    if is_out_of_memory(error):
        return RenderError(
            f"{recipe.width}x{recipe.height} does not fit into the device's memory; draw smaller "
            "(render.max_pixels) or on another device",
            reason="out-of-memory",
        )
    return RenderError(
        f"diffusers could not render {recipe.digest[:12]} ({recipe.sampler}, {recipe.steps} "
        f"steps): {type(error).__name__}: {error}",
        reason="render-error",
    )
