"""The diffusers backend: single-file checkpoints, LoRAs, samplers, one picture at a time.

A picture depends on its recipe alone: the noise comes from a generator on the CPU seeded by the
recipe, the scheduler is built anew, LoRAs are taken off before the next ones go on. Pictures
are made one by one: in a batch of another size the same picture differs by some 1e-6, which is
enough to change a pixel here and there (measured on the CPU; batches of 4 are twice as fast).
"""

from __future__ import annotations

import gc
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffagent import compat
from diffagent.errors import RenderError
from diffagent.render.recipe import LoRAUse, Recipe
from diffagent.render.samplers import SAMPLERS
from diffagent.render.weights import Tensor, read_header

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

log = logging.getLogger(__name__)

_NONE: Mapping[str, Path] = {}
_FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
_CROSS_ATTENTION = "attn2.to_k.weight"
_SDXL_ENCODER = "conditioner.embedders.1."


def sandbox_configs() -> list[Path]:
    """Pipeline configurations that ship with the package: those of the sandbox."""
    root = Path(str(resources.files("diffagent.sandbox"))) / "config"
    return _pipelines_below(root)


def local_configs(directory: Path) -> list[Path]:
    """Pipeline configurations below ``directory``: folders with a ``model_index.json``."""
    return [*_pipelines_below(directory), *sandbox_configs()]


def _pipelines_below(root: Path) -> list[Path]:
    return sorted(file.parent for file in root.rglob("model_index.json"))


def find_config(checkpoint: Path, configs: Sequence[Path]) -> Path | None:
    """The configuration whose U-Net has the shapes of the checkpoint's.

    Args:
        checkpoint: a single file in the layout of Stable Diffusion 1.x, 2.x or XL.
        configs: folders in diffusers' layout, without weights.

    Returns:
        None when none fits: then diffusers takes the full-size one from the hub or its cache.

    Raises:
        RenderError: the file is no such checkpoint.
    """
    tensors = read_header(checkpoint)
    if _FIRST_CONVOLUTION not in tensors:
        raise RenderError(
            f"{checkpoint.name!r} is not a Stable Diffusion checkpoint in the single-file layout",
            reason="bad-model-file",
        )
    width, channels = tensors[_FIRST_CONVOLUTION].shape[:2]
    contexts = {t.shape[-1] for name, t in tensors.items() if name.endswith(_CROSS_ATTENTION)}
    is_sdxl = _holds_sdxl(tensors)
    for config in configs:
        unet = json.loads((config / "unet" / "config.json").read_text(encoding="utf-8"))
        fits = (unet["block_out_channels"][0], unet["in_channels"]) == (width, channels)
        if fits and contexts == {unet["cross_attention_dim"]} and _is_sdxl(config) == is_sdxl:
            return config
    return None


def _holds_sdxl(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(_SDXL_ENCODER) for name in tensors)


def _is_sdxl(config: Path) -> bool:
    index = json.loads((config / "model_index.json").read_text(encoding="utf-8"))
    return str(index["_class_name"]).startswith("StableDiffusionXL")


