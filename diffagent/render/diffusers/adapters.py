"""LoRAs, merged into a checkpoint's weights, and textual inversions.

A LoRA's product is added to the weights instead of being run beside them: a step then costs what it
costs without LoRA, any number of them costs the same, and going from one set to the next takes as
long as the additions. The weights underneath are kept, so that taking a LoRA off leaves no trace.
Names are translated by diffusers (kohya's, SDXL's own block numbers, diffusers' old and new ones).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagent.errors import RenderError
from diffagent.t2i.quantised import load_tensors
from diffagent.t2i.weights import read_metadata, reading

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: (component, module) -> (up, down): the module's weight grows by up @ down.
LoRA = Mapping[tuple[str, str], "tuple[torch.Tensor, torch.Tensor]"]
_Tensors = Mapping[str, "torch.Tensor"]

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
#: Patterns of tensor names of other decompositions: leaving these tensors out would draw another
#: picture, so that their files are refused by name.
_FOREIGN = {
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"(^|[._])hada_": "a LoHa",
    r"(^|[._])lokr_": "a LoKr",
    r"lora_mid": "a LoCon with Tucker factors",
    r"(^|[._])b?oft_": "an OFT",
    r"on_input$|(^|[._])ia3_": "an IA3",
    r"\.(a1|a2|b1|b2)\.weight$": "a GLoRA",
    r"\.diff(_b)?$|\.[wb]_norm$|\.set_weight$": "a full difference of weights",
    r"\.(lora_(B|up)|lora\.up)(\.default)?\.bias$": "a LoRA with biases",
    r"\.(scalar|reshape_weight)$": "a LyCORIS with rescaled layers",
    r"^lora_controlnet$": "a Control-LoRA",
}
#: Endings of down factors; the up factor of each; where an alpha may stand below the layer's name.
_FACTORS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
_ALPHAS = (".alpha", ".lora.alpha", ".lora_linear_layer.alpha", "_lora.alpha")
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
#: Ways to initialise a LoRA that change the checkpoint's own weights, which the file does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")
_NAMED = 5  # tensors that a message names


def read_lora(path: Path, pipeline: Any) -> LoRA:
    """Read a LoRA's factors by the modules of ``pipeline`` that they change.

    The strength of a layer is alpha / rank, with alpha from a tensor beside it (kohya) or from the
    header's ``lora_adapter_metadata`` (diffusers and PEFT; rank and alpha patterns and rsLoRA
    included), or 1 without. Tensors that are no part of a LoRA are left out and logged by name.

    Raises:
        RenderError: 'bad-model-file' (no safetensors), or 'bad-lora': a decomposition that is not
            supported, a layer with more tensors than are understood, or no module of this
            pipeline in it.
    """
    tensors = load_tensors(path)
    with reading(path.name, "cannot be read as a LoRA", "bad-lora"):
        for pattern, kind in _FOREIGN.items():
            if name := next((name for name in tensors if re.search(pattern, name)), None):
                raise _unfit(path, f"it is {kind} (tensor {name!r}), which is not supported")
        layers = _layers(tensors)
        rest = sorted(tensors.keys() - {key for layer in layers for key in layer})
        if not layers:
            raise _unfit(path, f"it holds no LoRA layer, but {_names(rest)}")
        _check_rest(path, layers, rest)
        lora = _usable(path, layers, pipeline)
    if len(lora) < len(layers):
        log.warning(
            "%r: %d of its %d layers are not in this checkpoint and are left out",
            path.name, len(layers) - len(lora), len(layers),
        )  # fmt: skip
    if rest:
        log.warning("%r: tensors that are no LoRA layers are left out: %s", path.name, _names(rest))
    return lora


def _check_rest(
    path: Path, layers: Sequence[Mapping[str, torch.Tensor]], rest: Sequence[str]
) -> None:
    """Refuse tensors beside the factors of a layer: without them it is another one."""
    downs = (next(iter(layer)) for layer in layers)
    ends = [down for down, _ in _FACTORS]
    stems = {name.removesuffix(end) for name in downs for end in ends if name.endswith(end)}
    for name in rest:
        if name.rpartition(".")[0] in stems:
            raise _unfit(path, f"tensor {name!r} changes its layer in an unknown way")


def _usable(
    path: Path, layers: Sequence[Mapping[str, torch.Tensor]], pipeline: Any
) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """The factors of the layers that a pipeline has, their strengths multiplied in."""
    for layer in layers:
        (down_name, down), (up_name, up), *alphas = layer.items()
        for name, tensor in ((down_name, down), (up_name, up)):
            if tensor.ndim < 2:
                raise _unfit(path, f"tensor {name!r} has shape {tuple(tensor.shape)}")
        for name, tensor in alphas:
            if tensor.numel() != 1:
                raise _unfit(path, f"{name!r} holds {tensor.numel()} numbers instead of one")
    strengths, usable = _Strengths(path), {}
    factors = [dict(_with_alpha(layer)) for layer in layers]
    for translated in _translated(factors, pipeline):
        for (component, module), (up, down) in translated.items():
            target = _module(pipeline, component, module)
            if target is None:
                continue
            if not _fits(up, down, target.weight):
                raise _unfit(
                    path,
                    f"{component}.{module} is {tuple(target.weight.shape)} there and "
                    f"{tuple(up.shape)} x {tuple(down.shape)} here",
                )
            strength = strengths.of(component, module, down.shape[0])
            usable[component, module] = (up if strength == 1 else up.float() * strength, down)
    if not usable:
        name = next(iter(layers[0]))
        remedy = f"; {_BY_PEFT}" if "base_model.model." in name else ""
        raise _unfit(
            path,
            f"none of its {len(layers)} layers is in this checkpoint, such as {name!r}{remedy}",
        )
    return usable


_BY_PEFT = (
    "it was saved by PEFT, whose adapter_config.json has the strength; save it with diffusers' "
    "save_lora_weights"
)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"{name!r:.120}" for name in names[:_NAMED]) + more


def _fits(up: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        up.flatten(1).shape[1] == down.shape[0] > 0
        and up.shape[0] == weight.shape[0]
        and down[0].numel() == weight[0].numel()
    )


def _layers(tensors: _Tensors) -> list[dict[str, torch.Tensor]]:
    """The tensors of each layer: its down and up factors, and its alpha where it has one."""
    layers = []
    for down in tensors:
        end = next(((d, u) for d, u in _FACTORS if down.endswith(d)), None)
        stem = down.removesuffix(end[0]) if end else ""
        if not end or stem + end[1] not in tensors:
            continue
        names = [down, stem + end[1]]
        names += [stem + alpha for alpha in _ALPHAS if stem + alpha in tensors][:1]
        layers.append({name: tensors[name] for name in names})
    return layers


def _translated(
    layers: Sequence[Mapping[str, torch.Tensor]], pipeline: Any
) -> Iterable[dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]]:
    """The factors by module, all layers of a spelling at once; layer by layer where that fails."""
    kohya = [layer for layer in layers if next(iter(layer)).startswith(_KOHYA)]
    for group in (kohya, [layer for layer in layers if not next(iter(layer)).startswith(_KOHYA)]):
        try:
            yield _pairs(group, pipeline)
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            log.debug("translating names one by one: %s", error)
            for layer in group:
                try:
                    yield _pairs([layer], pipeline)
                except (ValueError, KeyError, IndexError, AttributeError) as unknown:
                    log.warning("unknown LoRA layer %r: %s", next(iter(layer)), unknown)


def _pairs(
    layers: Sequence[Mapping[str, torch.Tensor]], pipeline: Any
) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if not layers:
        return {}
    tensors = {name: tensor for layer in layers for name, tensor in layer.items()}
    if not any(key.startswith((*_KOHYA, *_COMPONENTS)) for key in tensors):
        tensors = {f"unet.{key}": tensor for key, tensor in tensors.items()}  # the U-Net's alone
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
            name, mark, _ = key.partition(".lora_A")
            if mark:
                pairs[component, name] = (part[key.replace(".lora_A", ".lora_B")], down)
    return pairs


def _with_alpha(layer: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
    """A layer's two factors, its alpha multiplied into the up factor: strength = alpha / rank."""
    (down_name, down), (up_name, up), *alpha = layer.items()
    if alpha:
        up = up.float() * (float(alpha[0][1]) / max(down.shape[0], 1))
    names = (name.replace(".default.weight", ".weight") for name in (down_name, up_name))
    return zip(names, (down, up), strict=True)


