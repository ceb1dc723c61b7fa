"""Sampler names: every spelling that records carry, one canonical name, and how it is run.

The canonical name is AUTOMATIC1111's up to version 1.8 (solver and noise schedule in one name,
``DPM++ 2M Karras``), because that is what almost all public records say. Later versions give the
schedule apart (``Schedule type: Karras``), ComfyUI has names of its own (``dpmpp_2m`` and
``karras``), InvokeAI too (``k_euler_a``). `normalise` reads them all.

The solvers are those of k-diffusion. Most are run by a scheduler of diffusers (the table is that
of issue 4167 there), with the sigmas of `diffagent.t2i.sigmas` where its own are others; those
for which diffusers has no equal are in `diffagent.render.diffusers.solvers`. Where something else
stands in,
`SamplerSpec.note` says what; where nothing comes near, the sampler is not renderable. DDIM and
PLMS use "leading" with offset 1, as the WebUI does. Nothing here imports diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from diffagent.t2i.sigmas import SCHEDULES


@dataclass(frozen=True)
class SamplerSpec:
    """How a sampler is run.

    Attributes:
        name: the canonical one.
        scheduler: the class of diffusers that is the sampler or comes nearest, built with
            ``from_config(pipeline.scheduler.config, **options)``; None when nothing comes near.
        options: see ``scheduler``.
        steps_multiplier: what the WebUI's steps are multiplied by for that class: a step of
            DPM++ SDE evaluates the model twice there, one of ``DPMSolverSinglestepScheduler`` once.
        note: how the pictures drawn here differ from those of the program that the name comes
            from; empty when the algorithm is the same.
        difference: how diffusers' class differs from what is drawn here; empty when it draws.
        solver: the name without its schedule.
        schedule: the rest of the name; empty when it is uniform in time.
        sigmas: the formula of the sigmas, one of `diffagent.t2i.sigmas.SCHEDULES`; empty where
            the solver knows no schedules.
        exact: whether the sigmas of ``scheduler`` are the same, from two steps on.
        discards: whether the next-to-last sigma is left out, as in the WebUI.
        second_order: whether a step evaluates the model twice, so that the WebUI counts twice the
            steps in ``[from:to:when]``.
    """

    name: str
    scheduler: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps_multiplier: int = 1
    note: str = ""
    difference: str = ""
    solver: str = ""
    schedule: str = ""
    sigmas: str = ""
    exact: bool = True
    discards: bool = False
    second_order: bool = False

    @property
    def renderable(self) -> bool:
        """Whether there is this sampler or a stand-in for it."""
        return self.scheduler is not None

    def evaluations(self, steps: int) -> int:
        """Of the model in so many steps, as the WebUI counts them."""
        return steps * 2 if self.second_order else steps


_LINSPACE = {"timestep_spacing": "linspace"}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
_PP_2M_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, **_LINSPACE}
_PP_SINGLE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "lower_order_final": True}
# Down to the first training step, not to zero: as in the WebUI, and bh1 divides by zero there.
_UNIPC = {"solver_order": 3, "final_sigmas_type": "sigma_min", **_LINSPACE}
_BROWNIAN = (
    "independent noise where the WebUI and ComfyUI draw a Brownian tree: the same distribution, "
    "other random numbers"
)

#: Schedule -> the options of diffusers that come nearest, where a solver has them.
_SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "": {},
    **{name: {} for name in SCHEDULES if name != "Uniform"},
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Simple": {"timestep_spacing": "trailing"},
    "Beta": {"use_beta_sigmas": True},
    # The last step is one like the others.
    "KL Optimal": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
}
_FLAGS = frozenset({"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"})
_END = frozenset({"final_sigmas_type", "lower_order_final"})
_SPACING = frozenset({"timestep_spacing"})


@dataclass(frozen=True)
class _Solver:
    """A solver without its schedule.

    ``takes``: options of schedules that its class has. ``exact``: schedules whose sigmas diffusers
    computes as the WebUI does. ``automatic``: the WebUI's schedule where none is chosen.
    """

    scheduler: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: frozenset[str] = _FLAGS | _SPACING
    exact: tuple[str, ...] = ("", "Karras")
    scheduled: bool = True  # False: the WebUI ignores the schedule
    automatic: str = ""
    steps_multiplier: int = 1
    note: str = ""
    difference: str = ""
    discards: bool = False
    second_order: bool = False


_MULTISTEP = "DPMSolverMultistepScheduler"
_SINGLESTEP = "DPMSolverSinglestepScheduler"
_KEEPS = "keeps the next-to-last sigma"
_SOLVERS: Mapping[str, _Solver] = {
    "Euler": _Solver("EulerDiscreteScheduler", _LINSPACE),
    "Euler a": _Solver("EulerAncestralDiscreteScheduler", _LINSPACE, _SPACING, ("",)),
    "Heun": _Solver("HeunDiscreteScheduler", _LINSPACE, second_order=True),
    "LMS": _Solver("LMSDiscreteScheduler", _LINSPACE),
    "DPM2": _Solver(
        "KDPM2DiscreteScheduler",
        _LINSPACE,
        exact=(),
        automatic="Karras",
        difference=_KEEPS,
        discards=True,
        second_order=True,
    ),
    "DPM2 a": _Solver(
        "KDPM2AncestralDiscreteScheduler",
        _LINSPACE,
        exact=(),
        automatic="Karras",
        difference=_KEEPS,
        discards=True,
        second_order=True,
    ),
    "DPM++ 2M": _Solver(
        _MULTISTEP,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, **_LINSPACE},
        _FLAGS | _SPACING | _END,
        ("Karras",),
        automatic="Karras",
    ),
    "DPM++ 2M SDE": _Solver(
        _MULTISTEP,
        _PP_2M_SDE,
        _FLAGS | _SPACING | _END,
        ("Karras",),
        automatic="Exponential",
        note=_BROWNIAN,
    ),
    "DPM++ 2M SDE Heun": _Solver(
        _MULTISTEP,
        {**_PP_2M_SDE, "solver_type": "heun"},
        _FLAGS | _SPACING | _END,
        ("Karras",),
        automatic="Exponential",
        note=_BROWNIAN,
    ),
    "DPM++ 3M SDE": _Solver(
        _MULTISTEP,
        {**_PP_2M_SDE, "solver_order": 3},
        exact=(),
        automatic="Exponential",
        note=_BROWNIAN,
        difference=f"has another factor in the third order; {_KEEPS}",
        discards=True,
    ),
    "DPM++ SDE": _Solver(
        _SINGLESTEP,
        _PP_SINGLE,
        _FLAGS,
        (),
        automatic="Karras",
        steps_multiplier=2,
        note=_BROWNIAN,
        difference="takes the sigmas of twice the steps, and independent noise for both halves",
        second_order=True,
    ),
    "DPM++ 2S a": _Solver(
        _SINGLESTEP,
        _PP_SINGLE,
        _FLAGS,
        (),
        automatic="Karras",
        steps_multiplier=2,
        difference="is the SDE solver, not the ancestral one; takes the sigmas of twice the steps",
        second_order=True,
    ),
    "DPM fast": _Solver(
        _SINGLESTEP,
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
    "DEIS": _Solver(
        "DEISMultistepScheduler",
        {**_LINSPACE, "solver_order": 3},
        exact=("Karras",),
        note="DEIS in log rho, down to the model's least sigma; Forge's and ComfyUI's is in time",
    ),
    # ComfyUI's, for which diffusers has no equal; a record with one is read, and not rendered.
    **{
        name: _Solver(None, note=f"diffusers has no {name}")
        for name in (
            *("Euler CFG++", "Euler a CFG++", "DPM++ 2M CFG++", "DPM++ 2S a CFG++", "ER SDE"),
            *("Res Multistep", "Res Multistep a", "Gradient Estimation", "SA Solver"),
            *("Res Multistep CFG++", "Res Multistep a CFG++", "Gradient Estimation CFG++"),
            *("Exp Heun 2 x0", "Exp Heun 2 x0 SDE", "iPNDM", "iPNDM V", "SEEDS 2", "SEEDS 3"),
        )
    },
    "LCM": _Solver("LCMScheduler", {"clip_sample": False}, scheduled=False),
    "TCD": _Solver("TCDScheduler", {"clip_sample": False}, scheduled=False),
}


def _specs() -> Iterator[SamplerSpec]:
    for name, solver in _SOLVERS.items():
        for schedule, nearest in _SCHEDULES.items():
            if schedule and not solver.scheduled:
                continue
            options = {key: value for key, value in nearest.items() if key in solver.takes}
            yield SamplerSpec(
                name=f"{name} {schedule}".rstrip(),
                scheduler=solver.scheduler,
                options=MappingProxyType({**solver.options, **options}),
                steps_multiplier=solver.steps_multiplier,
                note=solver.note,
                difference=solver.difference,
                solver=name,
                schedule=schedule,
                sigmas=(schedule or "Uniform") if solver.scheduled else "",
                exact=not solver.scheduled or schedule in solver.exact,
                discards=solver.discards,
                second_order=solver.second_order,
            )


#: Canonical name -> how it is run. Immutable.
SAMPLERS: Mapping[str, SamplerSpec] = MappingProxyType({spec.name: spec for spec in _specs()})

#: Schedule -> what the WebUI calls it, where that is something else.
WEBUI_LABELS: Mapping[str, str] = MappingProxyType({"": "Uniform", "DDIM Uniform": "DDIM"})

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
    "res multistep ancestral cfg++": "Res Multistep a CFG++",
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
_SCHEDULE_KEYS: Mapping[str, str | None] = {
    "karras": "Karras",
    "k": "Karras",  # InvokeAI: euler_k
    "exponential": "Exponential",
    "polyexponential": "Exponential",  # the same with the WebUI's rho of 1
    "sgmuniform": "SGM Uniform",
    "simple": "Simple",
    "ddimuniform": "DDIM Uniform",
    "ddim": "DDIM Uniform",  # the WebUI's label
    "beta": "Beta",
    "betacomfyui": "Beta (ComfyUI)",
    "kloptimal": "KL Optimal",
    "kloptimalcomfyui": "KL Optimal (ComfyUI)",
    "linearquadratic": "Linear Quadratic",
    "alignyoursteps": "Align Your Steps",
    "alignyoursteps11": "Align Your Steps",
    "alignyoursteps32": "Align Your Steps 32",
    "alignyourstepsgits": "Align Your Steps GITS",
    "turbo": "Turbo",
    "automatic": None,
    "uniform": "",
    "normal": "",
}
#: Schedules of one name and two formulae. ComfyUI writes in lower case, the WebUI with a capital.
_TWO_FORMULAE = frozenset({"beta", "kloptimal"})
_MOST_WORDS = 16  # of a name


def _words(text: str) -> list[str]:
    """Words of letters, digits and "++", as they are written; other programs' made the WebUI's."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|Scheduler(?![a-z])", " ", text)
    text = re.sub(r"[^A-Za-z0-9+]+|(?<!\+)\+(?!\+)", " ", text).strip()
    text = re.sub(r"(?i)^sample (?=[a-z])|\b(?:diffusion|gpu|scheduler|sampler)\b", "", text)
    text = re.sub(r"(?i)\bdpm ?(?:pp|plus ?plus)", "dpm++", text)
    return re.sub(r"(?i)\bcfg ?pp\b", "cfg++", text).split()