class DiffusersRenderer:
    """Holds one checkpoint with its LoRAs and makes pictures of recipes.

    Runs in float32 on the CPU and MPS, in float16 on CUDA. ``loads`` counts checkpoints loaded
    and ``truncated`` prompts of which CLIP has read only the beginning.
    """

    def __init__(self, device: torch.device, configs: Sequence[Path] = ()) -> None:
        """Nothing is loaded yet; ``configs`` are tried in order, see `find_config`."""
        self.device = device
        self.configs = list(configs)
        self.loads = 0
        self.truncated = 0
        self._pipeline: Any = None
        self._scheduler_config: Any = None
        self._checkpoint: Path | None = None
        self._loras: tuple[Path, ...] = ()
        self._embeddings: tuple[Path, ...] = ()
        self._refused: dict[Path, RenderError] = {}

    def use(
        self, checkpoint: Path, loras: Mapping[str, Path], embeddings: Mapping[str, Path] = _NONE
    ) -> None:
        """Make these files (LoRAs and embeddings by SHA256) the ones that `render` draws with.

        Raises:
            RenderError: a file cannot be loaded; reason 'bad-model-file', 'bad-lora',
                'bad-embedding' or 'out-of-memory'. The renderer stays usable.
        """
        if checkpoint in self._refused:  # loading may be slow to fail: the hub is asked
            raise self._refused[checkpoint]
        if self._checkpoint != checkpoint:
            try:
                self._load(checkpoint)
            except RenderError as error:
                self._refused[checkpoint] = error
                raise
        if self._loras != tuple(loras.values()):
            self._lay(loras)
        if self._embeddings != tuple(embeddings.values()):
            self._embed(embeddings)

    def render(self, recipe: Recipe) -> Image:
        """The picture of a recipe whose models are in use.

        Raises:
            RenderError: reason 'clip-skip', 'embedding-weight', 'out-of-memory', 'nan', 'black'
                or 'render-error'.
        """
        import torch

        pipeline = self._pipeline
        spec = SAMPLERS[recipe.sampler]
        if spec.scheduler is None:
            raise RenderError(f"no scheduler for {recipe.sampler!r}", reason="unsupported-sampler")
        import diffusers

        try:
            scheduler = getattr(diffusers, spec.scheduler)
            pipeline.scheduler = scheduler.from_config(self._scheduler_config, **spec.options)
            self._weigh(recipe.loras)
            with torch.inference_mode():
                pixels = pipeline(
                    **self._conditioning(recipe),
                    num_inference_steps=recipe.steps * spec.steps_multiplier,
                    guidance_scale=recipe.cfg_scale,
                    width=recipe.width,
                    height=recipe.height,
                    generator=torch.Generator("cpu").manual_seed(recipe.seed),
                    output_type="np",
                ).images[0]
        except torch.OutOfMemoryError as error:
            self._free()
            raise RenderError(
                f"{recipe.width}x{recipe.height} does not fit into the memory of {self.device}",
                reason="out-of-memory",
            ) from error
        except (RuntimeError, ValueError, IndexError) as error:
            raise RenderError(
                f"diffusers could not render {recipe.digest[:12]} ({recipe.sampler}, "
                f"{recipe.steps} steps): {type(error).__name__}: {error}",
                reason="render-error",
            ) from error
        return _picture(pixels)

    def _load(self, checkpoint: Path) -> None:
        import torch

        self._pipeline, self._checkpoint, self._loras, self._embeddings = None, None, (), ()
        self._free()
        compat.install()
        import diffusers

        # Bars and per-call remarks (truncation, say) of a library; ours are logged and counted.
        diffusers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.set_verbosity_error()
        config = find_config(checkpoint, self.configs)
        is_sdxl = _holds_sdxl(read_header(checkpoint))
        name = "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline"
        options: dict[str, Any] = {} if is_sdxl else {"safety_checker": None}
        if config:
            options |= {"config": str(config), "local_files_only": True}
        try:
            pipeline = getattr(diffusers, name).from_single_file(
                str(checkpoint),
                torch_dtype=torch.float16 if self.device.type == "cuda" else torch.float32,
                **options,
            )
            self._pipeline = pipeline.to(self.device)
        except torch.OutOfMemoryError as error:
            raise RenderError(
                f"{checkpoint.name!r} does not fit into the memory of {self.device}",
                reason="out-of-memory",
            ) from error
        except Exception as error:  # an untrusted file can make a loader fail in any way
            raise RenderError(
                f"diffusers cannot load {checkpoint.name!r}: {type(error).__name__}: {error}; a "
                "checkpoint that is not the sandbox's needs its pipeline configuration from the "
                "Hugging Face hub or in the folder 'configs' of the model cache",
                reason="bad-model-file",
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        for convolutional in (pipeline.unet, pipeline.vae):  # 15 % faster on a CPU
            convolutional.to(memory_format=torch.channels_last)
        self._scheduler_config = dict(pipeline.scheduler.config)
        self._checkpoint = checkpoint
        self.loads += 1

    def _lay(self, loras: Mapping[str, Path]) -> None:
        from safetensors.torch import load_file

        self._pipeline.unload_lora_weights()
        self._loras = ()
        try:
            for sha256, path in loras.items():
                read_header(path)
                with warnings.catch_warnings():  # peft warns of every second adapter
                    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                    self._pipeline.load_lora_weights(load_file(path), adapter_name=_adapter(sha256))
            if loras:  # fails for a file that had nothing for this checkpoint
                self._pipeline.set_adapters([_adapter(sha256) for sha256 in loras])
        except Exception as error:  # an untrusted file can make a loader fail in any way
            self._pipeline.unload_lora_weights()
            raise RenderError(
                f"LoRA files {[path.name for path in loras.values()]} do not fit the checkpoint: "
                f"{type(error).__name__}: {error}",
                reason="bad-lora",
            ) from error
        self._loras = tuple(loras.values())

    def _embed(self, embeddings: Mapping[str, Path]) -> None:
        from safetensors.torch import load_file

        pipeline = self._pipeline
        if self._embeddings:
            self._unembed()
        try:
            for sha256, path in embeddings.items():
                read_header(path)
                vectors = load_file(path)
                if "clip_g" in vectors:  # SDXL has two text encoders
                    encoders = [("clip_l", pipeline.text_encoder, pipeline.tokenizer)]
                    encoders += [("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2)]
                else:
                    (name,) = vectors  # ``emb_params`` by convention
                    encoders = [(name, pipeline.text_encoder, pipeline.tokenizer)]
                for name, encoder, tokenizer in encoders:
                    pipeline.load_textual_inversion(
                        vectors[name],
                        token=_token(sha256),
                        text_encoder=encoder,
                        tokenizer=tokenizer,
                    )
                self._embeddings = (*self._embeddings, path)
        except Exception as error:  # an untrusted file can make a loader fail in any way
            self._unembed()
            raise RenderError(
                f"embeddings {[path.name for path in embeddings.values()]} do not fit the "
                f"checkpoint: {type(error).__name__}: {error}",
                reason="bad-embedding",
            ) from error

    def _unembed(self) -> None:
        self._pipeline.unload_textual_inversion()
        if hasattr(self._pipeline, "text_encoder_2"):
            self._pipeline.unload_textual_inversion(
                text_encoder=self._pipeline.text_encoder_2, tokenizer=self._pipeline.tokenizer_2
            )
        self._embeddings = ()

    def _weigh(self, loras: Sequence[LoRAUse]) -> None:
        if loras:
            names = [_adapter(lora.sha256) for lora in loras]
            self._pipeline.set_adapters(names, [lora.weight for lora in loras])

    def _conditioning(self, recipe: Recipe) -> dict[str, Any]:
        """Arguments that say what to draw.

        Clip skip is done here, for the negative prompt too, as in the WebUI: diffusers does it
        for the prompt only, and not at all on transformers 5. For SDXL the WebUI ignores it.
        """
        tokenizer, encoder = self._pipeline.tokenizer, self._pipeline.text_encoder
        self.truncated += len(tokenizer(recipe.prompt).input_ids) > tokenizer.model_max_length
        texts = {
            "prompt": _with_tokens(recipe.prompt, recipe, negative=False),
            "negative_prompt": _with_tokens(recipe.negative_prompt, recipe, negative=True),
        }
        if hasattr(self._pipeline, "text_encoder_2"):
            return texts
        layers = encoder.config.num_hidden_layers
        if recipe.clip_skip > layers:
            raise RenderError(
                f"clip_skip {recipe.clip_skip}: the text encoder has {layers} layers",
                reason="clip-skip",
            )
        return {
            f"{name}_embeds": self._encode(text, recipe.clip_skip) for name, text in texts.items()
        }

    def _encode(self, text: str, clip_skip: int) -> torch.Tensor:
        """(1, 77, D) output of CLIP's layer ``clip_skip`` from the end, normalised."""
        tokenizer, encoder = self._pipeline.tokenizer, self._pipeline.text_encoder
        tokens = tokenizer(
            self._pipeline.maybe_convert_prompt(text, tokenizer),  # embeddings of several vectors
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)
        hidden = encoder(tokens, output_hidden_states=True).hidden_states[-clip_skip]
        # transformers 5 has no `text_model` level any more.
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        embeddings: torch.Tensor = norm(hidden)
        return embeddings

    def _free(self) -> None:
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _adapter(sha256: str) -> str:
    return f"lora_{sha256[:16]}"


def _token(sha256: str) -> str:
    return f"<embedding_{sha256[:16]}>"


def _with_tokens(prompt: str, recipe: Recipe, *, negative: bool) -> str:
    """A prompt with the tokens of its embeddings in front.

    Raises:
        RenderError: an embedding has a weight, which this backend cannot give it.
    """
    used = [item for item in recipe.embeddings if item.negative == negative]
    if any(item.weight != 1 for item in used):
        raise RenderError(
            "an embedding's weight is not 1, and this backend does not weigh parts of a prompt",
            reason="embedding-weight",
        )
    return ", ".join([*(_token(item.sha256) for item in used), *([prompt] if prompt else [])])


def _picture(pixels: np.ndarray[Any, np.dtype[np.float32]]) -> Image:
    """An RGB picture of (H, W, 3) values in 0..1."""
    from PIL import Image

    if not np.isfinite(pixels).all():
        raise RenderError("the picture is not a number somewhere", reason="nan")
    values = (pixels * 255).round().astype(np.uint8)
    if not values.any():
        raise RenderError("the picture is black all over", reason="black")
    return Image.fromarray(values)
