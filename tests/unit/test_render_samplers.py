"""The sampler table builds, and reads what real records say."""

from __future__ import annotations

import collections
import gzip
import json
from pathlib import Path

import pytest

from diffagent import compat
from diffagent.render.samplers import SAMPLERS, normalise

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
        ("Euler", "Align Your Steps", None),
    ],
)
def test_schedule_given_apart(raw: str, schedule: str, name: str | None) -> None:
    assert normalise(raw, schedule) == name


def test_canonical_names_are_fixed_points() -> None:
    assert {name: normalise(name) for name in SAMPLERS} == {name: name for name in SAMPLERS}


@pytest.mark.parametrize("name", [name for name, spec in SAMPLERS.items() if spec.renderable])
def test_every_renderable_sampler_builds_and_steps(name: str) -> None:
    compat.install()
    import diffusers
    import torch

    spec = SAMPLERS[name]
    assert spec.scheduler is not None
    cls = getattr(diffusers, spec.scheduler)
    scheduler = cls.from_config(SD15_SCHEDULER, **spec.options)
    assert {k: scheduler.config[k] for k in spec.options} == dict(spec.options)
    scheduler.set_timesteps(6 * spec.steps_multiplier)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noise = scheduler.scale_model_input(latents, t) * 0.5
        extra = {} if spec.scheduler in _WITHOUT_GENERATOR else {"generator": generator}
        latents = scheduler.step(noise, t, latents, **extra).prev_sample
    assert torch.isfinite(latents).all()


_WITHOUT_GENERATOR = {
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
}


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