def _key(text: str) -> str:
    return "".join(_words(text)).lower()


_NAMES = {**{name: name for name in _SOLVERS}, **_ALIASES}
_BY_KEY: Mapping[str, str] = {
    f"{k}{_key(spelling)}": name for k in ("k", "") for spelling, name in _NAMES.items()
}


def normalise(raw: str, schedule: str | None = None) -> str | None:
    """The canonical name of a sampler, or None when it is none that is known.

    Args:
        raw: the sampler as a record spells it, e.g. ``Euler A``, ``dpmpp_2m_sde_gpu``, with or
            without its schedule, e.g. ``dpmpp_2m_sde_gpu_simple``.
        schedule: the noise schedule when the record gives it apart, e.g. ``Karras``,
            ``sgm_uniform``, ``Automatic``. One inside ``raw`` wins.

    Returns:
        A key of `SAMPLERS`. None for an unknown solver or schedule: a sampler is never guessed.
    """
    words = _words(raw)
    name, solver, inside = _BY_KEY.get("".join(words).lower()), "".join(words), schedule or ""
    if name is None:
        name, solver, inside = _split(words)
    if name is None or name not in _SOLVERS:  # an alias may name its schedule itself
        return name
    if solver == "ddim" and inside.islower() and _key(inside) not in {"ddimuniform", "automatic"}:
        name = "Euler"  # which ComfyUI's ddim is; the WebUI's is capital and knows no schedules
    return _with_schedule(name, inside)


def _split(words: list[str]) -> tuple[str | None, str, str]:
    """(name, solver, schedule): the parts of a name with a schedule in it, as they are spelled."""
    most = len(words) if len(words) <= _MOST_WORDS else 0
    for length in range(most - 1, 0, -1):
        for start in range(most - length, -1, -1):
            schedule = " ".join(words[start : start + length])
            solver = "".join(words[:start] + words[start + length :])
            name = _BY_KEY.get(solver.lower())
            if name is not None and _key(schedule) in _SCHEDULE_KEYS:
                return name, solver, schedule
    return None, "", ""


def _with_schedule(solver: str, schedule: str) -> str | None:
    if not _SOLVERS[solver].scheduled or not schedule.strip():
        return solver
    key = _key(schedule)
    if key in _TWO_FORMULAE and schedule.islower():
        key = f"{key}comfyui"
    if key not in _SCHEDULE_KEYS:
        return None
    suffix = _SCHEDULE_KEYS[key]
    suffix = _SOLVERS[solver].automatic if suffix is None else suffix
    return f"{solver} {suffix}".rstrip()
