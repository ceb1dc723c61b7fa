"""Solvers and schedules against k-diffusion, the WebUI and ComfyUI; every valid call draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from diffagent.render.diffusers.denoise import Sampling
from diffagent.render.diffusers.prompt_encoder import Conditioning
from diffagent.render.recipe import Recipe
from diffagent.t2i import sigmas as formulae
from diffagent.t2i.samplers import SAMPLERS
from tests.t2i.test_samplers import SD15_SCHEDULER

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

    def __init__(self, values: np.ndarray[Any, Any], as_comfyui: bool) -> None:
        """``as_comfyui``: with its scale of the first noise, and whole timesteps."""
        self.values = [float(value) for value in values]
        self.as_comfyui = as_comfyui
        self.generator = torch.Generator().manual_seed(5)
        self.first = torch.randn(SHAPE, generator=self.generator)

    def noise(self) -> torch.Tensor:
        return torch.randn(SHAPE, generator=self.generator).double()

    def denoised(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        below = min(max(int(np.searchsorted(MODEL, sigma, side="right")) - 1, 0), 998)
        low, high = math.log(MODEL[below]), math.log(MODEL[below + 1])
        timestep = below + min(max((math.log(sigma) - low) / (high - low), 0), 1)
        timestep = round(timestep) if self.as_comfyui else timestep
        return x - sigma * unet((x / math.sqrt(sigma**2 + 1)).float(), timestep).double()

    def draw(self, loop: Callable[[Reference, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        start = self.values[0]
        scale = math.hypot(start, 1) if self.as_comfyui else start
        return loop(self, self.first.double() * scale)


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

    def weight(tau: float, i: int, j: int, order: int) -> float:
        """Of the j-th last slope: Lagrange's polynomial over the last ones."""
        return math.prod(
            (tau - r.values[i - k]) / (r.values[i - j] - r.values[i - k])
            for k in range(order)
            if k != j
        )

    for i, sigma in enumerate(r.values[:-1]):
        slopes = [(x - r.denoised(x, sigma)) / sigma, *slopes][:4]
        for j, slope in enumerate(slopes):
            args = (i, j, len(slopes))
            x = x + slope * integrate.quad(weight, sigma, r.values[i + 1], args, epsrel=1e-4)[0]
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
        upper = r.noise() * math.sqrt(sigma - middle)
        lower = r.noise() * math.sqrt(middle - following)
        down, up = ancestral_step(sigma, middle)
        halfway = down / sigma * x - math.expm1(t + math.log(down)) * denoised
        halfway = halfway + upper / math.sqrt(sigma - middle) * up
        denoised = r.denoised(halfway, middle)
        down, up = ancestral_step(sigma, following)
        x = down / sigma * x - math.expm1(t + math.log(down)) * denoised
        x = x + (upper + lower) / math.sqrt(sigma - following) * up
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
    for steps in (1, 2, 3, 7, 16):
        n = steps + (spec.solver in {"DPM2", "DPM2 a", "DPM++ 3M SDE"})
        values = formulae.sigmas(spec.schedule or "Uniform", n, MODEL, sdxl=False)
        values = values if n == steps else np.delete(values, -2)
        reference = Reference(values, as_comfyui=multistep and spec.exact and steps > 1)
        expected = reference.draw(LOOPS[spec.solver])
        drawn = draw(sampling(name, steps)).double()
        if multistep:  # latents of unit variance
            drawn = drawn * math.hypot(values[-1], 1)
        error = ((drawn - expected).abs().max() / expected.abs().max()).item()
        assert error < (2e-4 if spec.solver == "LMS" else 1e-5), (steps, error)


