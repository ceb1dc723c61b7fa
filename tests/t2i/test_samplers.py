"""The sampler table builds, and reads what real records say."""

from __future__ import annotations

import collections
import gzip
import json
from pathlib import Path

import pytest

from diffagent import compat
from diffagent.t2i.samplers import SAMPLERS, normalise

RECORDS = Path(__file__).parents[3] / "shared/data/civitai/images.jsonl.gz"

#: What StableDiffusionPipeline ships as its scheduler configuration for SD 1.5.
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("Euler a", "Euler a"),
        ("Euler A", "Euler a"),
        ("euler_a", "Euler a"),
        ("k_euler_a", "Euler a"),
        ("euler_ancestral", "Euler a"),
        ("EulerAncestralDiscreteScheduler", "Euler a"),
        ("  DPM++  2M   karras ", "DPM++ 2M Karras"),
        ("DPM++ 2M Karras Test", "DPM++ 2M Karras"),
        ("DPM++ 2M alt Karras", "DPM++ 2M Karras"),
        ("KKW++ 2M Karras V3 qual", "DPM++ 2M Karras"),
        ("KKW DPM++ 2M V3 qual", "DPM++ 2M Karras"),
        ("dpmpp_2m_sde_gpu", "DPM++ 2M SDE"),
        ("dpmpp_3m_sde_gpu_karras", "DPM++ 3M SDE Karras"),
        ("DPMSolverMultistepScheduler", "DPM++ 2M"),
        ("dpm_2_ancestral", "DPM2 a"),
        ("uni_pc_bh2", "UniPC BH2"),
        ("DDIM", "DDIM"),
        ("DPM adaptive", "DPM adaptive"),
        ("Undefined", None),
        ("", None),
        ("Euler b", None),
    ],
)
def test_spellings(raw: str, name: str | None) -> None:
    assert normalise(raw) == name


@pytest.mark.parametrize(
    ("raw", "schedule", "name"),
    [
        ("DPM++ 2M", "Karras", "DPM++ 2M Karras"),
        ("DPM++ 2M", "Automatic", "DPM++ 2M Karras"),
        ("DPM++ 2M SDE", "Automatic", "DPM++ 2M SDE Exponential"),
        ("Euler a", "Automatic", "Euler a"),
        ("dpmpp_2m", "sgm_uniform", "DPM++ 2M SGM Uniform"),
        ("euler", "normal", "Euler"),
        ("DDIM", "Karras", "DDIM"),
        ("DPM++ 2M Karras", "Exponential", "DPM++ 2M Karras"),
        ("Euler", "Align Your Steps", "Euler Align Your Steps"),
        ("euler", "simple", "Euler Simple"),
        ("dpmpp_2m", "ddim_uniform", "DPM++ 2M DDIM Uniform"),
        ("DPM++ 2M", "DDIM", "DPM++ 2M DDIM Uniform"),
        ("DPM++ 2M", "Polyexponential", "DPM++ 2M Exponential"),
        ("DPM++ 2M", "SGMUniform", "DPM++ 2M SGM Uniform"),
        # Two formulae of one name: the WebUI writes a capital, ComfyUI lower case.
        ("DPM++ 2M", "Beta", "DPM++ 2M Beta"),
        ("dpmpp_2m", "beta", "DPM++ 2M Beta (ComfyUI)"),
        ("Euler a", "KL Optimal", "Euler a KL Optimal"),
        ("euler_ancestral", "kl_optimal", "Euler a KL Optimal (ComfyUI)"),
        ("euler_beta", None, "Euler Beta (ComfyUI)"),
        ("Euler Beta", None, "Euler Beta"),
        ("ddim", "karras", "Euler Karras"),  # in ComfyUI another name of euler
        ("ddim", "ddim_uniform", "DDIM"),
        ("ddim_normal", None, "Euler"),
        ("ddim", None, "DDIM"),
        ("Euler", "Unheard Of", None),
        ("Euler Unheard Of", None, None),
    ],
)
def test_schedule_given_apart(raw: str, schedule: str | None, name: str | None) -> None:
    assert normalise(raw, schedule) == name


