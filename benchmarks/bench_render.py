"""Rendering speed: the planner against the naive loop, and full-size architectures on a GPU.

One JSON line a figure; everything runs on random or sandbox weights, so nothing is downloaded.

``planner`` (default): sandbox jobs (prompts, samplers, steps and guidance as the sandbox's records
have them) over 8 checkpoints and 6 LoRAs in random order. The naive loop is plain diffusers, one
job at a time in the order given, the pipeline loaded when the checkpoint changes and the LoRA when
that changes. Told are seconds, loads, their ratio, whether pictures drawn alone are those of the
batch to the bit, and how far the naive loop's are from them. The checkpoints are the sandbox's six
and two with a LoRA merged in; the LoRAs are its two and those of its specialists.

``full-size`` (when there is a GPU, or asked for): SD 1.5 and SDXL with random weights, pictures a
second by plain diffusers in several ways and by this project's renderer, and seconds a LoRA swap.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffagent.render.diffusers.checkpoints import channels_last, quiet_diffusers, shipped_configs
from diffagent.render.diffusers.pipelines import DiffusersRenderer
from diffagent.render.planner import draw
from diffagent.render.recipe import LoRAUse, Recipe
from diffagent.render.renderer import Files, ModelRef
from diffagent.sandbox import files, site_records
from diffagent.t2i.samplers import SAMPLERS, normalise
from tools.sandbox.single_file import single_file_tensors
from tools.sandbox.tiny_networks import CONFIG_DIR

CPU = torch.device("cpu")


def show(**figures: object) -> None:
    print(json.dumps({"benchmark": "render", **figures}), flush=True)


# --- the planner ----------------------------------------------------------------------------------


def sandbox_files(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Eight checkpoints and six LoRAs by name."""
    from safetensors.torch import load_file, save_file

    quiet_diffusers()
    assembled = {
        file.key: file.path for file in files.model_files(files.materialise(Path("build/sandbox")))
    }
    checkpoints = {name: path for name, path in assembled.items() if not name.startswith("lora")}
    loras = {name: path for name, path in assembled.items() if name.startswith("lora")}
    loras |= {
        f"lora-everywhere-{style}": files.WEIGHTS / f"specialist-{style}.safetensors"
        for style in files.SPECIALISTS
    }
    for name in files.LORAS:
        path = folder / f"merged-{name}.safetensors"
        save_file(
            files.merge_lora(load_file(checkpoints["base"]), load_file(loras[f"lora-{name}"])), path
        )
        checkpoints[path.stem] = path
    return checkpoints, loras


def sandbox_jobs(
    number: int, seed: int, checkpoints: Sequence[str], loras: Sequence[str]
) -> list[Recipe]:
    """Random jobs: a checkpoint, a LoRA or none, and what a record of the sandbox says."""
    rng = random.Random(seed)
    facts = {file.key: file for file in files.model_files(files.materialise(Path("build/sandbox")))}
    told = [record.get("meta") or {} for record in site_records.images(facts)]
    usable = [m for m in told if {"prompt", "sampler", "steps", "cfgScale"} <= set(m)]
    jobs = []
    while len(jobs) < number:
        meta = rng.choice(usable)
        sampler = normalise(meta["sampler"])
        # Those that the naive loop draws alike: without another sampler's sigmas or steps.
        if sampler is None or not (SAMPLERS[sampler].renderable and SAMPLERS[sampler].exact):
            continue
        if not 1 <= meta["steps"] <= 150:
            continue
        lora = rng.choice([None, *loras])
        jobs.append(
            Recipe(
                prompt=meta["prompt"],
                negative_prompt=meta.get("negativePrompt") or "",
                checkpoint=rng.choice(checkpoints),
                loras=(LoRAUse(sha256=lora, weight=rng.choice([0.6, 0.8, 0.8, 1.0])),)
                if lora
                else (),
                sampler=sampler,
                steps=meta["steps"],
                cfg_scale=meta["cfgScale"],
                width=64,
                height=64,
                clip_skip=1,
                seed=rng.randrange(2**32),
            )
        )
    return jobs


def naive(
    jobs: Sequence[Recipe], checkpoints: dict[str, Path], loras: dict[str, Path]
) -> Iterator[tuple[Recipe, np.ndarray[Any, Any]]]:
    """Plain diffusers, as one writes it for a handful of pictures."""
    diffusers = quiet_diffusers()
    config = CONFIG_DIR
    pipeline, current, laid = None, None, None
    for job in jobs:
        if job.checkpoint != current:
            pipeline = diffusers.StableDiffusionPipeline.from_single_file(
                str(checkpoints[job.checkpoint]), config=str(config), safety_checker=None,
                local_files_only=True, torch_dtype=torch.float32,
            )  # fmt: skip
            pipeline.set_progress_bar_config(disable=True)
            scheduler_config = pipeline.scheduler.config
            current, laid = job.checkpoint, None
        assert pipeline is not None
        if job.loras[:1] != laid:
            if laid:
                pipeline.unload_lora_weights()
            for use in job.loras:
                pipeline.load_lora_weights(str(loras[use.sha256]), adapter_name="lora")
                pipeline.set_adapters("lora", use.weight)
            laid = job.loras[:1]
        spec = SAMPLERS[job.sampler]
        scheduler = getattr(diffusers, str(spec.scheduler))
        pipeline.scheduler = scheduler.from_config(scheduler_config, **spec.options)
        image = pipeline(
            job.prompt,
            negative_prompt=job.negative_prompt,
            num_inference_steps=job.steps * spec.steps_multiplier,
            guidance_scale=job.cfg_scale,
            width=job.width,
            height=job.height,
            generator=torch.Generator().manual_seed(job.seed),
        ).images[0]
        yield job, np.asarray(image)


