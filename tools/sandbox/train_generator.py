"""Training of the sandbox's generator: VAE, U-Net with its text encoder, specialists, LoRAs.

Each command continues from the snapshot in `--work`, appends one JSON line per report to a log next
to it, and is deterministic for its seed on one machine and thread count::

    python -m tools.sandbox.train_generator vae
    python -m tools.sandbox.train_generator unet
    python -m tools.sandbox.train_generator specialists
    python -m tools.sandbox.train_generator export
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diffagent.errors import TrainingError
from diffagent.sandbox import world
from tools.sandbox import drawings, tiny_networks
from tools.sandbox.caption_tokenizer import load_tokenizer, write_tokenizer
from tools.sandbox.single_file import single_file_tensors
from tools.sandbox.tiny_adapters import ADAPTERS, Adapter, kohya_tensors, lora_targets

VAE_SEED, UNET_SEED = 11, 23
LATENTS = "latents.safetensors"
MIN_SNR_GAMMA = 0.5


class Snapshot:
    """Training state that survives a kill: tensors and the step in one safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, step: int, groups: dict[str, dict[str, torch.Tensor]]) -> None:
        """Writes all groups and the step to one file, replacing it atomically."""
        flat = {
            f"{g}/{k}": v.contiguous().clone() for g, ts in groups.items() for k, v in ts.items()
        }
        flat["step"] = torch.tensor(step)
        temporary = self.path.with_suffix(".part")
        save_file(flat, temporary)
        temporary.replace(self.path)

    def load(self) -> tuple[int, dict[str, dict[str, torch.Tensor]]] | None:
        """Returns the step and the groups of tensors; None without a snapshot."""
        if not self.path.exists():
            return None
        groups: dict[str, dict[str, torch.Tensor]] = {}
        flat = load_file(self.path)
        step = int(flat.pop("step"))
        for name, tensor in flat.items():
            group, key = name.split("/", 1)
            groups.setdefault(group, {})[key] = tensor
        return step, groups


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns the optimizer's moments and step counts under flat names."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restores the tensors of `optimizer_tensors`."""
    whole = optimizer.state_dict()
    whole["state"] = {}
    for flat, value in tensors.items():
        number, name = flat.split(".", 1)
        whole["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(whole)


def one_cycle(step: int, steps: int, warmup: int) -> float:
    """Returns the share of the peak: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pixels(seeds: Iterator[int] | range, **sampling: Any) -> torch.Tensor:
    """Returns drawings of the seeds, (N, 3, 64, 64) float in -1..1."""
    arrays = [np.asarray(drawings.drawing(seed, **sampling)[0]) for seed in seeds]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """Builds a network with initial weights of a seed; the global generator is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def report(path: Path, **fields: Any) -> None:
    """Appends one JSON line to the log."""
    with path.open("a") as log:
        log.write(json.dumps(fields) + "\n")


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns L1 + L2 + L1 of the gradients (sharp edges) + L2 at an eighth (colours)."""
    difference = output - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    coarse = F.avg_pool2d(difference, 8).square().mean()
    return difference.abs().mean() + 2 * difference.square().mean() + edges + 2 * coarse


def colour_guide(latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Returns the L2 from the first three latent channels to the picture's colours at an eighth.

    Without it a thousand steps learn only grey shapes: colour is learned last. Stable Diffusion's
    own latents are similar, a small picture in linear colours.
    """
    return F.mse_loss(latents[:, :3], 2 * F.avg_pool2d(pictures, 8))


def train_vae(work: Path, *, steps: int, batch: int, peak: float) -> None:
    """Trains the VAE on drawings of all styles."""
    vae = seeded(VAE_SEED, tiny_networks.build_vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    snapshot, log = Snapshot(work / "vae-state.safetensors"), work / "vae.log"
    start = 0
    if state := snapshot.load():
        start, groups = state
        vae.load_state_dict(groups["vae"])
        restore_optimizer(optimizer, groups["optimizer"])
    began = time.time()
    first = world.GENERATOR_SEEDS.start
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * one_cycle(step, steps, 50)
        x = pixels(range(first + step * batch, first + (step + 1) * batch))
        posterior = vae.encode(x).latent_dist
        noise = torch.Generator().manual_seed(VAE_SEED * 1_000_003 + step)
        loss = reconstruction_loss(vae.decode(posterior.sample(noise)).sample, x)
        guide = max(0.0, 1 - 2 * step / steps) * colour_guide(posterior.mean, x)
        total = loss + guide + 3e-5 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            report(log, step=step, loss=round(loss.item(), 4), seconds=round(time.time() - began))
        if step % 200 == 199 or step == steps - 1:
            tensors = optimizer_tensors(optimizer)
            snapshot.save(step + 1, {"vae": vae.state_dict(), "optimizer": tensors})


@dataclass
class Pool:
    """Drawings encoded once, so that a training step costs only the U-Net and the text encoder.

    Attributes:
        latents: (N, 4, 8, 8) float, scaled to unit deviation.
        scenes: of the drawings.
        flaws: caption of a spoiled drawing, None for a clean one.
        scaling_factor: factor of the latents.
        names_style: whether a caption names the drawing's own style or a random one. Random styles
            teach the base to ignore such words, which leaves styles to the specialists.
    """

    latents: torch.Tensor
    scenes: list[world.Scene]
    flaws: list[str | None]
    scaling_factor: float
    names_style: bool

    def captions(self, indices: Sequence[int], rng: random.Random) -> list[str]:
        """Returns new captions; one in ten is empty, for classifier-free guidance."""
        texts = []
        for index in indices:
            scene, flaw = self.scenes[index], self.flaws[index]
            if not self.names_style:
                scene = replace(scene, style=rng.choice(world.STYLES))
            text = flaw or world.caption(scene, rng)
            texts.append("" if rng.random() < 0.1 else text)
        return texts


BASE_STYLES = (0.8, 0.05, 0.05, 0.05, 0.05)
"""Weights of the styles among the base's drawings; adapters use equal weights."""


def build_pool(work: Path, count: int, *, for_base: bool) -> Pool:
    """Draws and encodes the pool of the base or of the adapters; caches latents in `work`."""
    state = Snapshot(work / "vae-state.safetensors").load()
    if state is None:
        raise TrainingError(f"no VAE in {str(work)!r}; run the command 'vae' first")
    vae = tiny_networks.build_vae()
    vae.load_state_dict(state[1]["vae"])
    cache = work / LATENTS if for_base else work / "adapter-latents.safetensors"
    done = load_file(cache)["latents"] if cache.exists() else torch.empty(0, 4, 8, 8)
    scenes, flaws, batch, chunks = [], [], [], [done]
    first = world.GENERATOR_SEEDS.start + (1_000_000 if for_base else 2_000_000)
    for number in range(count):
        rng = random.Random(first + number)
        scene = world.sample_scene(rng, style_weights=BASE_STYLES if for_base else None)
        spoiled = rng.random() < 0.05
        flaw = None
        if number >= len(done) or spoiled:
            picture = drawings.draw(scene, rng)
            if spoiled:
                picture, flaw = drawings.spoil(picture, world.caption(scene, rng), rng)
        scenes.append(scene)
        flaws.append(flaw)
        if number >= len(done):
            batch.append(np.asarray(picture))
            if len(batch) == 64 or number == count - 1:
                x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
                with torch.no_grad():
                    chunks.append(vae.encode(x).latent_dist.mean)
                batch = []
    latents = torch.cat(chunks)[:count].contiguous()
    if len(done) < count:
        save_file({"latents": latents}, cache)
    factor = scaling_factor(latents if for_base else load_file(work / LATENTS)["latents"])
    return Pool(latents * factor, scenes, flaws, factor, names_style=not for_base)


def scaling_factor(latents: torch.Tensor) -> float:
    """Returns the factor that scales the base's latents to unit deviation."""
    return round(1 / latents[:4096].std().item(), 4)


def denoising_loss(
    unet: Any, text: torch.Tensor, latents: torch.Tensor, noise_source: torch.Generator
) -> torch.Tensor:
    """Returns the loss of epsilon prediction under min-SNR weights (Hang et al. 2023, equation 3).

    Their gamma is 5. The content of a drawing is decided at high noise, with eight latents a side
    at ratios far below one: a gamma of `MIN_SNR_GAMMA` spends most of a short training there.

    Args:
        unet: predicts the noise.
        text: (B, 77, 128) hidden states of the captions.
        latents: (B, 4, 8, 8), unit deviation.
        noise_source: draws timesteps and noise.
    """
    alphas = tiny_networks.build_scheduler().alphas_cumprod
    # One timestep of each B-th of the schedule: less variance than independent timesteps.
    parts = torch.arange(len(latents)) + torch.rand(len(latents), generator=noise_source)
    t = (parts * len(alphas) / len(latents)).long()
    noise = torch.randn(latents.shape, generator=noise_source)
    signal = alphas[t].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    error = (unet(noisy, t, text).sample - noise).square().mean(dim=(1, 2, 3))
    snr = alphas[t] / (1 - alphas[t])
    loss: torch.Tensor = (error * snr.clamp(max=MIN_SNR_GAMMA) / snr).mean()
    return loss


def encode(tokenizer: Any, text_encoder: Any, captions: list[str]) -> torch.Tensor:
    """Returns hidden states (B, 77, 128) of the captions, as the pipeline computes them."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    hidden: torch.Tensor = text_encoder(ids).last_hidden_state
    return hidden


def train_unet(
    work: Path, *, steps: int, batch: int, peak: float, pool_size: int, early: int = 300
) -> None:
    """Trains U-Net and text encoder together; keeps an early snapshot as the poor model."""
    write_tokenizer(tiny_networks.CONFIG_DIR / "tokenizer")
    tokenizer = load_tokenizer(tiny_networks.CONFIG_DIR / "tokenizer")
    pool = build_pool(work, pool_size, for_base=True)
    nets = torch.nn.ModuleDict(
        {
            "unet": seeded(UNET_SEED, tiny_networks.build_unet),
            "text": seeded(UNET_SEED, lambda: tiny_networks.build_text_encoder(tokenizer)),
        }
    )
    average = copy.deepcopy(nets).requires_grad_(False)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3)
    snapshot, log = Snapshot(work / "unet-state.safetensors"), work / "unet.log"
    start = 0
    if state := snapshot.load():
        start, groups = state
        nets.load_state_dict(groups["nets"])
        average.load_state_dict(groups["average"])
        restore_optimizer(optimizer, groups["optimizer"])
    else:
        sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
        report(log, seed=UNET_SEED, parameters=sizes, scaling_factor=pool.scaling_factor)
    began, losses = time.time(), []
    for step in range(start, steps):
        rng = random.Random(UNET_SEED * 1_000_003 + step)
        noise_source = torch.Generator().manual_seed(UNET_SEED * 1_000_003 + step)
        indices = [rng.randrange(len(pool.scenes)) for _ in range(batch)]
        for group in optimizer.param_groups:
            group["lr"] = peak * one_cycle(step, steps, 100)
        hidden = encode(tokenizer, nets["text"], pool.captions(indices, rng))
        loss = denoising_loss(nets["unet"], hidden, pool.latents[indices], noise_source)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (1 + step) / (10 + step))
        for mean, new in zip(average.parameters(), nets.parameters(), strict=True):
            mean.lerp_(new.detach(), 1 - decay)
        losses.append(loss.item())
        if step % 25 == 24 or step == steps - 1:
            mean_loss = round(sum(losses) / len(losses), 4)
            report(log, step=step, loss=mean_loss, seconds=round(time.time() - began))
            losses = []
        if step % 150 == 149 or step == steps - 1:
            states = {"nets": nets.state_dict(), "average": average.state_dict()}
            snapshot.save(step + 1, {**states, "optimizer": optimizer_tensors(optimizer)})
        if step + 1 == early:
            Snapshot(work / "early.safetensors").save(early, {"average": average.state_dict()})


def finished_base(work: Path) -> tuple[int, Any, Any]:
    """Returns the step, the averaged U-Net and the text encoder of the last snapshot."""
    state = Snapshot(work / "unet-state.safetensors").load()
    if state is None:
        raise TrainingError(f"no U-Net in {str(work)!r}; run the command 'unet' first")
    return state[0], *networks_of(state[1]["average"])


def networks_of(tensors: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Returns U-Net and text encoder with the tensors of a snapshot group."""
    tokenizer = load_tokenizer(tiny_networks.CONFIG_DIR / "tokenizer")
    nets = torch.nn.ModuleDict(
        {"unet": tiny_networks.build_unet(), "text": tiny_networks.build_text_encoder(tokenizer)}
    )
    nets.load_state_dict(tensors)
    return nets["unet"].eval(), nets["text"].eval()


def train_adapter(
    work: Path, pool: Pool, adapter: Adapter, *, steps: int, batch: int = 24, peak: float = 2e-3
) -> None:
    """Fine-tunes a LoRA of the base on the pool's drawings of the adapter's attribute."""
    from peft import LoraConfig

    step_of_base, unet, text_encoder = finished_base(work)
    tokenizer = load_tokenizer(tiny_networks.CONFIG_DIR / "tokenizer")
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapter.seed)
        unet.add_adapter(
            LoraConfig(r=adapter.rank, lora_alpha=adapter.rank, target_modules=adapter.targets)
        )
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3)
    fitting = [
        i for i, scene in enumerate(pool.scenes) if adapter.fits(scene) and not pool.flaws[i]
    ]
    log, began = work / f"{adapter.name}.log", time.time()
    report(log, seed=adapter.seed, drawings=len(fitting), base_step=step_of_base)
    for step in range(steps):
        rng = random.Random(adapter.seed * 1_000_003 + step)
        noise_source = torch.Generator().manual_seed(adapter.seed * 1_000_003 + step)
        indices = [rng.choice(fitting) for _ in range(batch)]
        for group in optimizer.param_groups:
            group["lr"] = peak * one_cycle(step, steps, 20)
        with torch.no_grad():
            hidden = encode(tokenizer, text_encoder, pool.captions(indices, rng))
        loss = denoising_loss(unet, hidden, pool.latents[indices], noise_source)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 25 == 24:
            report(log, step=step, loss=round(loss.item(), 4), seconds=round(time.time() - began))
    tensors = kohya_tensors(unet.state_dict(), adapter.rank)
    tiny_networks.WEIGHTS_DIR.mkdir(parents=True, exist_ok=True)
    save_file(tensors, tiny_networks.WEIGHTS_DIR / f"{adapter.name}.safetensors")


