"""Single-file checkpoints of Stable Diffusion 1.x, 2.x and XL, loaded without a model hub.

The package carries the architectures (``config/``, diffusers' folders without weights); CLIP's
vocabulary is that of open_clip. Which architecture a file has is read from its tensors' shapes, and
whether it predicts velocity from what is known of it: see `scheduler_overrides`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagent import compat
from diffagent.errors import RenderError
from diffagent.render.renderer import ModelRef
from diffagent.t2i.quantised import check_quantisation, load_tensors
from diffagent.t2i.weights import Tensor, read_header, read_metadata, reading

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
_CROSS_ATTENTION = "attn2.to_k.weight"
_SDXL_ENCODER = "conditioner.embedders.1."
_MERGES = 49152 - 256 - 2  # of the lines in CLIP's vocabulary file, as many as CLIP uses
_V_IN_YAML = re.compile(r"^\s*parameterization:\s*['\"]?v['\"]?\s*$", re.MULTILINE)


@dataclass
class Checkpoint:
    """A loaded checkpoint. ``family``: 'sd1', 'sd2' or 'sdxl'; ``size``: of its weights, bytes."""

    pipeline: Any
    family: str
    scheduler_config: Mapping[str, Any]
    vae: Any
    config: Path

    @property
    def size(self) -> int:
        modules = [m for m in self.pipeline.components.values() if hasattr(m, "parameters")]
        return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())


def shipped_configs() -> list[Path]:
    """Returns the pipeline configurations in the package: Stable Diffusion 1.x, 2.x and XL."""
    return _pipelines_below(Path(str(resources.files("diffagent.render.diffusers"))) / "config")


def local_configs(directories: Iterable[Path]) -> list[Path]:
    """Returns the pipeline configurations below ``directories``, then the package's."""
    local = [path for directory in directories for path in _pipelines_below(directory)]
    return [*local, *shipped_configs()]


def _pipelines_below(root: Path) -> list[Path]:
    return sorted(file.parent for file in root.rglob("model_index.json"))


def find_config(name: str, tensors: Mapping[str, Tensor], configs: Sequence[Path]) -> Path:
    """The configuration whose U-Net has the shapes of the checkpoint's.

    Args:
        name: of the file, for messages.
        tensors: of a single file in the layout of Stable Diffusion 1.x, 2.x or XL.
        configs: folders in diffusers' layout, without weights; the first that fits is taken.

    Raises:
        RenderError: the file is no such checkpoint, or of an architecture that none describes;
            reason 'bad-model-file'.
    """
    if _FIRST_CONVOLUTION not in tensors:
        raise RenderError(
            f"{name!r} is not a Stable Diffusion checkpoint in the single-file layout",
            reason="bad-model-file",
        )
    width, channels = (*tensors[_FIRST_CONVOLUTION].shape, 0, 0)[:2]
    contexts = {t.shape[-1:] for key, t in tensors.items() if key.endswith(_CROSS_ATTENTION)}
    is_sdxl = any(key.startswith(_SDXL_ENCODER) for key in tensors)
    for config in configs:
        unet = json.loads((config / "unet" / "config.json").read_text(encoding="utf-8"))
        fits = (unet["block_out_channels"][0], unet["in_channels"]) == (width, channels)
        if fits and contexts == {(unet["cross_attention_dim"],)} and _is_sdxl(config) == is_sdxl:
            return config
    raise RenderError(
        f"{name!r} is of an architecture that is not known (width {width}, {channels} channels in, "
        f"context {sorted(sum(contexts, ()))}): inpainting models and refiners are not drawn with; "
        "for another, put its pipeline configuration into the folder 'configs' of the model cache",
        reason="bad-model-file",
    )


def _is_sdxl(config: Path) -> bool:
    index = json.loads((config / "model_index.json").read_text(encoding="utf-8"))
    return str(index["_class_name"]).startswith("StableDiffusionXL")


