"""Noise schedules: the sigmas of a number of steps, by the formulae of the WebUI and of ComfyUI.

The formulae are those of AUTOMATIC1111's and Forge's ``modules/sd_schedulers.py``, of ComfyUI's
``comfy/samplers.py`` and of k-diffusion. Where the two programs give one name to two formulae
(beta, kl_optimal), ComfyUI's has its name in parentheses. Computed in float64; the programs
compute in float32, so equal to its rounding.

A model's own sigmas are ``(T,)``, ascending, one a training timestep. A schedule is ``(n + 1,)``,
descending, the last zero unless its formula ends above it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def timestep_of(sigma: Array | float, model: Array) -> Array:
    """The timestep of a sigma, a fraction where it lies between two; linear in log sigma."""
    return np.interp(np.log(sigma), np.log(model), np.arange(len(model)))


def _sigma_of(timestep: Array, model: Array) -> Array:
    return np.exp(np.interp(timestep, np.arange(len(model)), np.log(model)))


def _uniform(n: int, model: Array) -> Array:
    """k-diffusion's ``get_sigmas``; the WebUI's Uniform and Normal, ComfyUI's normal."""
    return _sigma_of(np.linspace(len(model) - 1, 0, n), model)


def _sgm_uniform(n: int, model: Array) -> Array:
    return _sigma_of(np.linspace(len(model) - 1, 0, n + 1)[:-1], model)


def _karras(n: int, model: Array) -> Array:
    """Karras et al. 2022 (arXiv 2206.00364), equation 5, with rho = 7."""
    least, most = model[0] ** (1 / 7), model[-1] ** (1 / 7)
    values: Array = (most + np.linspace(0, 1, n) * (least - most)) ** 7
    return values


def _exponential(n: int, model: Array) -> Array:
    return np.exp(np.linspace(np.log(model[-1]), np.log(model[0]), n))


def _simple(n: int, model: Array) -> Array:
    places = (np.arange(n) * (len(model) / n)).astype(int)
    values: Array = model[-1 - places]
    return values


