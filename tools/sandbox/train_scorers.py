"""Training of the sandbox's three tiny scorers on its own drawings, and their measurement.

    python -m tools.sandbox.train_scorers clip           contrastive, captions of drawings
    python -m tools.sandbox.train_scorers image-reward   BLIP's contrast, then ranking
    python -m tools.sandbox.train_scorers hps            the CLIP, tuned on preferences
    python -m tools.sandbox.train_scorers reference      mean and deviation for z-scores
    python -m tools.sandbox.train_scorers evaluate       matched against mismatched

The committed weights are of this order, with the default numbers of steps.

Each scorer has the architecture of the real one with few parameters. It has learned coloured shapes
on a background and nothing else: its scores are not those of CLIP, ImageReward or HPS v2. Weights
go to ``diffagent/sandbox/weights/scorers``, with the log of their training.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from diffagent import compat
from diffagent.rewards import clip as clip_files
from diffagent.rewards import image_reward as image_reward_files
from diffagent.rewards.clip import ClipScorer
from diffagent.rewards.hps import HPSScorer
from diffagent.rewards.image_reward import ImageRewardConfig, ImageRewardScorer
from diffagent.rewards.scorer import Scorer
from diffagent.sandbox import world
from diffagent.sandbox.files import SCORERS
from diffagent.sandbox.world import Scene
from tools.sandbox import drawings

log = logging.getLogger(__name__)

ATTRIBUTES = {
    "colour": world.COLOURS,
    "shape": world.SHAPES,
    "background": world.BACKGROUNDS,
    "style": world.STYLES,
}
EVENLY = tuple(ATTRIBUTES)
# A tiny network learns shapes last, so the later part of its training varies them most often.
MOSTLY_SHAPES = ("shape", "shape", "shape", "colour", "background", "style")
DEGRADATIONS = ("blur", "noise", "washed out", "coarse")

# Disjoint parts of the scorers' seeds: one number seeds one batch, or one reference prompt.
_FIRST = world.SCORER_SEEDS.start
_STREAMS = {"vocabulary": 0, "clip": 1, "image-reward": 2, "hps": 3, "reference": 4}
_STREAM_LENGTH = 1_000_000

_TAGS = ("best quality", "masterpiece", "highly detailed", "simple", "centered", "sharp focus")
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of open_clip and of ImageReward
_STD = (0.26862954, 0.26130258, 0.27577711)

CLIP_CONFIG: dict[str, Any] = {
    "version": "sandbox-clip-1",
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": world.SIZE,
            "layers": 4,
            "width": 96,
            "head_width": 32,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 32, "width": 96, "heads": 3, "layers": 3},
    },
    "preprocess_cfg": {"mean": _MEAN, "std": _STD},
}
IMAGE_REWARD_CONFIG = ImageRewardConfig(
    version="sandbox-image-reward-1",
    image_size=world.SIZE,
    patch_size=8,
    vision_width=96,
    vision_depth=4,
    vision_heads=3,
    embed_dim=64,
    text={
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    mean=0.0,
    std=1.0,
)


@dataclass(frozen=True)
class Prompt:
    """Caption, and the scene that it demands of a picture."""

    text: str
    scene: Scene
    styled: bool

    def matches(self, scene: Scene) -> bool:
        """Returns whether a drawing of `scene` shows all that the caption names."""
        described = self.scene if self.styled else replace(self.scene, style=scene.style)
        return described == scene


# ---------------------------------------------------------------------------------- drawings


def stream(name: str, number: int) -> random.Random:
    """Returns the generator of batch `number` of a purpose, from the scorers' own seeds."""
    return random.Random(_FIRST + _STREAMS[name] * _STREAM_LENGTH + number)


def write_prompt(scene: Scene, rng: random.Random, *, styled: bool | None = None) -> Prompt:
    """Returns a caption of the scene; a quarter end with the praise that is common in prompts."""
    styled = rng.random() < 0.5 if styled is None else styled
    text = world.caption(scene, rng, with_style=styled)
    if rng.random() < 0.25:
        text = ", ".join([text, *rng.sample(_TAGS, rng.randrange(1, 3))])
    return Prompt(text, scene, styled)