def planner(number: int, seed: int, alone: int) -> None:
    """Both ways over the same jobs."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, loras = sandbox_files(Path(folder))
        paths = checkpoints | loras
        jobs = sandbox_jobs(number, seed, sorted(checkpoints), sorted(loras))
        changes = 1 + sum(a.checkpoint != b.checkpoint for a, b in itertools.pairwise(jobs))
        show(
            part="planner", jobs=number, checkpoints=len({j.checkpoint for j in jobs}),
            loras=len({u.sha256 for j in jobs for u in j.loras}), changes_of_checkpoint=changes,
            steps=sum(j.steps for j in jobs), threads=torch.get_num_threads(),
        )  # fmt: skip

        def ref(name: str) -> ModelRef:
            return ModelRef(name, name, "SD 1.5")

        def files_of(job: Recipe) -> Files:
            return Files(ref(job.checkpoint), loras=tuple(ref(u.sha256) for u in job.loras))

        def fetch(file: ModelRef) -> Path:
            return paths[file.sha256]

        renderer = DiffusersRenderer(CPU, [CONFIG_DIR])
        started, cpu = time.perf_counter(), time.process_time()
        planned = {job: pixels(image) for job, image in draw(jobs, renderer, files_of, fetch)}
        ours, our_cpu = time.perf_counter() - started, time.process_time() - cpu
        show(
            part="planner", way="planned", seconds=round(ours, 2), cpu_seconds=round(our_cpu, 2),
            loads=renderer.loads, pictures=len(planned),
            pictures_per_second=round(number / ours, 3),
        )  # fmt: skip

        started, cpu = time.perf_counter(), time.process_time()
        plain = dict(naive(jobs, checkpoints, loras))
        theirs, their_cpu = time.perf_counter() - started, time.process_time() - cpu
        show(
            part="planner", way="naive", seconds=round(theirs, 2), cpu_seconds=round(their_cpu, 2),
            loads=changes, pictures_per_second=round(number / theirs, 3),
        )  # fmt: skip
        show(part="planner", figure="times faster", value=round(theirs / ours, 2), target=4,
             of_cpu_seconds=round(their_cpu / our_cpu, 2))  # fmt: skip

        gaps = np.array([np.abs(planned[j].astype(int) - plain[j]).max() for j in planned])
        show(
            part="planner", figure="largest difference from the naive loop, grey levels of 255",
            median=int(np.median(gaps)), most=int(gaps.max()),
            values_that_differ=float(np.mean([(planned[j] != plain[j]).mean() for j in planned])),
        )  # fmt: skip
        sample = random.Random(seed + 1).sample(list(planned), min(alone, len(planned)))
        single = DiffusersRenderer(CPU, [CONFIG_DIR])
        same = 0
        for job in sample:  # one job at a time, in random order
            ((_, image),) = draw([job], single, files_of, fetch)
            same += np.array_equal(pixels(image), planned[job])
        show(
            part="planner", figure="drawn alone and in random order: identical to the bit",
            pictures=len(sample), identical=same,
        )  # fmt: skip


def pixels(image: Any) -> np.ndarray[Any, Any]:
    if isinstance(image, Exception):
        raise image
    return np.asarray(image)


# --- full size ------------------------------------------------------------------------------------

PROMPT = "a photograph of an astronaut riding a horse, detailed, sharp focus"


def random_pipeline(family: str, device: torch.device) -> Any:
    """The full-size architecture with random weights, in float32 on the device."""
    diffusers = quiet_diffusers()
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from diffagent.render.diffusers.checkpoints import _tokenizers

    config = next(path for path in shipped_configs() if path.name == family)
    torch.manual_seed(0)
    parts: dict[str, Any] = _tokenizers(config)
    with device:
        for name, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
            model = getattr(diffusers, kind)
            parts[name] = model.from_config(model.load_config(config / name))
        for name, kind in (
            ("text_encoder", CLIPTextModel),
            ("text_encoder_2", CLIPTextModelWithProjection),
        ):
            if (config / name).is_dir():
                parts[name] = kind(CLIPTextConfig.from_pretrained(config / name))
    parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_pretrained(config / "scheduler")
    if family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_random_lora(pipeline: Any, path: Path, seed: int, rank: int = 16) -> None:
    """A LoRA on every projection of the U-Net's attention, in diffusers' names."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in pipeline.unet.named_modules():
        if name.rpartition(".")[2] in {"to_q", "to_k", "to_v"} or name.endswith("to_out.0"):
            rows, columns = module.weight.shape
            up, down = (rows, rank), (rank, columns)
            key = f"unet.{name}.lora"
            tensors[f"{key}_B.weight"] = torch.randn(up, generator=generator).half() / 100
            tensors[f"{key}_A.weight"] = torch.randn(down, generator=generator).half() / 100
    save_file(tensors, path)


