"""Solvers: from noise to latents, one evaluation of the model at a time.

A solver is asked for the model's `input`, and given its answer by `advance`, until nothing is
`left`. Most are schedulers of diffusers. Those of which diffusers has no equal are here, as
generators that read like k-diffusion's loops (``k_diffusion/sampling.py``): they yield latents with
their sigma and are sent what the model makes of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from diffagent.errors import RenderError
from diffagent.t2i.samplers import SamplerSpec
from diffagent.t2i.sigmas import Array, sigmas, timestep_of

if TYPE_CHECKING:
    import torch

    #: Yields latents with their sigma, is sent them without their noise; returns the last ones.
    Loop = Generator[tuple[torch.Tensor, float], torch.Tensor, torch.Tensor]
    #: Draws unit noise of the latents' shape.
    Draw = Callable[[], torch.Tensor]

_ZERO_SNR = "rescale_betas_zero_snr"
#: Timesteps that LCM and TCD are distilled for.
DISTILLED = 50


class Solver(Protocol):
    """Latents on their way. ``latents``: (1, C, H, W), float32; ``left``: evaluations to come."""

    latents: torch.Tensor

    @property
    def left(self) -> int:
        """Evaluations of the model that are left."""
        ...

    def input(self) -> tuple[torch.Tensor, float]:
        """The model's input for the next evaluation: scaled latents and the timestep."""
        ...

    def advance(self, prediction: torch.Tensor) -> None:
        """Go on with the model's answer to `input`, (1, C, H, W)."""
        ...


def solver_for(
    spec: SamplerSpec,
    steps: int,
    config: Mapping[str, Any],
    noise: torch.Tensor,
    generator: torch.Generator,
    *,
    sdxl: bool,
) -> Solver:
    """The solver of a sampler at its beginning.

    Args:
        spec: of the sampler.
        steps: 1 at least.
        config: of the checkpoint's scheduler.
        noise: unit noise, (1, C, H, W), on the device that draws.
        generator: of the noise that is added on the way.
        sdxl: whether the checkpoint is of Stable Diffusion XL.

    Raises:
        RenderError: reason 'unsupported-sampler'.
    """
    if spec.scheduler is None:
        raise RenderError(f"no scheduler for {spec.name!r}", reason="unsupported-sampler")
    import diffusers

    # Euler's scheduler computes the same noise of training as any other, and knows every option.
    model = _model_sigmas(diffusers.EulerDiscreteScheduler.from_config(config))
    values = None
    if spec.sigmas and (steps == 1 or not spec.exact):
        values = sigmas(spec.sigmas, steps, model, sdxl=sdxl, discard=spec.discards)
    if spec.solver in _LOOPS:
        assert values is not None, "the loops have no sigmas of their own"
        solver = _KDiffusion(spec, values, model, noise, generator)
        solver.predicts_v = config.get("prediction_type") == "v_prediction"
        return solver
    cls = getattr(diffusers, spec.scheduler)
    if config.get(_ZERO_SNR) and _ZERO_SNR not in inspect.signature(cls.__init__).parameters:
        raise RenderError(
            f"{spec.scheduler} cannot begin with pure noise, as this checkpoint must; take "
            "'Euler', 'Euler a', 'DPM++ 2M' or 'DDIM'",
            reason="unsupported-sampler",
        )
    scheduler = cls.from_config(config, **spec.options)
    _set_steps(scheduler, steps, values, model)
    return _Diffusers(scheduler, values, noise, generator)


def _model_sigmas(scheduler: Any) -> Array:
    """(T,), ascending."""
    alphas = scheduler.alphas_cumprod
    model: Array = (((1 - alphas) / alphas) ** 0.5).double().numpy()
    return model