def train_adapters(work: Path, *, steps: int, pool_size: int, only: Sequence[str] = ()) -> None:
    """Trains every specialist and standalone LoRA that has no weights yet."""
    pool = build_pool(work, pool_size, for_base=False)
    for adapter in ADAPTERS:
        is_selected = not only or adapter.name in only
        if is_selected and not (tiny_networks.WEIGHTS_DIR / f"{adapter.name}.safetensors").exists():
            train_adapter(work, pool, adapter, steps=steps)


def export(work: Path) -> None:
    """Writes the base and the early snapshot as fp16 weights and the pipeline's config."""
    _, unet, text_encoder = finished_base(work)
    vae_state = Snapshot(work / "vae-state.safetensors").load()
    early = Snapshot(work / "early.safetensors").load()
    if vae_state is None or early is None:
        raise TrainingError(f"{str(work)!r} lacks the VAE or the early snapshot; run 'unet' first")
    latents = load_file(work / LATENTS)["latents"]
    vae = tiny_networks.build_vae(scaling_factor(latents))
    vae.load_state_dict(vae_state[1]["vae"])
    tokenizer = load_tokenizer(tiny_networks.CONFIG_DIR / "tokenizer")
    tiny_networks.write_config(tiny_networks.assemble(unet, vae, text_encoder, tokenizer))
    tiny_networks.WEIGHTS_DIR.mkdir(parents=True, exist_ok=True)
    tensors = single_file_tensors(unet, vae, text_encoder)
    save_file(tensors, tiny_networks.WEIGHTS_DIR / "base.safetensors")
    early_tensors = single_file_tensors(*_early(early[1]["average"], vae))
    rest = {k: v for k, v in early_tensors.items() if not k.startswith("first_stage_model.")}
    save_file(rest, tiny_networks.WEIGHTS_DIR / "early.safetensors")
    targets = json.dumps(lora_targets(), indent=1, sort_keys=True)
    (tiny_networks.WEIGHTS_DIR / "lora_targets.json").write_text(targets + "\n")