def timed(work: Callable[[], int], device: torch.device, repeats: int) -> float:
    """Pictures a second; ``work`` says how many it made. The first call warms up."""
    work()
    synchronize(device)
    started = time.perf_counter()
    made = sum(work() for _ in range(repeats))
    synchronize(device)
    return made / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def full_size(family: str, size: int, steps: int, device: torch.device, compiled: bool) -> None:
    """Plain diffusers in several ways, then the renderer, on the same random weights."""
    pipeline = random_pipeline(family, device)
    half = torch.float16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"random-{family}.safetensors")
        save_single_file(pipeline, path)
        loras = [Path(folder, f"random-lora-{seed}.safetensors") for seed in (0, 1)]
        for seed, lora in enumerate(loras):
            save_random_lora(pipeline, lora, seed)
        about = {"part": "full-size", "family": family, "size": size, "steps": steps,
                 "device": str(device)}  # fmt: skip

        kinds = [half, torch.bfloat16] if device.type == "cuda" else [half]
        for dtype in kinds:
            pipeline.to(device, dtype)
            for batch in (1, 4):
                rate = timed(plain(pipeline, about, batch), device, 3)
                show(**about, way=f"diffusers {dtype} batch {batch}", pictures_per_second=rate)
        channels_last(pipeline.unet)
        pipeline.to(device, half)
        show(**about, way=f"diffusers {half} batch 4 channels-last",
             pictures_per_second=timed(plain(pipeline, about, 4), device, 3))  # fmt: skip
        del pipeline
        for compile_it in (False, True) if compiled else (False,):
            renderer_figures(about, path, loras, device, compile_it)


def plain(pipeline: Any, about: dict[str, Any], batch: int) -> Callable[[], int]:
    """Work for `timed`: diffusers' own call."""

    def work() -> int:
        pipeline(
            [PROMPT] * batch,
            num_inference_steps=about["steps"],
            width=about["size"],
            height=about["size"],
            generator=[torch.Generator("cpu").manual_seed(n) for n in range(batch)],
        )
        return batch

    return work


def save_single_file(pipeline: Any, path: Path) -> None:
    from safetensors.torch import save_file

    second = getattr(pipeline, "text_encoder_2", None)
    tensors = single_file_tensors(pipeline.unet, pipeline.vae, pipeline.text_encoder, second)
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path)


def renderer_figures(
    about: dict[str, Any], path: Path, loras: Sequence[Path], device: torch.device, compiled: bool
) -> None:
    renderer = DiffusersRenderer(device, compile=compiled)
    checkpoint = Files(ModelRef(path.stem, path.stem, path=path))
    started = time.perf_counter()
    renderer.prepare(checkpoint)
    synchronize(device)
    way = f"diffagent {renderer.dtype}{' compiled' if compiled else ''}"
    show(**about, way=way, figure="seconds to load", value=time.perf_counter() - started)
    base = Recipe(
        prompt=PROMPT, negative_prompt="", checkpoint=path.stem, sampler="Euler",
        steps=about["steps"], cfg_scale=5, width=about["size"], height=about["size"],
        clip_skip=1, seed=0,
    )  # fmt: skip
    rows = renderer.rows(base.width * base.height)
    recipes = [base.model_copy(update={"seed": seed}) for seed in range(max(rows // 2, 1))]

    def work() -> int:
        return len(list(renderer.render(recipes)))

    rate = timed(work, device, 3)
    show(**about, way=way, rows_a_pass=rows, pictures_per_second=rate)
    for number in (0, 1, 0):  # the second time its originals are already kept
        use = LoRAUse(sha256=loras[number].stem, weight=0.8)
        lora = ModelRef(use.sha256, use.sha256, path=loras[number])
        started = time.perf_counter()
        renderer.prepare(replace(checkpoint, loras=(lora,)))
        renderer._current.lay(((use.sha256, use.weight),))  # type: ignore[union-attr]
        synchronize(device)
        show(**about, way=way, figure="seconds to swap a LoRA", target=1,
             value=time.perf_counter() - started)  # fmt: skip
    renderer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", type=int, default=50, help="pictures drawn again, alone")
    parser.add_argument("--full-size", nargs="*", metavar="FAMILY", help="sd1, sd2, sdxl")
    parser.add_argument("--only-full-size", action="store_true")
    parser.add_argument("--size", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    if not options.only_full_size:
        planner(options.jobs, options.seed, options.alone)
    families = options.full_size
    if families is None:
        families = ["sd1", "sdxl"] if torch.cuda.is_available() else []
    for family in families:
        for size in options.size:
            device = torch.device(options.device)
            full_size(family, size, options.steps, device, not options.no_compile)


if __name__ == "__main__":
    main()