def vary(scene: Scene, attributes: Iterable[str], rng: random.Random) -> Scene:
    """Returns the scene with other values of `attributes`; not held out unless the scene is."""
    attributes = tuple(attributes)
    while True:
        other = replace(
            scene,
            **{
                name: rng.choice([v for v in ATTRIBUTES[name] if v != getattr(scene, name)])
                for name in attributes
            },
        )
        if world.is_held_out(scene) or not world.is_held_out(other):
            return other


def degrade(image: Image.Image, kind: str, strength: float, rng: random.Random) -> Image.Image:
    """Returns a worse copy of a picture.

    Args:
        image: RGB.
        kind: one of `DEGRADATIONS`; ``coarse`` is the blur of a poor VAE or of few steps.
        strength: 0 (hardly visible) to 1.
        rng: source of the noise.
    """
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.7 + 2.0 * strength))
    if kind == "coarse":
        side = round(image.width / (2 + 3 * strength))
        small = image.resize((side, side), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float64)
    if kind == "washed out":
        pixels = pixels + (150 - pixels) * (0.3 + 0.45 * strength)
    else:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(pixels.shape)
        pixels = pixels + (12 + 45 * strength) * noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), mode="RGB")


def as_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Returns normalised pixels (B, 3, H, W) float32, equal to the scorers' preprocessing."""
    array = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255
    normalised = (array - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous()


def family_batch(
    rng: random.Random, families: int, varied: Sequence[str] = EVENLY
) -> tuple[list[Prompt], list[Scene], list[Image.Image]]:
    """Returns scenes in families of four that differ in one attribute: hard negatives.

    The attribute is one of `varied`, where a name may occur several times.
    """
    prompts, scenes, images = [], [], []
    for _ in range(families):
        base = world.sample_scene(rng)
        for scene in (base, *(vary(base, [rng.choice(varied)], rng) for _ in range(3))):
            image = drawings.draw(scene, rng)
            # Generated pictures are softer than drawings; the scorer must still recognise them.
            if rng.random() < 0.3:
                image = degrade(image, rng.choice(DEGRADATIONS), rng.uniform(0, 0.5), rng)
            prompts.append(write_prompt(scene, rng))
            scenes.append(scene)
            images.append(image)
    return prompts, scenes, images


def ranked_pictures(
    prompt: Prompt, rng: random.Random, varied: Sequence[str] = EVENLY
) -> tuple[list[Image.Image], list[tuple[int, int]]]:
    """Returns five pictures for a prompt, and their order.

    Returns:
        pictures (matching, matching but degraded, one attribute wrong, the same degraded, all
        wrong) and pairs (better, worse). Only an attribute that the prompt names is changed: a
        style that it does not name cannot be wrong.
    """
    named = [name for name in varied if prompt.styled or name != "style"]
    near = drawings.draw(vary(prompt.scene, [rng.choice(named)], rng), rng)
    match = drawings.draw(prompt.scene, rng)
    far = drawings.draw(vary(prompt.scene, ["shape", "colour", "background"], rng), rng)
    kind, strength = rng.choice(DEGRADATIONS), rng.uniform(0.2, 1.0)
    pictures = [
        match,
        degrade(match, kind, strength, rng),
        near,
        degrade(near, kind, strength, rng),
        far,
    ]
    pairs = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]
    return pictures, pairs


# -------------------------------------------------------------------------------- vocabularies


def world_words() -> list[str]:
    """Returns every word that captions and tags use, sorted."""
    rng = stream("vocabulary", 0)
    texts = [world.caption(world.sample_scene(rng), rng) for _ in range(20_000)]
    return sorted({word for text in [*texts, *_TAGS] for word in _split(text)})


def _split(text: str) -> list[str]:
    spaced = "".join(c if c.isalnum() else f" {c} " for c in text.lower())
    return spaced.split()