def scheduler_overrides(
    path: Path, tensors: Mapping[str, Tensor], base_model: str = ""
) -> dict[str, Any]:
    """What the noise schedule of a checkpoint has that its architecture does not say.

    A checkpoint predicts velocity when one of these says so: a tensor ``v_pred`` (as NoobAI's has),
    ``modelspec.prediction_type`` in its metadata, a file of the same name that ends in .yaml with
    ``parameterization: "v"`` (as of Stable Diffusion 2), or a base model called '... 768'. A tensor
    ``ztsnr`` says that the last step is pure noise. The tensors are the WebUI's convention.
    """
    metadata = read_metadata(path)
    yaml = path.with_suffix(".yaml")
    says_v = (
        "v_pred" in tensors
        or metadata.get("modelspec.prediction_type", "").lower() in {"v", "v_prediction"}
        or "768" in base_model.split()
        or (yaml.is_file() and _V_IN_YAML.search(yaml.read_text("utf-8", "replace")) is not None)
    )
    overrides: dict[str, Any] = {"prediction_type": "v_prediction"} if says_v else {}
    return overrides | ({"rescale_betas_zero_snr": True} if "ztsnr" in tensors else {})


def load_checkpoint(file: ModelRef, configs: Sequence[Path], dtype: torch.dtype) -> Checkpoint:
    """Load a checkpoint into main memory; nothing is asked of a hub.

    Args:
        file: with a local path.
        configs: see `find_config`.
        dtype: of the weights; SDXL's VAE stays in float32, because it overflows in float16.

    Raises:
        RenderError: 'bad-model-file' or 'out-of-memory'.
    """
    path = local_path(file)
    tensors = read_header(path)
    config = find_config(path.name, tensors, configs)
    has_scales = check_quantisation(path)
    _check_parts(path.name, tensors)
    diffusers = quiet_diffusers()
    family = "sdxl" if _is_sdxl(config) else "sd2" if _is_sd2(config) else "sd1"
    components: dict[str, Any] = {} if family == "sdxl" else {"safety_checker": None}
    components |= _tokenizers(config)
    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    try:
        with _loading(path.name, "cannot be loaded by diffusers"):
            if has_scales:
                components |= _models(load_tensors(path, dtype), config, dtype)
            pipeline = getattr(diffusers, name).from_single_file(
                str(path), config=str(config), torch_dtype=dtype, local_files_only=True,
                **components,
            )  # fmt: skip
        _check_whole(path.name, pipeline)
        if family == "sdxl" and pipeline.vae.config.force_upcast:
            pipeline.vae.float()
    except (MemoryError, RuntimeError) as error:  # all that `reading` lets through
        raise RenderError(
            f"{path.name!r} does not fit into main memory", reason="out-of-memory"
        ) from error
    channels_last(pipeline.unet)
    channels_last(pipeline.vae)
    overrides = scheduler_overrides(path, tensors, file.base_model)
    scheduler_config = {**pipeline.scheduler.config, **overrides}
    return Checkpoint(pipeline, family, scheduler_config, pipeline.vae, config)


def weights_size(path: Path, dtype: torch.dtype) -> int:
    """Bytes that a file's tensors take in memory when they are loaded as ``dtype``."""
    return dtype.itemsize * sum(math.prod(t.shape) for t in read_header(path).values())