#: How programs and sites spell solvers and schedules: the WebUI, ComfyUI, InvokeAI, diffusers.
SOLVERS = (
    *("Euler a", "Euler", "LMS", "Heun", "DPM2", "DPM2 a", "DPM++ 2S a", "DPM++ 2M", "DPM++ SDE"),
    *("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "DDIM", "PLMS", "UniPC", "LCM", "DEIS"),
    *("Restart", "DPM fast", "DPM adaptive", "HeunPP2", "IPNDM", "IPNDM_V"),
    *("euler", "euler_ancestral", "euler_cfg_pp", "heun", "heunpp2", "dpm_2", "dpm_2_ancestral"),
    *("lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_sde_gpu"),
    *("dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun_gpu"),
    *("dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm", "deis", "res_multistep"),
    *("res_multistep_ancestral_cfg_pp", "gradient_estimation", "er_sde", "seeds_2", "sa_solver"),
    *("ddim", "uni_pc", "uni_pc_bh2", "k_euler_a", "k_dpmpp_2m", "k_dpm_2_a", "unipc", "pndm"),
    *("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler", "LCMScheduler"),
)
SPELLED_SCHEDULES = (
    *("Automatic", "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "Normal"),
    *("KL Optimal", "Align Your Steps", "Simple", "DDIM", "Beta", "Turbo", "SGMUniform"),
    *("Align Your Steps GITS", "Align Your Steps 11", "Align Your Steps 32"),
    *("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"),
    *("linear_quadratic", "kl_optimal", "align_your_steps", "polyexponential", "turbo"),
)


@pytest.mark.parametrize("separator", [" ", "_", "-", " / ", ", ", " - ", "|", " + "])
def test_joined_names_are_known_when_both_parts_are(separator: str) -> None:
    """Any solver with any schedule behind or before it, spelled as any program spells them."""
    for solver in SOLVERS:
        for schedule in SPELLED_SCHEDULES:
            apart = normalise(solver, schedule)
            assert apart is not None, (solver, schedule)
            if solver != "ddim":
                assert SAMPLERS[apart].solver == SAMPLERS[normalise(solver) or ""].solver
            for joined in (f"{solver}{separator}{schedule}", f"{schedule}{separator}{solver}"):
                assert normalise(joined) == apart, joined


def test_canonical_names_are_fixed_points() -> None:
    assert {name: normalise(name) for name in SAMPLERS} == {name: name for name in SAMPLERS}


@pytest.mark.parametrize("name", [name for name, spec in SAMPLERS.items() if spec.renderable])
def test_every_renderable_sampler_has_a_scheduler_with_its_options(name: str) -> None:
    """The mapping that a dataset ships: what others build from it is what it says."""
    compat.install()
    import diffusers

    spec = SAMPLERS[name]
    assert spec.scheduler is not None
    scheduler = getattr(diffusers, spec.scheduler).from_config(SD15_SCHEDULER, **spec.options)
    assert {k: scheduler.config[k] for k in spec.options} == dict(spec.options)
    scheduler.set_timesteps(6 * spec.steps_multiplier)


@pytest.mark.skipif(not RECORDS.exists(), reason="the collected records are not at hand")
def test_every_sampler_of_the_real_records_is_known() -> None:
    seen: collections.Counter[str] = collections.Counter()
    with gzip.open(RECORDS, "rt", encoding="utf-8") as lines:
        for line in lines:
            meta = json.loads(line).get("meta") or {}
            meta = meta.get("meta") or meta
            if isinstance(meta.get("sampler"), str):
                seen[meta["sampler"]] += 1
    assert len(seen) > 30
    assert {raw for raw in seen if normalise(raw) is None} == set()