def test_v_prediction_and_pure_noise() -> None:
    """The same picture, whether the model says the noise or the velocity of the same picture."""
    for solver in ("Euler", "DPM++ 2M", "DPM2", "DPM++ SDE", "DPM++ 3M SDE"):
        by_noise = sampling(f"{solver} Simple", 5)
        by_velocity = sampling(f"{solver} Simple", 5, prediction_type="v_prediction")
        while not by_noise.done:
            (row,), (same,) = by_noise.rows(), by_velocity.rows()
            torch.testing.assert_close(row.latents, same.latents, rtol=1e-4, atol=1e-4)
            noise = unet(row.latents, row.timestep)
            sigma = float(np.exp(np.interp(row.timestep, np.arange(1000), np.log(MODEL))))
            alpha = 1 / math.hypot(sigma, 1)
            by_noise.advance([noise])
            # x = alpha x0 + sigma alpha noise, v = alpha noise - sigma alpha x0
            start = (same.latents - sigma * alpha * noise) / alpha
            by_velocity.advance([alpha * noise - sigma * alpha * start])
    for solver in ("DPM2", "DPM2 a", "DPM++ 2S a", "DPM++ SDE", "DPM++ 3M SDE"):
        assert draw(sampling(f"{solver} Karras", 4, rescale_betas_zero_snr=True)).isfinite().all()


# --- schedules, written down from the programs' formulae --------------------------------------


def at(timestep: float) -> float:
    """The sigma of a timestep, linear in log sigma."""
    low = min(int(timestep), 998)
    share = timestep - low
    return math.exp((1 - share) * math.log(MODEL[low]) + share * math.log(MODEL[low + 1]))


