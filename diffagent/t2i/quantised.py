"""Weights that are stored small, with scales beside them: multiplied out, or refused by name.

A weight in float8 or int8 often stands for itself times a scale in another tensor:
``X.weight`` with ``X.scale_weight`` (ComfyUI's ``scaled_fp8``), or with ``X.weight_scale`` and a
JSON text in ``X.comfy_quant`` or in the header's ``_quantization_metadata``. diffusers drops
tensors whose names it does not know, so such a file would be drawn as noise. The scales are
multiplied out here. Everything else that changes the meaning of a weight (4-bit packings, rotated
weights, nested scales, masks) is refused: a tensor that stands beside a weight is never ignored,
unless its name is listed below as harmless.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffagent.errors import RenderError
from diffagent.t2i.weights import Tensor, read_header, read_metadata, reading

if TYPE_CHECKING:
    import torch

_SCALES = ("scale_weight", "weight_scale")
_MARKER = "comfy_quant"
#: Markers, and scales of activations, which only a matrix product in float8 needs.
_MARKERS = frozenset({"scale_input", "input_scale", "scaled_fp8", _MARKER})
#: Leaves beside a weight that do not change what it means.
_HARMLESS = _MARKERS | {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
#: Parts of names that other quantisers use; the first that fits names the kind.
_KINDS = {
    "bitsandbytes__nf4": "4-bit bitsandbytes (nf4)",
    "bitsandbytes__fp4": "4-bit bitsandbytes (fp4)",
    ".absmax": "4-bit bitsandbytes",
    ".quant_map": "4-bit bitsandbytes",
    ".SCB": "8-bit bitsandbytes (LLM.int8)",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".wscales": "SVDQuant",
    ".wtscale": "SVDQuant",
    ".weight._data": "quanto",
    ".weight_s_rel": "4-bit (asym_w4a8)",
    ".weight_scale_2": "4-bit float (nvfp4)",
}  # fmt: skip
#: ComfyUI's formats that are a weight times a scale, whose shape tells what it is of.
_FORMATS = frozenset({
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise",
    "int8_tensorwise", "int8_blockwise",
})  # fmt: skip
_SETTINGS = frozenset({"format", "full_precision_matrix_mult", "group_size"})
_SMALL = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
_FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"})
_MARKER_BYTES = 10_000


def check_quantisation(path: Path) -> bool:
    """Check that every weight of a file can be read for what it stands for.

    Returns:
        Whether scales have to be multiplied out, which `load_tensors` does.

    Raises:
        RenderError: the weights are quantised in a way that is not supported, or the file is no
            sound safetensors; reason 'bad-model-file'.
    """
    tensors = read_header(path)
    for part, kind in _KINDS.items():
        if name := next((name for name in tensors if part in name), None):
            _refuse(path, f"its weights are quantised as {kind} (tensor {name!r})")
    _check_settings(path, tensors)
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in _SCALES:
            _check_scale(path, name, tensors)
        elif stem.endswith(".weight") and stem in tensors:
            _refuse(path, f"tensor {name!r} changes what {stem!r} means, in an unknown way")
        elif leaf not in _HARMLESS and f"{stem}.weight" in tensors:
            _refuse(path, f"tensor {name!r} changes what '{stem}.weight' means, in an unknown way")
        elif leaf == "weight" and tensor.dtype not in _FLOATS:
            scaled = tensor.dtype == "I8" and any(f"{stem}.{leaf}" in tensors for leaf in _SCALES)
            if not scaled:
                _refuse(path, f"tensor {name!r} is packed or quantised as {tensor.dtype}")
    return any(name.rpartition(".")[2] in _SCALES for name in tensors)


def load_tensors(path: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Load a safetensors file with its scales multiplied out.

    Args:
        path: of the file.
        dtype: of the weights that had a scale; float32 when None. Others stay as they are.

    Raises:
        RenderError: see `check_quantisation`; or the values are those of weights whose scales are
            not beside them.
    """
    import torch
    from safetensors.torch import load_file

    has_scales = check_quantisation(path)
    with reading(path.name, "cannot be read"):
        tensors: dict[str, torch.Tensor] = load_file(path)
    scales = [name for name in tensors if name.rpartition(".")[2] in _SCALES] if has_scales else []
    _check_range(path, tensors, {f"{name.rpartition('.')[0]}.weight" for name in scales})
    if not has_scales:
        return tensors
    for name in scales:
        scale, weight = tensors.pop(name), f"{name.rpartition('.')[0]}.weight"
        if bool((scale <= 0).any()) and bool((tensors[weight].float() != 0).any()):
            _refuse(path, f"scale {name!r} is not positive")
        product = tensors[weight].float() * _spread(scale.float(), tensors[weight].shape)
        tensors[weight] = product.to(dtype or torch.float32)
    return {name: t for name, t in tensors.items() if name.rpartition(".")[2] not in _MARKERS}