def load_vae(file: ModelRef, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A VAE that replaces a checkpoint's own, from a single file.

    Raises:
        RenderError: it is none of this architecture; reason 'bad-vae'.
    """
    path = local_path(file)
    diffusers = quiet_diffusers()
    with _loading(path.name, f"is no VAE for a checkpoint of {checkpoint.family}", "bad-vae"):
        vae = diffusers.AutoencoderKL.from_single_file(
            load_tensors(path, dtype),
            config=str(checkpoint.config),
            subfolder="vae",
            torch_dtype=dtype,
            local_files_only=True,
        )
    return channels_last(vae)


def local_path(file: ModelRef) -> Path:
    """Where a fetched file lies."""
    if file.path is None:
        raise RenderError(f"{file.name!r} was not fetched", reason="download")
    return file.path


def channels_last(module: Any) -> Any:
    """The module with its convolutions' weights in the layout that both CPU and GPU prefer."""
    import torch

    return module.to(memory_format=torch.channels_last)


def quiet_diffusers() -> Any:
    """diffusers without its bars and remarks per call: what matters is logged and counted here."""
    compat.install()
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


@contextlib.contextmanager
def _loading(name: str, problem: str, reason: str = "bad-model-file") -> Iterator[None]:
    """`reading`, and the words for how diffusers fails over tensors that a file lacks."""
    with reading(name, problem, reason):
        try:
            yield
        except KeyError as error:
            raise RenderError(
                f"{name!r} {problem}: it lacks tensor {error}", reason=reason
            ) from error
        except NotImplementedError as error:  # of a parameter that got no data
            raise RenderError(
                f"{name!r} {problem}: it lacks tensors of the architecture; get the whole file",
                reason=reason,
            ) from error


def _models(tensors: dict[str, Any], config: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Build the networks of a pipeline from tensors in memory, as from_single_file does of a file.

    Args:
        tensors: of a single file.
        config: a pipeline's configuration.
        dtype: of the weights.
    """
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model

    index = json.loads((config / "model_index.json").read_text(encoding="utf-8"))
    return {
        name: load_single_file_sub_model(
            library_name=index[name][0],
            class_name=index[name][1],
            name=name,
            checkpoint=dict(tensors),  # some readers take away what they have read
            pipelines=pipelines,
            is_pipeline_module=False,
            cached_model_config_path=str(config),
            local_files_only=True,
            torch_dtype=dtype,
        )
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")
        if name in index
    }


def _check_parts(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise a RenderError when a network of the pipeline is not in the file at all."""
    parts = {"VAE": ("first_stage_model.",), "text encoder": ("cond_stage_model.", "conditioner.")}
    for part, prefixes in parts.items():
        if not any(key.startswith(prefixes) for key in tensors):
            raise RenderError(
                f"{name!r} lacks the {part}, which cannot be had from elsewhere; get the file that "
                "holds the whole checkpoint",
                reason="bad-model-file",
            )


def _check_whole(name: str, pipeline: Any) -> None:
    """Raise a RenderError when tensors were missing: they are still without data."""
    modules = {n: m for n, m in pipeline.components.items() if hasattr(m, "named_parameters")}
    missing = [
        f"{component}.{parameter_name}"
        for component, module in modules.items()
        for parameter_name, parameter in module.named_parameters()
        if parameter.is_meta
    ]
    if missing:
        raise RenderError(
            f"{name!r} lacks {len(missing)} tensors, such as {missing[0]!r}, which cannot be had "
            "from elsewhere",
            reason="bad-model-file",
        )


def _is_sd2(config: Path) -> bool:
    text = json.loads((config / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    return bool(text["hidden_act"] == "gelu")  # OpenCLIP's; OpenAI's CLIP has quick_gelu


def _tokenizers(config: Path) -> dict[str, Any]:
    """The tokenizers that the configuration's folder does not hold."""
    from transformers import CLIPTokenizer

    made: dict[str, Any] = {}
    index = json.loads((config / "model_index.json").read_text(encoding="utf-8"))
    for name in ("tokenizer", "tokenizer_2"):
        files = ("vocab.json", "tokenizer.json")
        if name in index and not any((config / name / file).is_file() for file in files):
            told = json.loads((config / name / "tokenizer_config.json").read_text("utf-8"))
            vocabulary, merges = _clip_vocabulary()
            made[name] = CLIPTokenizer(
                vocab=dict(vocabulary),
                merges=list(merges),
                model_max_length=told["model_max_length"],
                pad_token=told["pad_token"],
            )
    return made


@cache
def _clip_vocabulary() -> tuple[Mapping[str, int], Sequence[tuple[str, str]]]:
    """CLIP's vocabulary and merges, from the copy that open_clip ships."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    file = resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    characters = list(bytes_to_unicode().values())  # in CLIP's order: printable bytes first
    tokens = [
        *characters,
        *(f"{character}</w>" for character in characters),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return {token: number for number, token in enumerate(tokens)}, merges