def _set_steps(scheduler: Any, steps: int, values: Array | None, model: Array) -> None:
    """Give a scheduler its steps, on the CPU where nothing waits for them.

    Args:
        scheduler: of diffusers.
        steps: as the recipe has them.
        values: sigmas in place of its own, (n + 1,); None: its own.
        model: the model's sigmas.
    """
    import torch

    name = type(scheduler).__name__
    distilled = name in {"LCMScheduler", "TCDScheduler"}
    scheduler.set_timesteps(min(steps, DISTILLED) if distilled else steps)
    if distilled and steps > DISTILLED:  # between those that it was distilled for, as evenly
        first, last = scheduler.timesteps[0].item(), scheduler.timesteps[-1].item()
        scheduler.timesteps = torch.linspace(first, last, steps).round().long()
        scheduler.num_inference_steps = steps
    if values is not None:
        if name == "DEISMultistepScheduler":  # it cannot reach zero
            values = np.append(values[:-1], max(values[-1], model[0]))
        nodes = torch.from_numpy(values.astype(np.float32))
        finished = values[-1] == 0
        at = timestep_of(values[:-1] if finished else values, model)
        times = torch.from_numpy(at.astype(np.float32))
        if name == "HeunDiscreteScheduler":  # every node but the first is evaluated twice
            inner = nodes[1:-1] if finished else nodes[1:]
            nodes = torch.cat([nodes[:1], inner.repeat_interleave(2), nodes[-1:]])
            times = torch.cat([times[:1], times[1:].repeat_interleave(2)])
            times = times if finished else times[:-1]
        scheduler.sigmas, scheduler.timesteps = nodes, times[: len(nodes) - 1]
        scheduler.num_inference_steps = len(values) - 1
    if hasattr(scheduler, "set_begin_index"):  # a timestep may come twice, where it is looked up
        scheduler.set_begin_index(0)


class _Diffusers:
    """A scheduler of diffusers as a `Solver`."""

    def __init__(
        self,
        scheduler: Any,
        values: Array | None,
        noise: torch.Tensor,
        generator: torch.Generator,
    ) -> None:
        self._scheduler = scheduler
        self._place = 0
        takes = inspect.signature(scheduler.step).parameters
        self._options = {"generator": generator} if "generator" in takes else {}
        scale = float(scheduler.init_noise_sigma)
        if values is not None and scale == 1:  # latents that are kept at unit variance
            scale = values[0] / math.hypot(values[0], 1)
        self.latents = noise * scale

    @property
    def left(self) -> int:
        return len(self._scheduler.timesteps) - self._place

    def input(self) -> tuple[torch.Tensor, float]:
        timestep = self._scheduler.timesteps[self._place]
        return self._scheduler.scale_model_input(self.latents, timestep), float(timestep)

    def advance(self, prediction: torch.Tensor) -> None:
        timestep = self._scheduler.timesteps[self._place]
        step = self._scheduler.step(prediction, timestep, self.latents, **self._options)
        self.latents = step.prev_sample
        self._place += 1


class _KDiffusion:
    """One of `_LOOPS` as a `Solver`: latents are x = x_0 + sigma * noise."""

    def __init__(
        self,
        spec: SamplerSpec,
        values: Array,
        model: Array,
        noise: torch.Tensor,
        generator: torch.Generator,
    ) -> None:
        import torch

        def draw() -> torch.Tensor:
            return torch.randn(noise.shape, generator=generator).to(noise.device)

        self._model = model
        self.predicts_v = False
        twice = np.count_nonzero(values[1:]) if spec.second_order else 0
        self.left = len(values) - 1 + int(twice)
        self._loop = _LOOPS[spec.solver](noise * values[0], values.tolist(), draw)
        self.latents, self._sigma = next(self._loop)

    def input(self) -> tuple[torch.Tensor, float]:
        scaled = self.latents / math.hypot(self._sigma, 1)
        return scaled, float(timestep_of(self._sigma, self._model))

    def advance(self, prediction: torch.Tensor) -> None:
        sigma = self._sigma
        if self.predicts_v:
            scale = math.hypot(sigma, 1)
            denoised = self.latents / scale**2 - prediction * (sigma / scale)
        else:
            denoised = self.latents - prediction * sigma
        self.left -= 1
        try:
            self.latents, self._sigma = self._loop.send(denoised)
        except StopIteration as stop:
            self.latents = stop.value


# --- k-diffusion's loops ----------------------------------------------------------------------


def _ancestral(sigma: float, following: float) -> tuple[float, float]:
    """(down, up): the sigma to go down to, and that of the noise to add, up to ``following``."""
    up = math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
    up = min(following, up)
    return math.sqrt(following**2 - up**2), up


