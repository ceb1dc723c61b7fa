"""Sampler names: every spelling that records carry, one canonical name, one diffusers scheduler.

The canonical name is AUTOMATIC1111's up to version 1.8 (solver and noise schedule in one name,
``DPM++ 2M Karras``), because that is what almost all public records say. Later versions give the
schedule apart (``Schedule type: Karras``), ComfyUI has names of its own (``dpmpp_2m`` and
``karras``), InvokeAI too (``k_euler_a``). `normalise` reads them all.

The schedulers follow the table of diffusers (issue 4167 there, and its "Schedulers" page). Where
diffusers has no equal of a sampler, `SamplerSpec.note` says what stands in for it, or the
sampler is not renderable. k-diffusion spaces its timesteps evenly over the whole range, hence
``timestep_spacing="linspace"``; DDIM and PLMS use "leading" with offset 1, as the WebUI does.
Nothing here imports diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class SamplerSpec:
    """How a sampler is run.

    ``scheduler`` is the diffusers class that is built with
    ``from_config(pipeline.scheduler.config, **options)``; None when nothing comes near.
    ``steps_multiplier`` converts the WebUI's steps to diffusers': a step of DPM++ SDE evaluates
    the model twice there, while one of ``DPMSolverSinglestepScheduler`` evaluates it once.
    ``note`` is empty when the algorithm is the same. ``solver`` and ``schedule`` are the two
    parts of the name; the schedule is empty when it is uniform in time.
    """

    name: str
    scheduler: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps_multiplier: int = 1
    note: str = ""
    solver: str = ""
    schedule: str = ""

    @property
    def renderable(self) -> bool:
        """Whether diffusers has this sampler or a stand-in for it."""
        return self.scheduler is not None


_LINSPACE = {"timestep_spacing": "linspace"}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
_PP_2M_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, **_LINSPACE}
_PP_SINGLE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "lower_order_final": True}
# Down to the first training step, not to zero: as in the WebUI, and bh1 divides by zero there.
_UNIPC = {"solver_order": 3, "final_sigmas_type": "sigma_min", **_LINSPACE}
_NO_SIGMAS = "diffusers has no {schedule} sigmas for this solver; its default schedule is used"

#: Schedule of the WebUI -> options of diffusers. The empty one is uniform in time.
_SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Beta": {"use_beta_sigmas": True},
}


@dataclass(frozen=True)
class _Solver:
    """A solver without its schedule; ``automatic`` is the WebUI's schedule when told nothing."""

    scheduler: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    supports: tuple[str, ...] = ("Karras", "Exponential", "SGM Uniform", "Beta")
    scheduled: bool = True  # False: the WebUI ignores the schedule
    automatic: str = ""
    steps_multiplier: int = 1
    note: str = ""


