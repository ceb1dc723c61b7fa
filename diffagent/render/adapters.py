"""What is laid over a checkpoint: LoRAs, merged into its weights, and textual inversions.

A LoRA's product is added to the weights instead of being run beside them: a step then costs what it
costs without LoRA, any number of them costs the same, and going from one set to the next takes as
long as the additions. The weights underneath are kept, so that taking a LoRA off leaves no trace.
Names are translated by diffusers (kohya's, SDXL's own block numbers, diffusers' old and new ones).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagent.errors import RenderError
from diffagent.render.weights import read_header

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: (component, module) -> (up, down): the module's weight grows by up @ down.
LoRA = Mapping[tuple[str, str], "tuple[torch.Tensor, torch.Tensor]"]

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
#: Parts of tensor names that tell of decompositions that diffusers does not read.
_FOREIGN = {
    "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "Tucker", "oft_": "OFT",
    "on_input": "IA3", ".diff": "full difference",
}  # fmt: skip


def read_lora(path: Path, pipeline: Any) -> LoRA:
    """A LoRA's factors by the modules of ``pipeline`` that they change.

    Raises:
        RenderError: 'bad-model-file' (no safetensors), or 'bad-lora': a decomposition that is not
            supported, or no module of this pipeline in it.
    """
    from safetensors.torch import load_file

    read_header(path)
    tensors = load_file(path)
    for part, name in _FOREIGN.items():
        if any(part in key for key in tensors):
            raise _unfit(path, f"it is a {name} file, which diffusers does not read")
    try:
        pairs = _pairs(_alphas_applied(tensors), pipeline)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise _unfit(path, f"its tensor names are unknown ({error})") from error
    known: LoRA = {key: pair for key, pair in pairs.items() if _module(pipeline, *key) is not None}
    if not known:
        raise _unfit(path, "it has nothing for this checkpoint")
    if len(known) < len(pairs):
        log.warning(
            "%s: %d of its %d layers are not in this checkpoint and are left out",
            path.name, len(pairs) - len(known), len(pairs),
        )  # fmt: skip
    for key, (up, down) in known.items():
        weight = _module(pipeline, *key).weight
        if up.flatten(1).shape[1] != down.shape[0] or not _fits(up, down, weight):
            raise _unfit(
                path,
                f"{'.'.join(key)} is {tuple(weight.shape)} there and "
                f"{tuple(up.shape)} x {tuple(down.shape)} here",
            )
    return known


def _fits(up: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> bool:
    return up.shape[0] == weight.shape[0] and down[0].numel() == weight[0].numel()


def _alphas_applied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """kohya's alphas (strength = alpha / rank) multiplied into the up factors."""
    for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
        stem = key.removesuffix(".lora_down.weight")
        alpha = tensors.pop(f"{stem}.alpha", None)
        if alpha is not None:
            up = tensors[f"{stem}.lora_up.weight"].float()
            tensors[f"{stem}.lora_up.weight"] = up * (float(alpha) / tensors[key].shape[0])
    return tensors


def _pairs(
    tensors: dict[str, torch.Tensor], pipeline: Any
) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    state, _ = pipeline.lora_state_dict(tensors, unet_config=pipeline.unet.config)
    pairs = {}
    for component in _COMPONENTS:
        prefix = f"{component}."
        part = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        if not part:
            continue
        if component == "unet":
            part = convert_unet_state_dict_to_peft(part)
        else:
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
        for key, down in part.items():
            name, found, _ = key.partition(".lora_A")
            if found:
                pairs[component, name] = (part[key.replace(".lora_A", ".lora_B")], down)
    return pairs


def _module(pipeline: Any, component: str, name: str) -> Any:
    """A module by its name, with or without transformers' former level ``text_model``."""
    root = getattr(pipeline, component, None)
    for candidate in (name, name.removeprefix("text_model.")):
        try:
            return root.get_submodule(candidate) if root else None
        except AttributeError:
            continue
    return None