def _towards(x: torch.Tensor, denoised: torch.Tensor, ratio: float) -> torch.Tensor:
    """Euler's step, and the exponential integrator's: to ``ratio`` times the sigma."""
    return ratio * x + (1 - ratio) * denoised


def _dpm2(x: torch.Tensor, values: Sequence[float], draw: Draw, ancestral: bool = False) -> Loop:
    """DPM-Solver-2 (k-diffusion's ``sample_dpm_2`` and ``sample_dpm_2_ancestral``)."""
    for sigma, following in pairwise(values):
        down, up = _ancestral(sigma, following) if ancestral else (following, 0.0)
        denoised = yield x, sigma
        if following == 0:
            x = denoised
            continue
        middle = math.sqrt(sigma * down)
        halfway = _towards(x, denoised, middle / sigma)
        denoised = yield halfway, middle
        x = x + (halfway - denoised) / middle * (down - sigma)
        if ancestral:
            x = x + draw() * up
    return x


def _dpm2_ancestral(x: torch.Tensor, values: Sequence[float], draw: Draw) -> Loop:
    return (yield from _dpm2(x, values, draw, ancestral=True))


def _dpmpp_2s_ancestral(x: torch.Tensor, values: Sequence[float], draw: Draw) -> Loop:
    """DPM-Solver++(2S), ancestral (``sample_dpmpp_2s_ancestral``)."""
    for sigma, following in pairwise(values):
        denoised = yield x, sigma
        if following == 0:
            x = denoised
            continue
        down, up = _ancestral(sigma, following)
        middle = math.sqrt(sigma * down)
        denoised = yield _towards(x, denoised, middle / sigma), middle
        x = _towards(x, denoised, down / sigma) + draw() * up
    return x


def _dpmpp_sde(x: torch.Tensor, values: Sequence[float], draw: Draw) -> Loop:
    """DPM-Solver++, stochastic, with r = 1/2 (``sample_dpmpp_sde``)."""
    for sigma, following in pairwise(values):
        denoised = yield x, sigma
        if following == 0:
            x = denoised
            continue
        middle = math.sqrt(sigma * following)
        # A Brownian motion in sigma over both parts of the step: their noises are not independent.
        first, second = draw(), draw()
        share = (sigma - middle) / (sigma - following)
        whole = first * math.sqrt(share) + second * math.sqrt(1 - share)
        down, up = _ancestral(sigma, middle)
        denoised = yield _towards(x, denoised, down / sigma) + first * up, middle
        down, up = _ancestral(sigma, following)
        x = _towards(x, denoised, down / sigma) + whole * up
    return x


def _dpmpp_3m_sde(x: torch.Tensor, values: Sequence[float], draw: Draw) -> Loop:
    """DPM-Solver++(3M), stochastic (``sample_dpmpp_3m_sde``)."""
    past: list[torch.Tensor] = []  # the last two denoised, the last one first
    widths: list[float] = []  # of their steps, in log sigma
    for sigma, following in pairwise(values):
        denoised = yield x, sigma
        if following == 0:
            x = denoised
            continue
        h = math.log(sigma / following)
        x = math.exp(-2 * h) * x - math.expm1(-2 * h) * denoised
        second = math.expm1(-2 * h) / (2 * h) + 1
        if len(past) == 2:
            r0, r1 = widths[0] / h, widths[1] / h
            slope0, slope1 = (denoised - past[0]) / r0, (past[0] - past[1]) / r1
            bend = (slope0 - slope1) / (r0 + r1)
            x = x + second * (slope0 + bend * r0) - (second / (2 * h) - 0.5) * bend
        elif past:
            x = x + second * (denoised - past[0]) * (h / widths[0])
        x = x + draw() * (following * math.sqrt(-math.expm1(-2 * h)))
        past, widths = [denoised, *past][:2], [h, *widths][:2]
    return x


_LOOPS: Mapping[str, Callable[[torch.Tensor, Sequence[float], Draw], Loop]] = MappingProxyType(
    {
        "DPM2": _dpm2,
        "DPM2 a": _dpm2_ancestral,
        "DPM++ 2S a": _dpmpp_2s_ancestral,
        "DPM++ SDE": _dpmpp_sde,
        "DPM++ 3M SDE": _dpmpp_3m_sde,
    }
)
