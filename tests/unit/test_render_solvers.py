"""Solvers and schedules against k-diffusion, the WebUI and ComfyUI, and every call that is valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from diffagent.errors import RenderError
from diffagent.render import sigmas as formulae
from diffagent.render.denoise import Sampling
from diffagent.render.prompts import Conditioning
from diffagent.render.recipe import Recipe
from diffagent.render.samplers import SAMPLERS, normalise
from tests.unit.test_render_samplers import SD15_SCHEDULER

SHAPE = (1, 4, 8, 8)
NOTHING = Conditioning(torch.zeros(1, 77, 4))
RENDERABLE = [name for name, spec in SAMPLERS.items() if spec.renderable]


def sampling(
    sampler: str, steps: int, *, shape: Any = SHAPE, family: str = "sd1", **config: Any
) -> Sampling:
    recipe = Recipe(
        prompt="",
        negative_prompt="",
        checkpoint="a" * 64,
        sampler=sampler,
        steps=steps,
        cfg_scale=1,
        width=64,
        height=64,
        clip_skip=1,
        seed=5,
    )
    return Sampling(
        recipe, {**SD15_SCHEDULER, **config}, (NOTHING, NOTHING), shape, torch.device("cpu"), family
    )


def model_sigmas() -> np.ndarray[Any, Any]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return (((1 - alphas) / alphas) ** 0.5).double().numpy()


MODEL = model_sigmas()


def unet(scaled: torch.Tensor, timestep: float) -> torch.Tensor:
    """A "model" whose answer depends on all that it is asked."""
    return torch.tanh(scaled * 1.3 + 0.1 * scaled.roll(1, -1)) * (0.5 + timestep / 2000)


def draw(item: Sampling) -> torch.Tensor:
    while not item.done:
        (row,) = item.rows()
        item.advance([unet(row.latents, row.timestep)])
    return item.latents


# --- k-diffusion, written down from its formulae ----------------------------------------------


class Reference:
    """k-diffusion's denoiser around `unet`, its loops, and the noise that a picture draws."""

    def __init__(self, values: np.ndarray[Any, Any], rounded: bool) -> None:
        self.values = [float(value) for value in values]
        self.rounded = rounded
        self.generator = torch.Generator().manual_seed(5)
        self.first = torch.randn(SHAPE, generator=self.generator)

    def noise(self) -> torch.Tensor:
        return torch.randn(SHAPE, generator=self.generator).double()

    def denoised(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        below = min(max(int(np.searchsorted(MODEL, sigma, side="right")) - 1, 0), 998)
        low, high = math.log(MODEL[below]), math.log(MODEL[below + 1])
        timestep = below + min(max((math.log(sigma) - low) / (high - low), 0), 1)
        timestep = round(timestep) if self.rounded else timestep
        return x - sigma * unet((x / math.sqrt(sigma**2 + 1)).float(), timestep).double()

    def draw(self, loop: Callable[[Reference, torch.Tensor], torch.Tensor], vp: bool) -> Any:
        start, end = self.values[0], self.values[-1]
        scale = math.hypot(start, 1) if vp and start > MODEL[-1] * 0.9999 else start
        return loop(self, self.first.double() * scale) / (math.hypot(end, 1) if vp else 1)


def ancestral_step(sigma: float, following: float) -> tuple[float, float]:
    up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
    return (following**2 - up**2) ** 0.5, up


def euler(r: Reference, x: torch.Tensor, ancestral: bool = False) -> torch.Tensor:
    for sigma, following in pairwise(r.values):
        down, up = ancestral_step(sigma, following) if ancestral else (following, 0.0)
        x = x + (x - r.denoised(x, sigma)) / sigma * (down - sigma)
        if ancestral:
            x = x + r.noise() * up
    return x


def heun(r: Reference, x: torch.Tensor) -> torch.Tensor:
    for sigma, following in pairwise(r.values):
        slope = (x - r.denoised(x, sigma)) / sigma
        end = x + slope * (following - sigma)
        if following:
            slope = (slope + (end - r.denoised(end, following)) / following) / 2
        x = x + slope * (following - sigma)
    return x


def lms(r: Reference, x: torch.Tensor) -> torch.Tensor:
    from scipy import integrate

    slopes: list[torch.Tensor] = []
    for i, sigma in enumerate(r.values[:-1]):
        slopes = [(x - r.denoised(x, sigma)) / sigma, *slopes][:4]
        for j, slope in enumerate(slopes):

            def weight(tau: float, i: int = i, j: int = j) -> float:
                others = [k for k in range(len(slopes)) if k != j]
                return math.prod(
                    (tau - r.values[i - k]) / (r.values[i - j] - r.values[i - k]) for k in others
                )

            x = x + slope * integrate.quad(weight, sigma, r.values[i + 1], epsrel=1e-4)[0]
    return x


def dpm2(r: Reference, x: torch.Tensor, ancestral: bool = False) -> torch.Tensor:
    for sigma, following in pairwise(r.values):
        down, up = ancestral_step(sigma, following) if ancestral else (following, 0.0)
        slope = (x - r.denoised(x, sigma)) / sigma
        if down == 0:
            x = x + slope * (down - sigma)
            continue
        middle = math.exp((math.log(sigma) + math.log(down)) / 2)
        halfway = x + slope * (middle - sigma)
        x = x + (halfway - r.denoised(halfway, middle)) / middle * (down - sigma)
        if ancestral:
            x = x + r.noise() * up
    return x


def dpmpp_2s_ancestral(r: Reference, x: torch.Tensor) -> torch.Tensor:
    for sigma, following in pairwise(r.values):
        denoised = r.denoised(x, sigma)
        if following == 0:
            return denoised
        down, up = ancestral_step(sigma, following)
        t, t_next = -math.log(sigma), -math.log(down)
        h = t_next - t
        halfway = math.exp(-h / 2) * x - math.expm1(-h / 2) * denoised
        denoised = r.denoised(halfway, math.exp(-(t + h / 2)))
        x = math.exp(-h) * x - math.expm1(-h) * denoised + r.noise() * up
    return x


def dpmpp_sde(r: Reference, x: torch.Tensor) -> torch.Tensor:
    for sigma, following in pairwise(r.values):
        denoised = r.denoised(x, sigma)
        if following == 0:
            return denoised
        t, t_next = -math.log(sigma), -math.log(following)
        middle = math.exp(-(t + t_next) / 2)
        # Increments of a Brownian motion in sigma: from sigma to the middle, and on from there.
        one = r.noise() * math.sqrt(sigma - middle)
        two = r.noise() * math.sqrt(middle - following)
        down, up = ancestral_step(sigma, middle)
        halfway = down / sigma * x - math.expm1(t + math.log(down)) * denoised
        halfway = halfway + one / math.sqrt(sigma - middle) * up
        denoised = r.denoised(halfway, middle)
        down, up = ancestral_step(sigma, following)
        x = down / sigma * x - math.expm1(t + math.log(down)) * denoised
        x = x + (one + two) / math.sqrt(sigma - following) * up
    return x


def dpmpp_2m(r: Reference, x: torch.Tensor) -> torch.Tensor:
    old, h_last = None, 0.0
    for sigma, following in pairwise(r.values):
        denoised = r.denoised(x, sigma)
        if following == 0:
            return denoised
        h = math.log(sigma) - math.log(following)
        step = denoised
        if old is not None:
            step = (1 + h / (2 * h_last)) * denoised - h / (2 * h_last) * old
        x = following / sigma * x - math.expm1(-h) * step
        old, h_last = denoised, h
    return x


def dpmpp_2m_sde(r: Reference, x: torch.Tensor, like_heun: bool = False) -> torch.Tensor:
    old, h_last = None, 0.0
    for sigma, following in pairwise(r.values):
        denoised = r.denoised(x, sigma)
        if following == 0:
            return denoised
        h = math.log(sigma) - math.log(following)
        x = following / sigma * math.exp(-h) * x - math.expm1(-2 * h) * denoised
        if old is not None:
            factor = -math.expm1(-2 * h) / (-2 * h) + 1 if like_heun else -math.expm1(-2 * h) / 2
            x = x + factor * h / h_last * (denoised - old)
        x = x + r.noise() * following * math.sqrt(-math.expm1(-2 * h))
        old, h_last = denoised, h
    return x


def dpmpp_3m_sde(r: Reference, x: torch.Tensor) -> torch.Tensor:
    d1 = d2 = None
    h1 = h2 = 0.0
    for sigma, following in pairwise(r.values):
        denoised = r.denoised(x, sigma)
        if following == 0:
            return denoised
        h = math.log(sigma) - math.log(following)
        h_eta = 2 * h
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        phi_3 = phi_2 / h_eta - 0.5
        if d2 is not None:
            assert d1 is not None
            r0, r1 = h1 / h, h2 / h
            first = (denoised - d1) / r0
            second = (d1 - d2) / r1
            slope = first + (first - second) * r0 / (r0 + r1)
            x = x + phi_2 * slope - phi_3 * (first - second) / (r0 + r1)
        elif d1 is not None:
            x = x + phi_2 * (denoised - d1) / (h1 / h)
        x = x + r.noise() * following * math.sqrt(-math.expm1(-2 * h))
        d1, d2, h1, h2 = denoised, d1, h, h1
    return x


LOOPS: dict[str, Callable[[Reference, torch.Tensor], torch.Tensor]] = {
    "Euler": euler,
    "Euler a": lambda r, x: euler(r, x, ancestral=True),
    "Heun": heun,
    "LMS": lms,
    "DPM2": dpm2,
    "DPM2 a": lambda r, x: dpm2(r, x, ancestral=True),
    "DPM++ 2S a": dpmpp_2s_ancestral,
    "DPM++ SDE": dpmpp_sde,
    "DPM++ 2M": dpmpp_2m,
    "DPM++ 2M SDE": dpmpp_2m_sde,
    "DPM++ 2M SDE Heun": lambda r, x: dpmpp_2m_sde(r, x, like_heun=True),
    "DPM++ 3M SDE": dpmpp_3m_sde,
}


def kdiffusion_names() -> Iterator[str]:
    for name in RENDERABLE:
        if SAMPLERS[name].solver in LOOPS:
            yield name


@pytest.mark.parametrize("name", kdiffusion_names())
def test_pictures_are_those_of_k_diffusion(name: str) -> None:
    """Sigmas by the program's formula, the loop of k-diffusion, the same noise: the same latents.

    The next-to-last sigma is left out where the WebUI does so.
    """
    spec = SAMPLERS[name]
    multistep = spec.scheduler == "DPMSolverMultistepScheduler" and spec.solver != "DPM++ 3M SDE"
    for steps in (1, 2, 3, 7, 12, 20):
        n = steps + (spec.solver in {"DPM2", "DPM2 a", "DPM++ 3M SDE"})
        values = formulae.sigmas(spec.schedule or "Uniform", n, MODEL, sdxl=False)
        values = values if n == steps else np.delete(values, -2)
        reference = Reference(values, rounded=multistep and spec.schedule == "Karras")
        expected = reference.draw(LOOPS[spec.solver], vp=multistep)
        drawn = draw(sampling(name, steps)).double()
        error = ((drawn - expected).abs().max() / expected.abs().max()).item()
        print(name, steps, error)
        assert error < 2e-4, (steps, error)