def naive(schedule: str, n: int) -> list[float]:  # noqa: PLR0912  one a schedule
    """The WebUI's, Forge's and ComfyUI's schedules, one value after the other."""
    least, most = float(MODEL[0]), float(MODEL[-1])
    match schedule:
        case "Uniform":
            values = [at(999 - 999 * i / max(n - 1, 1)) for i in range(n)]
        case "SGM Uniform":
            values = [at(999 - 999 * i / n) for i in range(n)]
        case "Simple":
            values = [float(MODEL[-(1 + int(i * (1000 / n)))]) for i in range(n)]
        case "DDIM Uniform":
            values, place = [], 1
            while place < 1000:
                values.insert(0, float(MODEL[place]))
                place += max(1000 // n, 1)
        case "Karras":
            ends = most ** (1 / 7), least ** (1 / 7)
            shares = [i / max(n - 1, 1) for i in range(n)]
            values = [(ends[0] + share * (ends[1] - ends[0])) ** 7 for share in shares]
        case "Exponential":
            values = [most * (least / most) ** (i / max(n - 1, 1)) for i in range(n)]
        case "Beta":
            quantiles = [quantile(1 - i / max(n - 1, 1)) for i in range(n)]
            values = [least + share * (most - least) for share in quantiles]
        case "Beta (ComfyUI)":
            places = [round(quantile(1 - i / n) * 999) for i in range(n)]
            values = [float(MODEL[place]) for place in dict.fromkeys(places)]
        case "KL Optimal":
            ends = math.atan(most), math.atan(least)
            return [math.tan(ends[0] + i / n * (ends[1] - ends[0])) for i in range(n + 1)]
        case "KL Optimal (ComfyUI)":
            ends = math.atan(most), math.atan(least)
            values = [math.tan(ends[0] + i / max(n - 1, 1) * (ends[1] - ends[0])) for i in range(n)]
        case "Linear Quadratic":
            values = [most * (1 - value) for value in mochi(n)]
        case "Turbo":
            values = [float(MODEL[round((n - i) * 1000 / n - 1)]) for i in range(n)]
        case _:
            raise AssertionError(schedule)
    return [*values, 0.0]


def quantile(share: float) -> float:
    from scipy import special

    return float(special.betaincinv(0.6, 0.6, share))


def mochi(n: int) -> list[float]:
    if n == 1:
        return [0.0]
    half, threshold = n // 2, 0.025
    rest, gap = n - half, half - threshold * n
    a, b = gap / (half * rest**2), threshold / half - 2 * gap / rest**2
    return [i * threshold / half for i in range(half)] + [
        a * i**2 + b * i + a * half**2 for i in range(half, n)
    ]


@pytest.mark.parametrize("schedule", [s for s in formulae.SCHEDULES if not s.startswith("Align")])
def test_sigmas_are_those_of_the_program_that_the_schedule_is_of(schedule: str) -> None:
    for n in (1, 2, 3, 4, 5, 10, 20, 25, 33, 50, 77, 150):
        values = formulae.sigmas(schedule, n, MODEL, sdxl=False)
        np.testing.assert_allclose(values, naive(schedule, n), rtol=1e-5, atol=1e-7)
        name = f"Euler a {schedule}".removesuffix(" Uniform" if schedule == "Uniform" else "")
        drawn_with = sampling(name, n)._solver._scheduler.sigmas  # type: ignore[attr-defined]
        np.testing.assert_allclose(drawn_with, values, rtol=1e-3, atol=1e-7)


def test_align_your_steps() -> None:
    """The published tables where they have as many steps, and linear in log sigma between."""
    for name, n, sdxl, values in (
        ("Align Your Steps", 11, False, [14.615, 6.475, 3.861, 2.697, 1.886, 1.396]),
        ("Align Your Steps", 11, True, [14.615, 6.315, 3.771, 2.181, 1.342, 0.862]),
        ("Align Your Steps GITS", 11, False, [14.615, 4.617, 2.507, 1.236, 0.702, 0.402]),
        ("Align Your Steps GITS", 11, True, [14.615, 4.734, 2.567, 1.529, 0.987, 0.652]),
        ("Align Your Steps 32", 32, False, [14.615, 11.2395, 8.6436, 6.6473, 5.5725, 4.7165]),
        ("Align Your Steps 32", 32, True, [14.615, 11.1492, 8.5052, 6.4883, 5.4371, 4.604]),
    ):
        table = formulae.sigmas(name, n, MODEL, sdxl=sdxl)
        np.testing.assert_allclose(table[:6], values, rtol=1e-4)
        doubled = formulae.sigmas(name, 2 * n - 1, MODEL, sdxl=sdxl)
        np.testing.assert_allclose(doubled[:-1:2], table[:-1])
        np.testing.assert_allclose(doubled[1:-1:2], np.sqrt(table[:-2] * table[1:-1]))
        by_family = [sampling(f"Euler {name}", n, family=f).rows()[0] for f in ("sd1", "sdxl")]
        assert by_family[0].timestep == by_family[1].timestep
    shown = [
        sampling("Euler Align Your Steps", 11, family=family)._solver._scheduler.sigmas[1].item()  # type: ignore[attr-defined]
        for family in ("sd1", "sdxl")
    ]
    assert shown == pytest.approx([6.475, 6.315])


def test_simple_is_not_normal_nor_sgm_uniform() -> None:
    four = {
        name: formulae.sigmas(name, 4, MODEL, sdxl=False)[:4].round(2).tolist()
        for name in ("Simple", "Uniform", "SGM Uniform", "DDIM Uniform")
    }
    assert four["Simple"] == [14.61, 4.08, 1.61, 0.69]
    assert four["Uniform"] == [14.61, 2.92, 0.93, 0.03]
    assert four["SGM Uniform"] == [14.61, 4.09, 1.62, 0.7]
    assert four["DDIM Uniform"] == [4.12, 1.62, 0.7, 0.04]


# --- every valid call draws -------------------------------------------------------------------


@pytest.mark.parametrize("name", RENDERABLE)
def test_every_valid_call_draws(name: str) -> None:
    """At the ends of the range of steps, and where a scheduler's own limits lie."""
    many = () if SAMPLERS[name].solver == "LMS" else (51, 150)  # each of its steps takes long
    for steps in (1, 2, 20, 33, *many):
        item = sampling(name, steps, shape=(1, 1, 2, 2))
        count = 0
        while not item.done:
            (row,) = item.rows()
            assert 0 <= row.timestep <= 999
            item.advance([torch.tanh(row.latents)])
            count += 1
        assert item.latents.isfinite().all(), steps
        # Duplicates fall together in ComfyUI's beta; DDIM Uniform has a step for every remainder.
        assert count >= (steps * 2 / 3 if "Beta (ComfyUI)" in name else steps), (steps, count)


def test_every_number_of_steps_has_its_sigmas() -> None:
    for schedule in formulae.SCHEDULES:
        for discard in (False, True):
            for n in range(1, 151):
                values = formulae.sigmas(schedule, n, MODEL, sdxl=True, discard=discard)
                assert np.isfinite(values).all(), (schedule, n)
                assert (np.diff(values) < 0).all(), (schedule, n)
    for name in RENDERABLE:
        if SAMPLERS[name].exact:  # by diffusers' own rules
            for steps in (*range(1, 12), *range(12, 151, 9), 149, 150):
                assert sampling(name, steps, shape=(1, 1, 1, 1)).left >= steps