def _check_range(path: Path, tensors: Mapping[str, torch.Tensor], scaled: set[str]) -> None:
    """Refuse float8 weights that fill their type's range: a scale, which is elsewhere, made them.

    Weights of models are far smaller, so that what was only rounded to float8 ends far below.
    """
    import torch

    for name, tensor in tensors.items():
        is_small = tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        if is_small and tensor.ndim > 1 and tensor.numel() and name not in scaled:
            largest = float(tensor.float().abs().max())
            if largest >= torch.finfo(tensor.dtype).max * 0.9:
                _refuse(path, f"{name!r} reaches {largest:g} in float8, and its scale is not known")


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale of the whole weight, of each row, or of blocks, for every value of the weight."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() == scale.shape[0] == shape[0]:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    rows, columns = shape[0] // scale.shape[0], shape[1] // scale.shape[1]
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _check_scale(path: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    stem, scale = name.rpartition(".")[0], tensors[name]
    weight = tensors.get(f"{stem}.weight")
    if weight is None:
        _refuse(path, f"scale {name!r} has no weight")
    if sum(f"{stem}.{leaf}" in tensors for leaf in _SCALES) > 1:
        _refuse(path, f"'{stem}.weight' has two scales")
    if weight.dtype not in _FLOATS | _SMALL or scale.dtype not in {"F16", "BF16", "F32", "F64"}:
        _refuse(path, f"'{stem}.weight' is {weight.dtype} with scales in {scale.dtype} ({name!r})")
    numbers = 1
    for size in scale.shape:
        numbers *= size
    whole = numbers == 1
    rows = bool(scale.shape and weight.shape) and numbers == scale.shape[0] == weight.shape[0]
    blocks = (
        len(scale.shape) == len(weight.shape) == 2
        and numbers > 0
        and not any(size % n for size, n in zip(weight.shape, scale.shape, strict=True))
    )
    if not (whole or rows or blocks):
        _refuse(
            path, f"scale {name!r} of shape {scale.shape} does not fit a weight of {weight.shape}"
        )


def _check_settings(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse layers whose format, as ComfyUI's markers state it, is more than a scale."""
    for where, text in _stated_settings(path, tensors):
        with reading(path.name, f"holds no JSON in {where!r}"):
            settings = json.loads(text)
        layers = settings.get("layers") if isinstance(settings, dict) else None
        for layer in layers.values() if isinstance(layers, dict) else [settings]:
            known = isinstance(layer, dict) and layer.keys() <= _SETTINGS
            if not known or layer.get("format") not in _FORMATS:
                _refuse(path, f"its weights are quantised as {layer!r:.200} ({where!r})")
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        if leaf == _MARKER and not any(f"{stem}.{scale}" in tensors for scale in _SCALES):
            _refuse(path, f"{name!r} marks a quantised weight that has no scale")


def _stated_settings(path: Path, tensors: Mapping[str, Tensor]) -> list[tuple[str, Any]]:
    """ComfyUI's JSON texts on quantised layers, with where each stands."""
    from safetensors import safe_open

    texts: dict[Any, str] = {}
    if note := read_metadata(path).get("_quantization_metadata"):
        texts[note] = "_quantization_metadata"
    markers = [name for name in tensors if name.rpartition(".")[2] == _MARKER]
    with reading(path.name, "cannot be read"), safe_open(path, framework="numpy") as file:
        for name in markers:
            tensor = tensors[name]
            if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.shape[0] > _MARKER_BYTES:
                _refuse(path, f"{name!r} is no JSON text")
            texts.setdefault(bytes(file.get_tensor(name)), name)  # most layers share one
    return [(where, text) for text, where in texts.items()]


def _refuse(path: Path, problem: str) -> NoReturn:
    raise RenderError(
        f"{path.name!r} cannot be drawn with: {problem}; get the model in fp16, bf16 or fp32",
        reason="bad-model-file",
    )