def _unfit(path: Path, problem: str) -> RenderError:
    return RenderError(f"LoRA {path.name!r} does not fit: {problem}", reason="bad-lora")


class LoRAOverlay:
    """The LoRAs that are merged into a pipeline's weights at present."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._originals: dict[tuple[str, str], torch.Tensor] = {}
        self._merged: set[tuple[str, str]] = set()

    @property
    def on_text(self) -> bool:
        """Whether any of them changes a text encoder."""
        return any(component != "unet" for component, _ in self._merged)

    def lay(self, loras: Sequence[tuple[LoRA, float]]) -> None:
        """Replace what is merged by these LoRAs with these strengths.

        The sum is made in float32 and rounded once to the weights' own precision.
        """
        import torch

        self.remove()
        for key in dict.fromkeys(key for lora, _ in loras for key in lora):
            parameter = _module(self._pipeline, *key).weight
            self._keep(key, parameter)
            total = parameter.data.float()
            for lora, strength in loras:
                if key in lora:
                    up, down = (part.to(total.device, torch.float32) for part in lora[key])
                    delta = up.flatten(1) @ down.flatten(1)
                    total = total + strength * delta.reshape(total.shape)
            # New storage in the layout of the old: the kept original must not be written to.
            parameter.data = torch.empty_like(parameter.data).copy_(total)
            self._merged.add(key)

    def remove(self) -> None:
        """Put the checkpoint's own weights back."""
        for key in self._merged:
            parameter = _module(self._pipeline, *key).weight
            parameter.data = self._originals[key].to(parameter.device)
        self._merged.clear()

    def _keep(self, key: tuple[str, str], parameter: Any) -> None:
        """Keep the original beside the weights, or in main memory when the device is full."""
        import torch

        original = parameter.data
        if parameter.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(parameter.device)
            if free < total // 4:
                original = original.cpu()
        self._originals[key] = original


class Inversions:
    """The textual inversions that a pipeline's tokenizers know at present."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._loaded: tuple[tuple[str, Path], ...] = ()

    def load(self, embeddings: Mapping[str, Path]) -> bool:
        """Replace what is loaded by these files (by SHA256); whether that changed anything.

        Raises:
            RenderError: 'bad-model-file', or 'bad-embedding': it does not fit the checkpoint.
        """
        wanted = tuple(embeddings.items())
        if wanted == self._loaded:
            return False
        self._unload()
        try:
            for sha256, path in wanted:
                self._loaded = (*self._loaded, (sha256, path))
                self._load(sha256, path)
        except RenderError:
            self._unload()
            raise
        except Exception as error:  # an untrusted file can make a loader fail in any way
            self._unload()
            raise RenderError(
                f"embedding {path.name!r} does not fit the checkpoint: "
                f"{type(error).__name__}: {error}",
                reason="bad-embedding",
            ) from error
        return True

    def _load(self, sha256: str, path: Path) -> None:
        from safetensors.torch import load_file

        read_header(path)
        vectors, pipeline = load_file(path), self._pipeline
        parts = [(next(iter(vectors)), pipeline.text_encoder, pipeline.tokenizer)]
        if hasattr(pipeline, "text_encoder_2"):
            parts = [
                ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
                ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
            ]
        elif len(vectors) != 1:
            raise ValueError(f"one tensor is expected, it holds {sorted(vectors)}")
        for name, encoder, tokenizer in parts:
            pipeline.load_textual_inversion(
                vectors[name], token=token(sha256), text_encoder=encoder, tokenizer=tokenizer
            )

    def _unload(self) -> None:
        if not self._loaded:
            return
        pipeline = self._pipeline
        pipeline.unload_textual_inversion()
        if hasattr(pipeline, "text_encoder_2"):
            pipeline.unload_textual_inversion(
                text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
            )
        self._loaded = ()


def token(sha256: str) -> str:
    """The word that stands for an embedding in a prompt."""
    return f"<embedding_{sha256[:16]}>"
