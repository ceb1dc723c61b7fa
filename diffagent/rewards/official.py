"""The authors' packages image-reward 1.5 and hpsv2 1.2.0 as backend of two scorers.

``rewards.scorers: [{name: image_reward, backend: official, ...}]`` selects it. The packages are the
reference: tests compare the default backend with them on the same weights.

Both packages are from 2023 and need fixes to run with current libraries, which `install` registers
with the import hook of `diffagent.compat`:

* image-reward expects functions that transformers 5 has moved or dropped, OpenAI's ``clip``, which
  PyPI does not have, fairscale, which is abandoned, and its whole ReFL trainer.
* hpsv2 imports tkinter's ``turtle`` by accident and ``clint`` for progress bars, and its wheel
  lacks the BPE vocabulary, of which open_clip ships an identical copy.

A name is lent to the importing module and taken back after its execution, so that transformers,
torchvision and ``sys.modules`` stay as they were for all other code. Warnings and transformers' log
level, which the two packages silence for the whole process, are restored too.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diffagent import compat
from diffagent.compat import Fix
from diffagent.errors import ConfigError

if TYPE_CHECKING:
    from diffagent.rewards.image_reward import ImageRewardConfig


def install() -> None:
    """Registers the fixes of both packages. Calling it again does nothing."""
    compat.install(_FIXES)


def build_image_reward(config: ImageRewardConfig) -> Any:
    """Returns the network of a description out of the modules of the package image-reward.

    Raises:
        ConfigError: the package is not installed.
    """
    _require("ImageReward", "image-reward==1.5")
    from ImageReward.ImageReward import MLP
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer

    from diffagent.rewards.image_reward import join_parts

    vision = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
    )
    text = BertConfig(**config.text, encoder_width=config.vision_width, add_cross_attention=True)
    encoder = BertModel(config=text, add_pooling_layer=False)
    return join_parts(config, vision, encoder, MLP(text.hidden_size).layers)


def to_hpsv2(network: Any, directory: Path | None) -> Any:
    """Returns the network of the package hpsv2 with the weights of an open_clip network.

    Args:
        network: as `diffagent.rewards.clip.load_open_clip` returns it.
        directory: its directory in open_clip's layout; None for a release, which is a ViT-H-14.

    Raises:
        ConfigError: the package is not installed.
    """
    _require("hpsv2", "hpsv2==1.2.0")
    from hpsv2.src.open_clip import get_model_config
    from hpsv2.src.open_clip.model import CLIP

    if directory:
        sizes = json.loads((directory / "open_clip_config.json").read_text("utf-8"))["model_cfg"]
    else:
        sizes = get_model_config("ViT-H-14")
    package = CLIP(**sizes)
    package.load_state_dict(network.state_dict())
    package.visual.preprocess_cfg = network.visual.preprocess_cfg
    return package


def _require(package: str, requirement: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"backend 'official' needs a package that is not installed: "
            f"`pip install --no-deps {requirement}`; or leave `backend` out"
        )
    install()


@contextmanager
def _lend_modules(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Puts stand-ins (name -> attributes) into `sys.modules`, and restores it afterwards."""
    previous = {name: sys.modules.get(name) for name in modules}
    for name, attributes in modules.items():
        stand_in = ModuleType(name, "Stand-in lent by diffagent during an import.")
        stand_in.__dict__.update(attributes)
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name, module in previous.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def _lend_attributes(owner: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """Adds attributes that `owner` lacks, and removes them afterwards."""
    added = {name: value for name, value in attributes.items() if not hasattr(owner, name)}
    for name, value in added.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in added:
            delattr(owner, name)


def _needs(modules: dict[str, dict[str, Any]]) -> Fix:
    return lambda module: _lend_modules(modules)


@contextmanager
def _fix_blip_vit(module: ModuleType) -> Iterator[None]:
    # torch has fairscale's wrapper now; only gradient checkpointing calls it.
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    prefix = "fairscale.nn.checkpoint.checkpoint_activations"
    stand_ins: dict[str, dict[str, Any]] = {
        "fairscale": {},
        "fairscale.nn": {},
        "fairscale.nn.checkpoint": {},
        prefix: {"checkpoint_wrapper": checkpoint_wrapper},
    }
    with _lend_modules(stand_ins), _silence_timm(module):
        yield


@contextmanager
def _silence_timm(module: ModuleType) -> Iterator[None]:
    # timm's old module names still work, but warn. The loader restores the filters.
    warnings.filterwarnings("ignore", "Importing from timm", FutureWarning)
    yield


@contextmanager
def _fix_blip_bert(module: ModuleType) -> Iterator[None]:
    from transformers import modeling_utils, pytorch_utils

    functions: dict[str, Any] = {
        "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward,
        "prune_linear_layer": pytorch_utils.prune_linear_layer,
        "find_pruneable_heads_and_indices": _no_pruning,
    }
    with _lend_attributes(modeling_utils, functions):
        yield
    # Methods that transformers 5 dropped from PreTrainedModel go to BLIP's subclass of it.
    base = module.BertPreTrainedModel
    base.get_head_mask = _get_head_mask
    base.invert_attention_mask = _invert_attention_mask
    base.init_weights = _init_weights


def _no_pruning(*args: Any) -> Any:
    raise NotImplementedError("pruning the heads of BLIP is not supported on transformers 5")


def _get_head_mask(self: Any, head_mask: Any, num_hidden_layers: int) -> list[None]:
    if head_mask is not None:
        raise NotImplementedError("a head mask for BLIP is not supported on transformers 5")
    return [None] * num_hidden_layers


def _invert_attention_mask(self: Any, encoder_attention_mask: Any) -> Any:
    """Returns the additive mask (B, 1, 1, L) of a 0/1 mask (B, L), as transformers 4 did."""
    import torch

    mask = encoder_attention_mask[:, None, None, :].to(self.dtype)
    return (1.0 - mask) * torch.finfo(self.dtype).min


def _init_weights(self: Any) -> None:
    # transformers 4 applied `_init_weights` to every module; 5 expects attributes of `post_init`.
    self.apply(self._init_weights)


@contextmanager
def _fix_blip_tokenizer(module: ModuleType) -> Iterator[None]:
    from diffagent.rewards.image_reward import load_tokenizer

    yield

    def init_tokenizer(vocabulary: str = "bert-base-uncased") -> Any:
        return load_tokenizer(vocabulary)

    vars(module)["init_tokenizer"] = init_tokenizer


@contextmanager
def _keep_transformers_verbosity(module: ModuleType) -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@contextmanager
def _fix_hpsv2_tokenizer(module: ModuleType) -> Iterator[None]:
    # During its execution the module opens the vocabulary in the directory of its own file.
    spec = importlib.util.find_spec("open_clip.tokenizer")
    if spec is None or spec.origin is None:
        raise ImportError("hpsv2 needs the vocabulary of open_clip: pip install open_clip_torch")
    original, module.__file__ = module.__file__, spec.origin
    try:
        yield
    finally:
        module.__file__ = original


_CLIP: dict[str, dict[str, Any]] = {"clip": {}}

_FIXES: dict[str, Fix] = {
    # ReFL, a training script, would import diffusers, datasets and accelerate.
    "ImageReward": _needs({"ImageReward.ReFL": {}}),
    "ImageReward.models.AestheticScore": _needs(_CLIP),
    "ImageReward.models.CLIPScore": _needs(_CLIP),
    "ImageReward.models.BLIP.vit": _fix_blip_vit,
    "ImageReward.models.BLIP.med": _fix_blip_bert,
    "ImageReward.models.BLIP.blip": _fix_blip_tokenizer,
    "ImageReward.models.BLIP.blip_pretrain": _keep_transformers_verbosity,
    "hpsv2.utils": _needs({"clint": {}, "clint.textui": {"progress": None}}),
    "hpsv2.img_score": _needs({"clint": {}, "clint.textui": {"progress": None}}),
    "hpsv2.src.open_clip.factory": _needs({"turtle": {"forward": None}}),
    "hpsv2.src.open_clip.timm_model": _silence_timm,
    "hpsv2.src.open_clip.tokenizer": _fix_hpsv2_tokenizer,
}