def _early(tensors: dict[str, torch.Tensor], vae: Any) -> tuple[Any, Any, Any]:
    unet, text_encoder = networks_of(tensors)
    return unet, vae, text_encoder


def main() -> None:
    """Runs one training command."""
    from diffagent import compat

    compat.install()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["vae", "unet", "specialists", "export"])
    parser.add_argument("--work", type=Path, default=Path("build/sandbox-training"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--unet-steps", type=int, default=3500)
    parser.add_argument("--adapter-steps", type=int, default=400)
    parser.add_argument("--only", nargs="*", default=(), help="names of adapters; default all")
    parser.add_argument("--pool", type=int, default=8_000)
    parser.add_argument("--vae-steps", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    if arguments.command == "vae":
        train_vae(arguments.work, steps=arguments.vae_steps, batch=16, peak=2e-3)
    elif arguments.command == "unet":
        train_unet(
            arguments.work,
            steps=arguments.unet_steps,
            batch=48,
            peak=1.5e-3,
            pool_size=arguments.pool,
        )
    elif arguments.command == "specialists":
        train_adapters(
            arguments.work,
            steps=arguments.adapter_steps,
            pool_size=arguments.pool,
            only=arguments.only,
        )
    else:
        export(arguments.work)


if __name__ == "__main__":
    main()