def write_bpe_vocabulary(path: Path) -> int:
    """Writes those of CLIP's 48,894 merges that the world's words need, in their order.

    Returns:
        The number of tokens: bytes twice, the merges, and the start and end tokens.
    """
    compat.install()
    import open_clip

    full = open_clip.SimpleTokenizer()
    needed: set[tuple[str, str]] = set()
    for word in world_words():
        parts = [full.byte_encoder[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: full.bpe_ranks.get(pair, math.inf))
            if best not in full.bpe_ranks:
                break
            needed.add(best)
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
    merges = sorted(needed, key=full.bpe_ranks.__getitem__)
    # The reader skips the first line, and reads an empty last line as a merge.
    lines = ["#version: merges of CLIP that the sandbox needs", *(" ".join(m) for m in merges)]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return 512 + len(merges) + 2


def write_wordpiece_vocabulary(path: Path) -> int:
    """Writes BERT's special tokens, single characters and the world's words.

    Returns:
        The number of tokens, including the two that BLIP appends.
    """
    characters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-&+/"]
    words = [word for word in world_words() if len(word) > 1]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *characters, *(f"##{c}" for c in characters), *words]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens) + 2


# ------------------------------------------------------------------------------------ training


def optimise(
    module: torch.nn.Module,
    loss_of_batch: Callable[[int], tuple[torch.Tensor, float]],
    *,
    name: str,
    steps: int,
    learning_rate: float,
    log_every: int = 50,
) -> None:
    """Trains with AdamW, warm-up over a tenth of the steps, and cosine decay to zero.

    Args:
        module: trained in place; all of its parameters that require a gradient.
        loss_of_batch: number of the step -> (loss, accuracy in 0..1 for the log).
        name: for the log.
        steps: of the optimiser.
        learning_rate: at its peak.
        log_every: steps between log lines, which state means since the previous line.
    """
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(
            (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / steps)
        ),
    )
    module.train()
    started, recent = time.monotonic(), list[tuple[float, float]]()
    for step in range(steps):
        loss, accuracy = loss_of_batch(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent.append((loss.item(), accuracy))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            means = np.mean(recent, axis=0)
            elapsed = time.monotonic() - started
            log.info(
                "%s step %d/%d loss %.4f accuracy %.3f, %.0f s",
                *(name, step + 1, steps, means[0], means[1], elapsed),
            )
            recent.clear()
    module.eval()


def contrastive_loss(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, matches: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Returns CLIP's symmetric loss for pictures that may match several captions of the batch.

    Args:
        image: (B, D) features.
        text: (B, D) features.
        scale: of the cosines.
        matches: (B, B) 0/1, picture by caption; the diagonal is 1.

    Returns:
        The loss, and the share of pictures whose best caption matches.
    """
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    by_image = matches / matches.sum(1, keepdim=True)
    by_text = (matches / matches.sum(0, keepdim=True)).T
    loss = (F.cross_entropy(logits, by_image) + F.cross_entropy(logits.T, by_text)) / 2
    hits = matches.gather(1, logits.argmax(1, keepdim=True))
    return loss, hits.mean().item()


def match_matrix(prompts: Sequence[Prompt], scenes: Sequence[Scene]) -> torch.Tensor:
    """Returns (pictures, captions): 1.0 where the picture matches the caption."""
    return torch.tensor([[float(p.matches(s)) for p in prompts] for s in scenes])


def train_clip(directory: Path, *, steps: int, families: int = 24) -> None:
    """Trains the tiny CLIP and writes it in open_clip's directory layout.

    Args:
        directory: target.
        steps: of the optimiser; the second half varies mostly shapes.
        families: of four scenes each, per batch.
    """
    compat.install()
    from open_clip.model import CLIP

    vocab_size = write_bpe_vocabulary(directory / clip_files.VOCABULARY)
    config = json.loads(json.dumps(CLIP_CONFIG))
    config["model_cfg"]["text_cfg"]["vocab_size"] = vocab_size
    _write_json(directory / clip_files.CONFIG, config)
    model = CLIP(**config["model_cfg"])
    log.info("CLIP: %d parameters, %d tokens", _count(model), vocab_size)
    tokenizer = clip_files.directory_tokenizer(directory)

    def loss_of_batch(step: int) -> tuple[torch.Tensor, float]:
        rng = stream("clip", step)
        varied = EVENLY if step < steps // 2 else MOSTLY_SHAPES
        prompts, scenes, images = family_batch(rng, families, varied)
        ids = tokenizer([p.text for p in prompts])
        return contrastive_loss(
            model.encode_image(as_pixels(images)),
            model.encode_text(ids),
            model.logit_scale.exp().clamp(max=100),
            match_matrix(prompts, scenes),
        )

    optimise(model, loss_of_batch, name="clip", steps=steps, learning_rate=1e-3)
    _save(model, directory / clip_files.WEIGHTS)


def train_hps(directory: Path, *, steps: int, prompts_per_step: int = 20) -> None:
    """Tunes a copy of the tiny CLIP on preferences, as HPS v2 tunes OpenCLIP (section 4).

    For each pair of pictures of one prompt, cross-entropy over the two scaled cosines.
    """
    compat.install()
    from open_clip.model import CLIP

    source = directory.parent / "clip"
    config = json.loads((source / clip_files.CONFIG).read_text(encoding="utf-8"))
    _write_json(directory / clip_files.CONFIG, {**config, "version": "sandbox-hps-1"})
    vocabulary = (source / clip_files.VOCABULARY).read_bytes()
    (directory / clip_files.VOCABULARY).write_bytes(vocabulary)
    model = CLIP(**config["model_cfg"])
    model.load_state_dict(load_file(source / clip_files.WEIGHTS))
    # The CLIP's temperature is sharp, for a hundred captions; two pictures need a softer one.
    model.logit_scale.data.fill_(math.log(30.0))
    model.logit_scale.requires_grad_(False)
    tokenizer = clip_files.directory_tokenizer(directory)

    def loss_of_batch(step: int) -> tuple[torch.Tensor, float]:
        rng = stream("hps", step)
        prompts = [write_prompt(world.sample_scene(rng), rng) for _ in range(prompts_per_step)]
        pictures, pairs = _ranked_batch(prompts, rng, MOSTLY_SHAPES)
        image = F.normalize(model.encode_image(as_pixels(pictures)), dim=-1)
        ids = tokenizer([p.text for p in prompts])
        text = F.normalize(model.encode_text(ids), dim=-1)
        per_prompt = image.view(len(prompts), -1, image.shape[-1])
        cosines = (per_prompt * text[:, None]).sum(-1).flatten()
        return ranking_loss(model.logit_scale.exp() * cosines, pairs)

    optimise(model, loss_of_batch, name="hps", steps=steps, learning_rate=3e-4)
    _save(model, directory / clip_files.WEIGHTS)


def _ranked_batch(
    prompts: Sequence[Prompt], rng: random.Random, varied: Sequence[str] = EVENLY
) -> tuple[list[Image.Image], torch.Tensor]:
    """Returns pictures of all prompts in a row, and (P, 2) positions of (better, worse)."""
    pictures: list[Image.Image] = []
    pairs: list[tuple[int, int]] = []
    for prompt in prompts:
        ranked, ranks = ranked_pictures(prompt, rng, varied)
        pairs.extend((len(pictures) + better, len(pictures) + worse) for better, worse in ranks)
        pictures.extend(ranked)
    return pictures, torch.tensor(pairs)


def ranking_loss(scores: torch.Tensor, pairs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Returns the mean of -log sigmoid(better - worse) over pairs (ImageReward, equation 1).

    Args:
        scores: (N,).
        pairs: (P, 2) positions of the better and of the worse picture.

    Returns:
        The loss, and the share of pairs in the right order.
    """
    difference = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    return -F.logsigmoid(difference).mean(), (difference > 0).float().mean().item()


def train_image_reward(directory: Path, *, contrastive_steps: int, steps: int) -> None:
    """Trains the tiny ImageReward: BLIP's contrast first, as in its pretraining, then ranks.

    The image encoder starts from the tiny CLIP's, as BLIP's starts from an ImageNet ViT.

    Args:
        directory: target; the CLIP is in the directory ``clip`` next to it.
        contrastive_steps: of the first part.
        steps: of the second part.
    """
    text = {
        **IMAGE_REWARD_CONFIG.text,
        "vocab_size": write_wordpiece_vocabulary(directory / "vocab.txt"),
    }
    config = replace(IMAGE_REWARD_CONFIG, text=text)
    model = image_reward_files.build_model(config)
    tokenizer = image_reward_files.load_tokenizer(directory)
    log.info("ImageReward: %d parameters, %d tokens", _count(model), text["vocab_size"])
    _pretrain(model, tokenizer, directory.parent / "clip", contrastive_steps)

    def loss_of_batch(step: int) -> tuple[torch.Tensor, float]:
        rng = stream("image-reward", contrastive_steps + step)
        texts, images, shown, pairs = _reward_batch(rng)
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        # A picture is encoded once, for any number of prompts.
        embedded = model.blip.visual_encoder(as_pixels(images))[shown]
        hidden = model.blip.text_encoder(
            encoded.input_ids,
            attention_mask=encoded.attention_mask,
            encoder_hidden_states=embedded,
        ).last_hidden_state
        return ranking_loss(model.mlp.layers(hidden[:, 0])[:, 0], pairs)

    optimise(model, loss_of_batch, name="image-reward", steps=steps, learning_rate=1.2e-3)
    _save(model, directory / image_reward_files.WEIGHTS)
    _write_json(directory / image_reward_files.CONFIG, asdict(config))
    # The release is standardised over its authors' pictures; here reference drawings are used.
    raw = ImageRewardScorer.load(str(directory)).score(*_reference_set())
    config = replace(config, mean=float(raw.scores.mean()), std=float(raw.scores.std()))
    log.info("raw reward on reference drawings: mean %.4f std %.4f", config.mean, config.std)
    _write_json(directory / image_reward_files.CONFIG, asdict(config))


def _reward_batch(
    rng: random.Random, families: int = 8, prompts: int = 6
) -> tuple[list[str], list[Image.Image], torch.Tensor, torch.Tensor]:
    """Returns prompts with pictures of their family, and others with better and worse pictures.

    Returns:
        texts (N), pictures (M), the index of the picture of each text (N,), and (P, 2) positions
        among the N of the better and of the worse picture.
    """
    family, scenes, images = family_batch(rng, families, MOSTLY_SHAPES)
    texts, shown, pairs = list[str](), list[int](), list[tuple[int, int]]()
    for number, prompt in enumerate(family):
        relatives = range(number // 4 * 4, number // 4 * 4 + 4)
        wrong = [i for i in relatives if not prompt.matches(scenes[i])]
        pairs.extend((len(texts), len(texts) + k) for k in range(1, len(wrong) + 1))
        shown.extend([number, *wrong])
        texts.extend([prompt.text] * (1 + len(wrong)))
    for _ in range(prompts):
        prompt = write_prompt(world.sample_scene(rng), rng)
        pictures, ranks = ranked_pictures(prompt, rng, MOSTLY_SHAPES)
        pairs.extend((len(texts) + better, len(texts) + worse) for better, worse in ranks)
        shown.extend(range(len(images), len(images) + len(pictures)))
        texts.extend([prompt.text] * len(pictures))
        images.extend(pictures)
    return texts, images, torch.tensor(shown), torch.tensor(pairs)


def _pretrain(model: Any, tokenizer: Any, clip: Path, steps: int) -> None:
    source = ClipScorer.load(str(clip))
    log.info("image encoder from %s %s", source.version, source.digest[:12])
    start_from_clip(model.blip.visual_encoder, source.model.visual)
    _pretrain_blip(model.blip, tokenizer, steps)
    for layer in model.mlp.layers:
        # Small initial weights suit 768 inputs; here the output would be almost zero.
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_normal_(layer.weight)


@torch.no_grad()
def start_from_clip(encoder: Any, clip: Any) -> None:
    """Copies a ViT of open_clip into BLIP's; they differ only in CLIP's first layer norm.

    That norm is folded into the embeddings: exactly for the class token, and for patches with
    the mean deviation of the tokens of reference drawings, as BLIP has no norm there.
    """
    first = clip.ln_pre
    place = clip.positional_embedding
    patches = clip.conv1(as_pixels(_reference_set(16)[1])).flatten(2).mT + place[1:]
    gain = first.weight / patches.std(-1, correction=0).mean()

    def folded(embedding: torch.Tensor) -> torch.Tensor:
        centred: torch.Tensor = (embedding - embedding.mean(-1, keepdim=True)) * gain
        return centred

    encoder.cls_token.copy_(first(clip.class_embedding + place[0]))
    encoder.pos_embed[:, 0] = 0
    encoder.pos_embed[:, 1:] = folded(place[1:]) + first.bias
    encoder.patch_embed.proj.weight.copy_(folded(clip.conv1.weight.movedim(0, -1)).movedim(-1, 0))
    encoder.patch_embed.proj.bias.zero_()
    for ours, theirs in zip(encoder.blocks, clip.transformer.resblocks, strict=True):
        state = {
            "norm1": theirs.ln_1,
            "attn.proj": theirs.attn.out_proj,
            "norm2": theirs.ln_2,
            "mlp.fc1": theirs.mlp.c_fc,
            "mlp.fc2": theirs.mlp.c_proj,
        }
        for name, module in state.items():
            ours.get_submodule(name).load_state_dict(module.state_dict())
        ours.attn.qkv.weight.copy_(theirs.attn.in_proj_weight)
        ours.attn.qkv.bias.copy_(theirs.attn.in_proj_bias)
    encoder.norm.load_state_dict(clip.ln_post.state_dict())


def _pretrain_blip(blip: Any, tokenizer: Any, steps: int, families: int = 20) -> None:
    scale = torch.tensor(1 / 0.07)  # BLIP's initial temperature

    def loss_of_batch(step: int) -> tuple[torch.Tensor, float]:
        rng = stream("image-reward", step)
        prompts, scenes, images = family_batch(rng, families, MOSTLY_SHAPES)
        encoded = tokenizer([p.text for p in prompts], padding=True, return_tensors="pt")
        hidden = blip.text_encoder(
            encoded.input_ids,
            attention_mask=encoded.attention_mask,
        ).last_hidden_state
        return contrastive_loss(
            blip.vision_proj(blip.visual_encoder(as_pixels(images))[:, 0]),
            blip.text_proj(hidden[:, 0]),
            scale,
            match_matrix(prompts, scenes),
        )

    optimise(blip, loss_of_batch, name="blip", steps=steps, learning_rate=5e-4)


# ------------------------------------------------------------------------ reference, evaluation


def load_sandbox_scorers(root: Path) -> list[Scorer]:
    """Loads the three tiny scorers of a directory."""
    return [
        ClipScorer.load(str(root / "clip")),
        ImageRewardScorer.load(str(root / "image_reward")),
        HPSScorer.load(str(root / "hps_v2")),
    ]


def _reference_set(prompts: int = 400) -> tuple[list[str], list[Image.Image]]:
    texts, pictures = [], []
    for number in range(prompts):
        rng = stream("reference", number)
        prompt = write_prompt(world.sample_scene(rng), rng)
        ranked, _ = ranked_pictures(prompt, rng)
        texts.extend([prompt.text] * len(ranked))
        pictures.extend(ranked)
    return texts, pictures


def measure_reference(root: Path) -> None:
    """Writes mean and deviation of each scorer over matching, worse and wrong drawings."""
    texts, pictures = _reference_set()
    metrics = {}
    for scorer in load_sandbox_scorers(root):
        scores = scorer.score(texts, pictures).scores.astype(np.float64)
        mean, std = round(float(scores.mean()), 6), round(float(scores.std()), 6)
        metrics[scorer.name] = {
            "mean": mean,
            "std": std,
            "digest": scorer.digest,
            "version": scorer.version,
        }
        log.info("%s mean %.4f std %.4f over %d", scorer.name, mean, std, len(texts))
    _write_json(
        root / "reference.json",
        {
            "note": "SANDBOX: tiny scorers over 400 prompts x 5 drawings, a fifth of which match",
            "pictures": len(texts),
            "metrics": metrics,
        },
    )


def evaluate(root: Path, *, prompts: int = 400) -> dict[str, dict[str, float]]:
    """Measures how often the matching picture outscores another one, on unseen drawings.

    Returns:
        comparison -> metric -> share in 0..1. ``shape`` and so on change only that attribute;
        ``... (held out)`` does so among combinations that no training has shown; the kinds of
        degradation compare a clean match with its degraded copy.
    """
    scorers = load_sandbox_scorers(root)
    rows: dict[str, dict[str, float]] = {}
    cases = [(name, held_out) for held_out in (False, True) for name in ATTRIBUTES]
    for block, (name, held_out) in enumerate(cases):
        triples = list(_mismatches(name, held_out, block * prompts, prompts))
        rows[f"{name} (held out)" if held_out else name] = _win_rates(scorers, triples)
    for block, kind in enumerate(DEGRADATIONS, start=len(cases)):
        triples = list(_degraded(kind, block * prompts, prompts))
        rows[kind] = _win_rates(scorers, triples)
    return rows


Triple = tuple[str, Image.Image, Image.Image]


def _mismatches(name: str, held_out: bool, first: int, count: int) -> Iterator[Triple]:
    for number in range(first, first + count):
        rng = random.Random(world.EVALUATION_SEEDS.start + number)
        scene = world.sample_scene(rng, held_out=held_out)
        prompt = write_prompt(scene, rng, styled=True if name == "style" else None)
        # Both are placed at random, so that only the attribute distinguishes them.
        yield prompt.text, drawings.draw(scene, rng), drawings.draw(vary(scene, [name], rng), rng)


def _degraded(kind: str, first: int, count: int) -> Iterator[Triple]:
    for number in range(first, first + count):
        rng = random.Random(world.EVALUATION_SEEDS.start + number)
        scene = world.sample_scene(rng)
        clean = drawings.draw(scene, rng)
        worse = degrade(clean, kind, rng.uniform(0.2, 1.0), rng)
        yield write_prompt(scene, rng).text, clean, worse


def _win_rates(scorers: Sequence[Scorer], triples: Sequence[Triple]) -> dict[str, float]:
    texts = [text for text, _, _ in triples]
    rates = {}
    for scorer in scorers:
        better = scorer.score(texts, [good for _, good, _ in triples]).scores
        worse = scorer.score(texts, [bad for _, _, bad in triples]).scores
        rates[scorer.name] = round(float((better > worse).mean()), 4)
    return rates


# --------------------------------------------------------------------------------- command line


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _save(module: torch.nn.Module, path: Path) -> None:
    """Writes fp16 safetensors; buffers of integers keep their type."""
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().clone()
        for name, tensor in module.state_dict().items()
    }
    save_file(state, path)
    log.info("wrote %s: %d bytes", path.name, path.stat().st_size)


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _logged(directory: Path, seed: int) -> Iterator[None]:
    """Seeds torch for this run only, and writes its log next to its results."""
    directory.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(directory / "training.log", mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arguments = [word for word in sys.argv[1:] if not word.startswith("--out=")]
        log.info("python -m tools.sandbox.train_scorers %s", shlex.join(arguments))
        log.info("seed %d, torch %s, %d threads", seed, torch.__version__, torch.get_num_threads())
        yield
    log.removeHandler(handler)
    handler.close()


def _table(rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = ["share of pairs in which the matching, clean picture scores higher"]
    lines.append(f"{'changed':26}" + "".join(f"{name:>14}" for name in columns))
    for name, rates in rows.items():
        lines.append(f"{name:26}" + "".join(f"{rates[column]:14.1%}" for column in columns))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; see the module's text."""
    parser = argparse.ArgumentParser(description="Train or measure the sandbox's tiny scorers.")
    names = ("clip", "image-reward", "hps", "reference", "evaluate")
    parser.add_argument("what", choices=names)
    parser.add_argument("--steps", type=int, help="of the optimiser (contrast or ranking)")
    parser.add_argument("--contrastive-steps", type=int, default=400, help="image-reward only")
    parser.add_argument("--prompts", type=int, default=400, help="evaluate only: per comparison")
    parser.add_argument("--seed", type=int, default=0, help="of weights and dropout")
    parser.add_argument("--out", type=Path, default=SCORERS, help="directory")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)  # only of this module: open_clip logs a lot
    root: Path = options.out
    if options.what == "clip":
        with _logged(root / "clip", options.seed):
            train_clip(root / "clip", steps=options.steps or 2000)
    elif options.what == "hps":
        with _logged(root / "hps_v2", options.seed):
            train_hps(root / "hps_v2", steps=options.steps or 400)
    elif options.what == "image-reward":
        with _logged(root / "image_reward", options.seed):
            train_image_reward(
                root / "image_reward",
                contrastive_steps=options.contrastive_steps,
                steps=options.steps or 2000,
            )
    elif options.what == "reference":
        measure_reference(root)
    else:
        rows = evaluate(root, prompts=options.prompts)
        _write_json(root / "evaluation.json", {"prompts": options.prompts, "win_rates": rows})
        log.info("%s", _table(rows))


if __name__ == "__main__":
    main()
