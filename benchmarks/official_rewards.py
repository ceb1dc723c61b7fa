"""The official packages' reward models at full size, with random weights in the released layouts.

Their scores on the same file are the reference of tests/rewards/test_full_size.py; the speed of
their own loops is the reference of bench_rewards.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffagent.rewards import official
from diffagent.rewards.scorer import Scorer

CLIP = "ViT-L-14-quickgelu"
METRICS = ("clip", "image_reward", "hps_v2")
FILES = {
    "clip": "ViT-L-14.safetensors",
    "image_reward": "ImageReward.pt",
    "hps_v2": "HPS_v2.1_compressed.pt",
}
WORDS = """a portrait of the old red lighthouse knight robot fox city forest castle woman man in at
    with and on stormy golden misty neon ancient sea night rain light shadow glass fog snow highly
    detailed sharp focus soft cinematic oil painting photograph concept art best quality"""

#: (prompts, files of pictures) -> one score per picture.
Loop = Callable[[Sequence[str], Sequence[Path]], list[float]]


# ---------------------------------------------------------------------------- pictures, prompts


def write_prompts(count: int, candidates: int, seed: int = 0) -> list[str]:
    """Returns a prompt per picture, of 8 to 30 words; ``candidates`` pictures share a prompt."""
    rng, words = np.random.default_rng(seed), WORDS.split()
    distinct = -(-count // candidates)
    texts = [" ".join(rng.choice(words, rng.integers(8, 31))) for _ in range(distinct)]
    return [texts[i // candidates] for i in range(count)]


def write_pictures(directory: Path, count: int, size: int, distinct: int = 256) -> list[Path]:
    """Writes PNG files, soft shapes with some noise; every other one is 1.5 times as wide."""
    files = [directory / f"{number}.png" for number in range(min(count, distinct))]
    directory.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        rng = np.random.default_rng(number)
        shape = (size, size * 3 // 2) if number % 2 else (size, size)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), mode="RGB")
        soft = np.asarray(coarse.resize(shape, Image.Resampling.BICUBIC), np.int16)
        noisy = soft + rng.integers(-6, 7, soft.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8), mode="RGB").save(file)
    return [files[number % len(files)] for number in range(count)]


# ------------------------------------------------------------------------------------- weights


def write_release(metric: str, directory: Path) -> Path:
    """Writes a checkpoint of random weights in the authors' layout, unless it exists."""
    official.install()
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / FILES[metric]
    if metric == "image_reward":
        _write_image_reward_files(directory)
    if file.exists():
        return file
    with torch.device("meta"):
        shapes = _SHAPES[metric](directory)
    state = _randomise(shapes)
    if metric == "clip":
        from safetensors.torch import save_file

        save_file(state, file)
    elif metric == "hps_v2":  # "compressed": half precision, and leftovers of training
        torch.save({"epoch": 0, "name": "hps", "state_dict": state}, file)
    else:
        torch.save(state, file)
    return file


def _randomise(shapes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns values for which scores vary between pictures; initial values give equal scores."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if not shape.is_floating_point():
            state[name] = torch.arange(shape.numel()).view(shape.shape)
        elif name.endswith("logit_scale"):
            state[name] = torch.tensor(4.6)
        elif shape.ndim < 2:  # norms are one, biases small, class tokens neither
            values = 0.02 * torch.randn(shape.shape, generator=generator)
            norm = name.endswith("weight")
            state[name] = values + 1 if norm else values * (20 if "class" in name else 1)
        else:
            inner = shape[0].numel() if "proj" not in name or "weight" in name else shape.shape[0]
            scale = 0.02 if "embed" in name else inner**-0.5
            state[name] = scale * torch.randn(shape.shape, generator=generator)
    dtypes = {True: torch.float16, False: torch.float32}
    half = "blip.visual_encoder.cls_token" not in shapes
    return {
        name: value.to(dtypes[half]) if value.is_floating_point() else value
        for name, value in state.items()
    }


def _clip_shapes(directory: Path) -> dict[str, torch.Tensor]:
    import open_clip
    from open_clip import model

    return model.CLIP(**open_clip.get_model_config(CLIP)).state_dict()


def _hps_shapes(directory: Path) -> dict[str, torch.Tensor]:
    from hpsv2.src.open_clip import get_model_config, model

    return model.CLIP(**get_model_config("ViT-H-14")).state_dict()


def _image_reward_shapes(directory: Path) -> dict[str, torch.Tensor]:
    from ImageReward.ImageReward import ImageReward

    linspace = torch.linspace  # its values are read in the constructor: not on "meta"
    torch.linspace = lambda *a: linspace(*a, device="cpu")  # type: ignore[assignment]
    try:
        with _vocabulary_of(directory):
            return ImageReward(str(directory / "med_config.json")).state_dict()
    finally:
        torch.linspace = linspace


_SHAPES = {"clip": _clip_shapes, "hps_v2": _hps_shapes, "image_reward": _image_reward_shapes}


def _write_image_reward_files(directory: Path) -> None:
    """Writes med_config.json of the release and a vocabulary of BERT's size (no package has it)."""
    from diffagent.rewards.image_reward import ImageRewardConfig

    config = {**ImageRewardConfig().text, "add_cross_attention": True, "encoder_width": 768}
    (directory / "med_config.json").write_text(json.dumps(config))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *dict.fromkeys(WORDS.split())]
    words += [f"filler{number}" for number in range(30522 - len(words))]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")


