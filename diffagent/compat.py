"""What three libraries need to work with current versions; nothing else lives here.

`install` registers an import hook and does nothing more: no library is imported, and each fix
is applied at the moment when the module that needs it is imported. Call it before anything that
imports torchvision (transformers' image models, diffusers, open_clip), ImageReward or hpsv2.

* torchvision beside a CPU-only torch: its wheel is a CUDA build whose compiled extension cannot
  be loaded, and registering meta kernels for the operators that the extension should have
  declared fails (``operator torchvision::nms does not exist``). When, and only when, the
  extension did not load, the two operators are declared without an implementation; transforms
  and models work, `torchvision.ops.nms` stays unavailable.
* image-reward 1.5 (2023) wants functions that transformers 5 has moved or dropped, OpenAI's
  ``clip``, which PyPI does not have, fairscale, which is abandoned, and its whole ReFL trainer.
* hpsv2 1.2.0 imports tkinter's ``turtle`` by accident and ``clint`` for progress bars, and its
  wheel lacks the BPE vocabulary, of which open_clip ships an identical copy.

`python -m diffagent.compat`, the last step of `make install`, checks whether torchvision can be
imported in this environment. If not, it adds a .pth file by which every interpreter of the
environment registers the hook at its start, so that `import open_clip` or
`AutoModelForCausalLM.from_pretrained` work for users who never import diffagent.

Names are lent to the importing module and taken back when it has been executed, so that
transformers, torchvision and ``sys.modules`` look to everybody else as they were. Warnings and
transformers' log level, which the two packages silence for the whole process, are kept too.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

Fix = Callable[[ModuleType], AbstractContextManager[None]]


def install() -> None:
    """Registers the import hook. Calling it again does nothing."""
    if not any(isinstance(finder, _FixingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FixingFinder())


#: One line, as site.py wants it; silent where diffagent was uninstalled later.
_START_UP = (
    r'exec("try:\n from diffagent.compat import install\n install()\nexcept ImportError:\n pass")'
)


def register_at_startup(site_packages: Path) -> Path | None:
    """Make every interpreter of an environment register the hook, if torchvision needs it.

    Args:
        site_packages: directory of this interpreter that gets the .pth file.

    Returns:
        The .pth file, or None where torchvision can be imported without it.
    """
    path = site_packages / "diffagent-torchvision.pth"
    path.unlink(missing_ok=True)
    check = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return None
    path.write_text(f"import sys; {_START_UP}\n", encoding="utf-8")
    return path


class _FixingFinder(MetaPathFinder):
    """Finds a module as usual, and runs its fix around its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        fix = _FIXES.get(fullname)
        if fix is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _FixingLoader(spec.loader, fix)
                return spec
        return None


class _FixingLoader(Loader):
    def __init__(self, loader: Loader, fix: Fix) -> None:
        self._loader = loader
        self._fix = fix

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Some of these modules silence all warnings of the process when they are imported.
        with warnings.catch_warnings(), self._fix(module):
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        # importlib.resources, inspect and pkgutil ask the loader for more than the two methods.
        return getattr(self._loader, name)


_LIBRARIES: list[Any] = []  # torch drops the operators of a Library that is garbage-collected


@contextmanager
def _declare_torchvision_operators(extension: ModuleType) -> Iterator[None]:
    yield
    if not extension._has_ops():
        from torch import library as torch_library

        library: Any = torch_library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


@contextmanager
def _lend_modules(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Puts stand-ins (name, attributes) into `sys.modules`, and what was there back."""
    previous = {name: sys.modules.get(name) for name in modules}
    for name, attributes in modules.items():
        stand_in = ModuleType(name, "Stand-in lent by diffagent.compat during an import.")
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
    """Adds attributes that `owner` lacks, and takes them back."""
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
    # fairscale's wrapper, which only gradient checkpointing calls, went into torch.
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    prefix = "fairscale.nn.checkpoint.checkpoint_activations"
    parents: dict[str, dict[str, Any]] = {
        "fairscale": {},
        "fairscale.nn": {},
        "fairscale.nn.checkpoint": {},
    }
    lent = {**parents, prefix: {"checkpoint_wrapper": checkpoint_wrapper}}
    with _lend_modules(lent), _silence_timm(module):
        yield


@contextmanager
def _silence_timm(module: ModuleType) -> Iterator[None]:
    # Its old module names work, and warn. The loader restores the filters.
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
    """Additive mask (B, 1, 1, L) of a 0/1 mask (B, L), as in transformers 4."""
    import torch

    mask = encoder_attention_mask[:, None, None, :].to(self.dtype)
    return (1.0 - mask) * torch.finfo(self.dtype).min


def _init_weights(self: Any) -> None:
    # transformers 4 applied `_init_weights` to every module; 5 wants `post_init` bookkeeping.
    self.apply(self._init_weights)


@contextmanager
def _fix_blip_tokenizer(module: ModuleType) -> Iterator[None]:
    yield
    vars(module)["init_tokenizer"] = _init_blip_tokenizer


def _init_blip_tokenizer(vocabulary: str = "bert-base-uncased") -> Any:
    """BLIP's tokenizer: BERT's with [DEC] and [ENC] appended.

    Args:
        vocabulary: a directory of a saved tokenizer, or a name on the Hugging Face hub.
    """
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(vocabulary)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer


@contextmanager
def _keep_transformers_verbosity(module: ModuleType) -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@contextmanager
def _fix_hpsv2_tokenizer(module: ModuleType) -> Iterator[None]:
    # It looks for the vocabulary beside its own file, while the module is being executed.
    spec = importlib.util.find_spec("open_clip.tokenizer")
    if spec is None or spec.origin is None:
        raise ImportError("hpsv2 needs the vocabulary of open_clip: pip install open_clip_torch")
    own, module.__file__ = module.__file__, spec.origin
    try:
        yield
    finally:
        module.__file__ = own


_CLIP: dict[str, dict[str, Any]] = {"clip": {}}

_FIXES: dict[str, Fix] = {
    "torchvision.extension": _declare_torchvision_operators,
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

if __name__ == "__main__":
    register_at_startup(Path(sysconfig.get_path("purelib")))