def _ddim_uniform(n: int, model: Array) -> Array:
    """Every (T // n)-th from the second on: more than n where n does not divide T."""
    return model[1 :: max(len(model) // n, 1)][::-1]


def _quantiles(shares: Array) -> Array:
    """Of the beta distribution that both programs take (arXiv 2407.12173)."""
    from scipy import stats

    quantiles: Array = stats.beta.ppf(shares, 0.6, 0.6)
    return quantiles


def _beta(n: int, model: Array) -> Array:
    """The WebUI's and Forge's: the distribution of the sigmas."""
    values: Array = model[0] + _quantiles(1 - np.linspace(0, 1, n)) * (model[-1] - model[0])
    return values


def _beta_comfyui(n: int, model: Array) -> Array:
    """ComfyUI's, as in the paper: the distribution of the timesteps, each once."""
    shares = 1 - np.linspace(0, 1, n, endpoint=False)
    places = np.rint(_quantiles(shares) * (len(model) - 1)).astype(int)
    values: Array = model[np.unique(places)[::-1]]
    return values


def _kl_optimal(n: int, model: Array) -> Array:
    """The WebUI's and Forge's: n + 1 values, down to the model's least and not to zero."""
    least, most = np.arctan(model[0]), np.arctan(model[-1])
    shares = np.arange(n + 1) / n
    values: Array = np.tan(shares * least + (1 - shares) * most)
    return values


def _kl_optimal_comfyui(n: int, model: Array) -> Array:
    return _kl_optimal(n - 1, model) if n > 1 else model[-1:]


def _linear_quadratic(n: int, model: Array) -> Array:
    """ComfyUI's, from Mochi: a straight half down to 97.5 % of the greatest, then a parabola."""
    if n == 1:
        return model[-1:]
    threshold, straight = 0.025, n // 2
    bent, missing = n - straight, straight - threshold * n
    square = missing / (straight * bent**2)
    slope = threshold / straight - 2 * missing / bent**2
    i = np.arange(n, dtype=np.float64)
    parabola = square * i**2 + slope * i + square * straight**2
    values: Array = (1 - np.where(i < straight, i * threshold / straight, parabola)) * model[-1]
    return values


def _turbo(n: int, model: Array) -> Array:
    """Forge's."""
    places = np.clip(np.rint(np.arange(n, 0, -1) * (1000 / n) - 1), 0, len(model) - 1)
    values: Array = model[places.astype(int)]
    return values


def _log_linear(values: str, n: int) -> Array:
    """The WebUI's interpolation of a table: linear in log sigma, of the last one for one step."""
    table = np.array(values.split(), dtype=np.float64)[::-1]
    places = np.linspace(0, 1, len(table))
    return np.exp(np.interp(np.linspace(0, 1, n), places, np.log(table)))[::-1]


#: Tables of Align Your Steps (arXiv 2404.14507) and GITS (arXiv 2405.11326) as the WebUI and Forge
#: have them: of Stable Diffusion 1.x and 2.x, and of XL.
_TABLES: Mapping[str, tuple[str, str]] = {
    "Align Your Steps": (
        "14.615 6.475 3.861 2.697 1.886 1.396 0.963 0.652 0.399 0.152 0.029",
        "14.615 6.315 3.771 2.181 1.342 0.862 0.555 0.380 0.234 0.113 0.029",
    ),
    "Align Your Steps GITS": (
        "14.615 4.617 2.507 1.236 0.702 0.402 0.240 0.156 0.104 0.094 0.029",
        "14.615 4.734 2.567 1.529 0.987 0.652 0.418 0.268 0.179 0.127 0.029",
    ),
    "Align Your Steps 32": (
        "14.615 11.23951352 8.64363081 6.64729424 5.57250862 4.71648546 3.99196065 3.5195609 "
        "3.13490466 2.79228788 2.48773628 2.21663865 1.97508351 1.7793172 1.61475335 1.46540953 "
        "1.314849 1.16642497 1.03475547 0.91573744 0.80748169 0.71202361 0.621739 0.53065202 "
        "0.4529096 0.37491455 0.27461819 0.2011529 0.14105873 0.06682881 0.03166121 0.015",
        "14.615 11.1491618 8.50522127 6.48827151 5.43707402 4.60398619 3.89854704 3.27407457 "
        "2.74396527 2.29968659 1.95448514 1.67108715 1.42878152 1.23181009 1.06789649 0.92579443 "
        "0.80290886 0.69660121 0.60436903 0.52852552 0.46773344 0.41393379 0.36258186 0.31008517 "
        "0.26518925 0.22326461 0.17653877 0.13959192 0.10587381 0.05519369 0.02877334 0.015",
    ),
}

_FORMULAE: Mapping[str, Callable[[int, Array], Array]] = MappingProxyType(
    {
        "Uniform": _uniform,
        "Karras": _karras,
        "Exponential": _exponential,
        "SGM Uniform": _sgm_uniform,
        "Simple": _simple,
        "DDIM Uniform": _ddim_uniform,
        "Beta": _beta,
        "Beta (ComfyUI)": _beta_comfyui,
        "KL Optimal": _kl_optimal,
        "KL Optimal (ComfyUI)": _kl_optimal_comfyui,
        "Linear Quadratic": _linear_quadratic,
        "Turbo": _turbo,
    }
)

#: Names of all schedules.
SCHEDULES = (*_FORMULAE, *_TABLES)
#: Schedules that do not end at zero.
UNFINISHED = frozenset({"KL Optimal"})


def sigmas(schedule: str, n: int, model: Array, *, sdxl: bool, discard: bool = False) -> Array:
    """The sigmas of ``n`` steps.

    Args:
        schedule: one of `SCHEDULES`.
        n: steps, 1 at least. DDIM Uniform and ComfyUI's beta may give other numbers of steps.
        model: the model's own sigmas, ``(T,)``, ascending.
        sdxl: whether the model is of Stable Diffusion XL, for which some tables are another.
        discard: whether the next-to-last of n + 1 steps is left out, as for DPM2.

    Returns:
        ``(m + 1,)``, descending, for m steps.
    """
    if discard:
        longer = sigmas(schedule, n + 1, model, sdxl=sdxl)
        return np.delete(longer, -2)
    if schedule in _TABLES:
        values = _log_linear(_TABLES[schedule][sdxl], n)
    else:
        values = _FORMULAE[schedule](n, model)
    return values if schedule in UNFINISHED else np.append(values, 0.0)