_SIGMAS_ONLY = ("Karras", "Exponential", "Beta")
_SOLVERS: Mapping[str, _Solver] = {
    "Euler": _Solver("EulerDiscreteScheduler", _LINSPACE),
    "Euler a": _Solver("EulerAncestralDiscreteScheduler", _LINSPACE, ("SGM Uniform",)),
    "Heun": _Solver("HeunDiscreteScheduler", _LINSPACE),
    "LMS": _Solver("LMSDiscreteScheduler", _LINSPACE),
    "DPM2": _Solver("KDPM2DiscreteScheduler", _LINSPACE, automatic="Karras"),
    "DPM2 a": _Solver("KDPM2AncestralDiscreteScheduler", _LINSPACE, automatic="Karras"),
    "DPM++ 2M": _Solver(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, **_LINSPACE},
        automatic="Karras",
    ),
    "DPM++ 2M SDE": _Solver("DPMSolverMultistepScheduler", _PP_2M_SDE, automatic="Exponential"),
    "DPM++ 2M SDE Heun": _Solver(
        "DPMSolverMultistepScheduler",
        {**_PP_2M_SDE, "solver_type": "heun"},
        automatic="Exponential",
    ),
    "DPM++ 3M SDE": _Solver(
        "DPMSolverMultistepScheduler",
        {**_PP_2M_SDE, "solver_order": 3},
        automatic="Exponential",
    ),
    "DPM++ SDE": _Solver(
        "DPMSolverSinglestepScheduler",
        _PP_SINGLE,
        _SIGMAS_ONLY,
        automatic="Karras",
        steps_multiplier=2,
        note="singlestep SDE solver with independent noise; the WebUI draws a Brownian tree",
    ),
    "DPM++ 2S a": _Solver(
        "DPMSolverSinglestepScheduler",
        _PP_SINGLE,
        _SIGMAS_ONLY,
        automatic="Karras",
        steps_multiplier=2,
        note="diffusers has no ancestral 2S; its singlestep SDE solver stands in",
    ),
    "DPM fast": _Solver(
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 3, "lower_order_final": True},
        scheduled=False,
        note="third-order singlestep solver, without the noise that the WebUI adds",
    ),
    "DPM adaptive": _Solver(
        None, scheduled=False, note="chooses its own steps; diffusers has no adaptive solver"
    ),
    "Restart": _Solver(None, automatic="Karras", note="diffusers has no restart sampler"),
    "Heun++": _Solver(None, note="diffusers has no Heun++"),
    "DDIM": _Solver("DDIMScheduler", {**_LEADING, "clip_sample": False}, scheduled=False),
    "DDPM": _Solver("DDPMScheduler", {**_LINSPACE, "clip_sample": False}, scheduled=False),
    "PLMS": _Solver("PNDMScheduler", {**_LEADING, "skip_prk_steps": True}, scheduled=False),
    "UniPC": _Solver(
        "UniPCMultistepScheduler",
        {"solver_type": "bh1", **_UNIPC},
        scheduled=False,
    ),
    "UniPC BH2": _Solver(
        "UniPCMultistepScheduler",
        {"solver_type": "bh2", **_UNIPC},
        scheduled=False,
    ),
    "DEIS": _Solver("DEISMultistepScheduler", {**_LINSPACE, "solver_order": 3}, _SIGMAS_ONLY),
    # ComfyUI's, for which diffusers has no equal; a record with one is read, and not rendered.
    **{
        name: _Solver(None, note=f"diffusers has no {name}")
        for name in (
            *("Euler CFG++", "Euler a CFG++", "DPM++ 2M CFG++", "DPM++ 2S a CFG++", "ER SDE"),
            *("Res Multistep", "Res Multistep a", "Gradient Estimation", "SA Solver"),
            *("iPNDM", "iPNDM V", "SEEDS 2", "SEEDS 3"),
        )
    },
    "LCM": _Solver("LCMScheduler", {"clip_sample": False}, scheduled=False),
    "TCD": _Solver("TCDScheduler", {"clip_sample": False}, scheduled=False),
}


def _specs() -> Iterator[SamplerSpec]:
    for name, solver in _SOLVERS.items():
        for schedule, options in _SCHEDULES.items():
            if schedule and not solver.scheduled:
                continue
            native = not schedule or schedule in solver.supports
            notes = [solver.note, "" if native else _NO_SIGMAS.format(schedule=schedule)]
            yield SamplerSpec(
                name=f"{name} {schedule}".rstrip(),
                scheduler=solver.scheduler,
                options=MappingProxyType({**solver.options, **(options if native else {})}),
                steps_multiplier=solver.steps_multiplier,
                note="; ".join(filter(None, notes)) if solver.scheduler else solver.note,
                solver=name,
                schedule=schedule,
            )


#: Canonical name -> how it is run. Immutable.
SAMPLERS: Mapping[str, SamplerSpec] = MappingProxyType({spec.name: spec for spec in _specs()})