class _Strengths:
    """The strengths of layers as the header of a file states them, in PEFT's settings."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = read_metadata(path).get("lora_adapter_metadata")
        with reading(path.name, "holds lora_adapter_metadata that is no JSON", "bad-lora"):
            settings = json.loads(text) if text else {}
        if not isinstance(settings, dict):
            raise _unfit(path, "its lora_adapter_metadata is no JSON object")
        self._settings = {name: self._of_component(settings, name) for name in _COMPONENTS}
        self._patterns = {
            (name, key): self._by_name(stated.get(key) or {})
            for name, stated in self._settings.items()
            for key in ("rank_pattern", "alpha_pattern")
        }

    def of(self, component: str, module: str, rank: int) -> float:
        """Alpha / rank of a module, alpha / sqrt(rank) for rsLoRA; 1 where nothing is stated."""
        stated = self._settings[component]
        if not stated:
            return 1.0
        r = self._matching(component, "rank_pattern", module, stated.get("r", rank))
        alpha = self._matching(component, "alpha_pattern", module, stated.get("lora_alpha", rank))
        if r != rank or rank == 0:
            raise _unfit(self._path, f"{module} has rank {rank}, and {r:g} by its metadata")
        return alpha / (rank**0.5 if stated.get("use_rslora") else rank)

    def _of_component(self, settings: Mapping[str, Any], component: str) -> dict[str, Any]:
        """The settings of a component, which stand under its prefix or under none."""
        prefix = f"{component}."
        stated = {
            key.removeprefix(prefix): value
            for key, value in settings.items()
            if key.startswith(prefix) or not key.startswith(_COMPONENTS)
        }
        start = str(stated.get("init_lora_weights")).lower()
        for wrong, kind in (
            (stated.get("use_dora"), "a DoRA"),
            (stated.get("lora_bias"), "a LoRA with biases"),
            (start.startswith(_CHANGES_BASE), f"a LoRA that changes the checkpoint too ({start})"),
        ):
            if wrong:
                raise _unfit(self._path, f"it is {kind}, which is not supported")
        return stated

    def _by_name(self, pattern: Any) -> dict[str, tuple[int, Any]]:
        """The place and the value of each name in a pattern.

        PEFT takes these names for regular expressions; a stranger's would run here, so that only
        plain names are read: a whole name after '^', else the end of one.
        """
        if not isinstance(pattern, dict):
            raise _unfit(self._path, f"its metadata has {pattern!r:.80} for a pattern")
        names = {}
        for place, (key, value) in enumerate(pattern.items()):
            name = key.replace("\\.", ".")
            if not re.fullmatch(r"\^?[\w.-]+", name):
                raise _unfit(self._path, f"its metadata names layers by {key!r:.80}")
            names[name] = (place, value)
        return names

    def _matching(self, component: str, pattern: str, module: str, default: Any) -> float:
        """The value of the first name in a pattern that means a module."""
        names = self._patterns[component, pattern]
        parts = module.split(".")
        spellings = [f"^{module}", *(".".join(parts[start:]) for start in range(len(parts)))]
        matches = sorted((names[name] for name in spellings if name in names), key=lambda m: m[0])
        value = matches[0][1] if matches else default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= 1e6:
            raise _unfit(self._path, f"its metadata has {value!r:.80} for a rank or an alpha")
        return float(value)


def _module(pipeline: Any, component: str, name: str) -> Any:
    """A module by its name, with or without transformers' former level ``text_model``."""
    root = getattr(pipeline, component, None)
    for candidate in (name, name.removeprefix("text_model.")):
        try:
            module = root.get_submodule(candidate) if root else None
        except AttributeError:
            continue
        return module if hasattr(module, "weight") else None
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
                with reading(path.name, "is no embedding for the checkpoint", "bad-embedding"):
                    self._load(sha256, path)
        except BaseException:
            self._unload()
            raise
        return True

    def _load(self, sha256: str, path: Path) -> None:
        vectors, pipeline = load_tensors(path), self._pipeline
        if hasattr(pipeline, "text_encoder_2"):
            parts = [
                ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
                ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
            ]
        else:
            name = "emb_params" if "emb_params" in vectors else next(iter(vectors), "")
            parts = [(name, pipeline.text_encoder, pipeline.tokenizer)]
        rest = sorted(vectors.keys() - {name for name, _, _ in parts})
        if missing := [name for name, _, _ in parts if name not in vectors]:
            raise _no_embedding(
                path, f"it holds {_names(rest) or 'nothing'}, not {_names(missing)}"
            )
        if rest and parts[0][0] not in {"emb_params", "clip_l"}:
            raise _no_embedding(path, f"one tensor is expected, it holds {_names(sorted(vectors))}")
        for name, encoder, _ in parts:
            shape, width = tuple(vectors[name].shape), encoder.get_input_embeddings().embedding_dim
            if len(shape) not in {1, 2} or shape[-1] != width or 0 in shape:
                raise _no_embedding(
                    path, f"{name!r} has shape {shape}, vectors have {width} numbers"
                )
        if rest:
            log.warning(
                "%r: tensors that are no embedding are left out: %s", path.name, _names(rest)
            )
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


def _no_embedding(path: Path, problem: str) -> RenderError:
    return RenderError(
        f"{path.name!r} is no embedding for the checkpoint: {problem}", reason="bad-embedding"
    )


def token(sha256: str) -> str:
    """The word that stands for an embedding in a prompt."""
    return f"<embedding_{sha256[:16]}>"