@contextlib.contextmanager
def _vocabulary_of(directory: Path) -> Iterator[None]:
    """Makes the package read a local vocabulary instead of the hub's."""
    from ImageReward.models.BLIP import blip_pretrain

    original = blip_pretrain.init_tokenizer
    blip_pretrain.init_tokenizer = lambda: original(str(directory))
    try:
        yield
    finally:
        blip_pretrain.init_tokenizer = original


# ----------------------------------------------------------------------------- official, ours


OFFICIAL_LOOPS = {
    "clip": "open_clip's README, a picture at a time: preprocess, tokenize, encode_image, "
    "encode_text, cosine (image-reward's own CLIPScore needs OpenAI's clip, which is not on PyPI)",
    "image_reward": "ImageReward.load once, model.score(prompt, file) a picture at a time",
    "hps_v2": "hpsv2.img_score.score(file, prompt, cp=CHECKPOINT) a picture at a time; "
    "every call loads CHECKPOINT from disk",
    "image_reward by prompt": "model.score(prompt, [files]) once a prompt",
    "hps_v2 by prompt": "hpsv2.img_score.score([files], prompt, cp=CHECKPOINT) once a prompt",
}


def load_official(metric: str, directory: Path, device: str, by_prompt: bool = False) -> Loop:
    """Returns the package's own loop, see `OFFICIAL_LOOPS`. Only hpsv2's loop loads the checkpoint,
    at every call.
    """
    official.install()
    with contextlib.redirect_stdout(sys.stderr):
        return _OFFICIAL[metric](directory, device, by_prompt)


def _official_clip(directory: Path, device: str, by_prompt: bool) -> Loop:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(
        CLIP, pretrained=str(directory / FILES["clip"]), device=device
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer(CLIP)

    def loop(prompts: Sequence[str], files: Sequence[Path]) -> list[float]:
        scores = []
        for prompt, file in zip(prompts, files, strict=True):
            image = preprocess(Image.open(file)).unsqueeze(0).to(device)
            text = tokenizer([prompt]).to(device)
            with torch.no_grad(), torch.autocast("cuda", enabled=device.startswith("cuda")):
                image_features = model.encode_image(image)
                text_features = model.encode_text(text)
                image_features /= image_features.norm(dim=-1, keepdim=True)
                text_features /= text_features.norm(dim=-1, keepdim=True)
            scores.append((image_features.float() @ text_features.float().T).item())
        return scores

    return loop


def _official_image_reward(directory: Path, device: str, by_prompt: bool) -> Loop:
    import ImageReward

    with _vocabulary_of(directory):
        model = ImageReward.load(
            str(directory / FILES["image_reward"]),
            device=device,
            med_config=str(directory / "med_config.json"),
        )
    model.eval()

    @torch.no_grad()
    def loop(prompts: Sequence[str], files: Sequence[Path]) -> list[float]:
        if not by_prompt:
            return [model.score(p, str(f)) for p, f in zip(prompts, files, strict=True)]
        scores: list[float] = []
        for prompt, pictures in _by_prompt(prompts, files):
            rewards = model.score(prompt, pictures)
            scores += rewards if isinstance(rewards, list) else [rewards]
        return scores

    return loop


def _official_hps(directory: Path, device: str, by_prompt: bool) -> Loop:
    os.environ.setdefault("HPS_ROOT", str(directory / "hps"))
    import hpsv2.img_score as package

    # Like its initialize_model, without the CLIP-H that it downloads and `score` overwrites.
    model, _, preprocess = package.create_model_and_transforms(
        "ViT-H-14",
        None,
        precision="amp",
        device=device,
        jit=False,
        force_quick_gelu=False,
        force_custom_text=False,
        force_patch_dropout=False,
        force_image_size=None,
        pretrained_image=False,
        image_mean=None,
        image_std=None,
        light_augmentation=True,
        aug_cfg={},
        output_dict=True,
        with_score_predictor=False,
        with_region_predictor=False,
    )
    package.model_dict.update(model=model, preprocess_val=preprocess)
    package.device = device
    checkpoint = str(directory / FILES["hps_v2"])

    def loop(prompts: Sequence[str], files: Sequence[Path]) -> list[float]:
        calls: list[tuple[str, Any]] = [(p, str(f)) for p, f in zip(prompts, files, strict=True)]
        if by_prompt:
            calls = _by_prompt(prompts, files)
        return [
            float(value)
            for prompt, pictures in calls
            for value in package.score(pictures, prompt, cp=checkpoint)
        ]

    return loop


_OFFICIAL = {
    "clip": _official_clip,
    "image_reward": _official_image_reward,
    "hps_v2": _official_hps,
}


def _by_prompt(prompts: Sequence[str], files: Sequence[Path]) -> list[tuple[str, list[str]]]:
    pairs = groupby(zip(prompts, files, strict=True), key=lambda pair: pair[0])
    return [(prompt, [str(file) for _, file in group]) for prompt, group in pairs]


def load_ours(metric: str, directory: Path, **runtime: Any) -> Scorer:
    """Loads this library's scorer of the same file; see `diffagent.rewards.scorer.Runtime`."""
    from diffagent.rewards.clip import ClipScorer
    from diffagent.rewards.hps import HPSScorer
    from diffagent.rewards.image_reward import ImageRewardScorer
    from diffagent.rewards.scorer import Runtime

    file, settings = directory / FILES[metric], Runtime(**runtime)
    if metric == "clip":
        return ClipScorer.load(CLIP, file, runtime=settings)
    if metric == "hps_v2":
        return HPSScorer.load("v2.1", file, runtime=settings)
    return ImageRewardScorer.load("v1.0", file, vocabulary=directory, runtime=settings)