#: What is not a spelling of the canonical name, after `_key`: other programs' names.
_ALIASES: Mapping[str, str] = {
    "euler ancestral": "Euler a",
    "euler ancestral discrete": "Euler a",
    "euler discrete": "Euler",
    "heunpp2": "Heun++",
    "heun discrete": "Heun",
    "lms discrete": "LMS",
    "dpm 2": "DPM2",
    "dpm 2 a": "DPM2 a",
    "dpm 2 ancestral": "DPM2 a",
    "dpm2 ancestral": "DPM2 a",
    "kdpm2 discrete": "DPM2",
    "kdpm2 ancestral discrete": "DPM2 a",
    "dpm++ 2s ancestral": "DPM++ 2S a",
    "dpm++ 2s": "DPM++ 2S a",
    "dpmsolvermultistep": "DPM++ 2M",
    "dpmsolver multistep": "DPM++ 2M",
    "dpmsolver singlestep": "DPM++ 2S a",
    "dpmsolver sde": "DPM++ SDE",
    "pndm": "PLMS",
    "dpm++ 2s ancestral cfg++": "DPM++ 2S a CFG++",
    "euler ancestral cfg++": "Euler a CFG++",
    "res multistep ancestral": "Res Multistep a",
    "euler a2": "Euler a",
    "kdpm 2": "DPM2",
    "kdpm 2 a": "DPM2 a",
    "sa solver pece": "SA Solver",
    "uni pc": "UniPC",
    "uni pc bh2": "UniPC BH2",
    "unipc multistep": "UniPC BH2",
    "deis multistep": "DEIS",
    # Changed solvers of WebUI forks and extensions; the solver that they change stands for them.
    "dpm++ 2m alt": "DPM++ 2M",
    "dpm++ 2m mod": "DPM++ 2M",
    "dpm++ 2m new": "DPM++ 2M",
    "dpm++ 2m precision": "DPM++ 2M",
    "dpm++ 2m sharp": "DPM++ 2M",
    "dpm++ 2m sharp v1": "DPM++ 2M",
    "dpm++ 2m test": "DPM++ 2M",
    "dpm++ 2m v2": "DPM++ 2M",
    "kkw++ 2m v3 qual": "DPM++ 2M",
    "kkw++ 2m v4 qual": "DPM++ 2M",
    # Always with Karras sigmas, though its name does not say so.
    "kkw dpm++ 2m v3 qual": "DPM++ 2M Karras",
}

#: Schedule in any spelling, after `_key`; None takes the solver's own ("Automatic").
_SCHEDULE_NAMES: Mapping[str, str | None] = {
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm uniform": "SGM Uniform",
    "beta": "Beta",
    "automatic": None,
    "uniform": "",
    "normal": "",
    "simple": "",
    "ddim uniform": "",
    "ddim": "",
}
_SUFFIX = re.compile(r"\b(karras|exponential|sgm uniform|beta)\b")


def _key(text: str) -> str:
    """Lower case with single spaces; other programs' punctuation made the WebUI's."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|[_\s()-]+", " ", text).strip().lower()
    text = re.sub(r"^k (?=[a-z])|\bdiffusion |^sample | scheduler$|\bgpu\b", "", text)
    text = re.sub(r"\bdpmpp\b|\bdpm pp\b|\bdpm plus plus\b", "dpm++", text)
    text = re.sub(r"\bcfg pp\b", "cfg++", re.sub(r" k$", " karras", text))  # ComfyUI, InvokeAI
    return " ".join(text.split())


_BY_KEY: Mapping[str, str] = {**{_key(name): name for name in SAMPLERS}, **_ALIASES}


def normalise(raw: str, schedule: str | None = None) -> str | None:
    """The canonical name of a sampler, or None when it is none that is known.

    Args:
        raw: the sampler as a record spells it, e.g. ``Euler A``, ``dpmpp_2m_sde_gpu``.
        schedule: the noise schedule when the record gives it apart, e.g. ``Karras``,
            ``sgm_uniform``, ``Automatic``. One inside ``raw`` wins.

    Returns:
        A key of `SAMPLERS`. None for an unknown solver or schedule: a sampler is never guessed.
    """
    key = _key(raw)
    inside = _SUFFIX.search(key)
    if inside:
        key = " ".join(_SUFFIX.sub(" ", key, count=1).split())
    name = _BY_KEY.get(key)
    if name is None or name not in _SOLVERS:  # an alias may name its schedule itself
        return name
    return _with_schedule(name, inside.group() if inside else schedule)


def _with_schedule(solver: str, schedule: str | None) -> str | None:
    if not _SOLVERS[solver].scheduled or not schedule:
        return solver
    key = _key(schedule)
    if key not in _SCHEDULE_NAMES:
        return None
    suffix = _SCHEDULE_NAMES[key]
    suffix = _SOLVERS[solver].automatic if suffix is None else suffix
    return f"{solver} {suffix}".rstrip()
